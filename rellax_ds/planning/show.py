"""A plan as text for people and as JSON for programs; both hold the same figures."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rellax_ds.model.rellax import GROUPS
from rellax_ds.planning.memory import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.planning.estimate import Plan
    from rellax_ds.planning.work import Prompts

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes, counts and seconds; None where a figure is not known."""
    found = asdict(plan)
    shape = found.pop("shape")
    parameters = {
        group: {
            "trained": plan.shape.count(group, trained=True),
            "frozen": plan.shape.count(group, trained=False),
        }
        for group in ("backbone", *GROUPS)
    }
    columns = ("device", "host", "nvme")
    total = asdict(plan.total)
    return found | {
        "parameters": parameters,
        "decoder": shape["decoder"],
        "terms": {t["name"]: {name: t[name] for name in columns} for t in found["terms"]},
        "total": {name: total[name] for name in columns},
        "host_of_a_machine": plan.total.host * plan.ranks // plan.hosts,
    }


def text(plan: Plan, gpu_memory: float | None = None) -> str:
    """The plan for a terminal."""
    quantised = "" if plan.quantization == "none" else f", frozen layers in {plan.quantization}"
    hosts = f" on {plan.hosts} machines" if plan.hosts > 1 else ""
    blocks = [
        f"{plan.recipe}: {plan.backbone}, by {plan.source}\n"
        f"{plan.ranks} {'ranks' if plan.ranks > 1 else 'rank'}{hosts}, ZeRO stage {plan.stage}, "
        f"{plan.precision}{quantised}",
        _parameters(plan),
        _memory(plan, gpu_memory),
        _work(plan),
    ]
    return "\n\n".join(blocks)


def size(count: int) -> str:
    """Bytes with a unit, three significant digits."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[0]}" if not unit else f"{value:.3g} {_UNITS[unit]}"


def _parameters(plan: Plan) -> str:
    rows: list[Sequence[str]] = [("parameters", "trained", "frozen")]
    for group in ("backbone", *GROUPS):
        counts = [plan.shape.count(group, trained) for trained in (True, False)]
        if any(counts):
            rows.append((f"  {group}", *(f"{count:,}" for count in counts)))
    return _table(rows)


def _memory(plan: Plan, gpu_memory: float | None) -> str:
    device = "GPU" if plan.cuda else "process"
    used = [name for name in ("host", "nvme") if getattr(plan.total, name)]
    rows: list[Sequence[str]] = [("memory of a rank, GiB", device, *used)]
    for term in (*plan.terms, plan.total):
        cells = [getattr(term, name) for name in ("device", *used)]
        rows.append((f"  {term.name}", *(f"{cell / GIB:.3f}" for cell in cells)))
    known = "the longest prompts" if plan.tokens_exact else "shards.max_tokens, an upper bound"
    lines = [
        _table(rows),
        f"  micro-batch of {plan.micro_batch} x {plan.accumulation} accumulated, "
        f"at most {plan.tokens:,} tokens ({known})",
        f"  largest single gather {size(plan.largest_fetch)}",
    ]
    if used:
        host = plan.total.host * plan.ranks // plan.hosts
        lines.append(f"  host memory of a machine for {plan.ranks // plan.hosts}: {size(host)}")
    if gpu_memory is not None:
        free = gpu_memory * GIB - plan.total.device
        lines.append(f"  fits {gpu_memory:g} GiB, {size(int(free))} to spare")
    return "\n".join(lines)


def _work(plan: Plan) -> str:
    work = plan.work
    rows: list[Sequence[str]] = [("prompts", "rows", "shards", "tokens", "disk", "from")]
    rows += [(f"  {split}", *_prompts(found)) for split, found in work.prompts.items()]
    bound = "" if work.prompts["train"].exact else "at most "
    lines = [
        _table(rows),
        f"steps {work.steps:,} ({work.steps_per_epoch:,} an epoch), {work.samples:,} prompts, "
        f"{bound}{work.tokens:,} tokens; valid scored {work.valid_scores} times",
        f"adapter {size(work.adapter)}, a checkpoint {size(work.checkpoint)}, "
        f"at most {size(work.checkpoints)} of them kept",
    ]
    if work.seconds is not None:
        lines.append(f"training steps {bound}{work.seconds / 3600:.2f} hours at that throughput")
    return "\n".join(lines)


def _prompts(found: Prompts) -> tuple[str, ...]:
    bound = "" if found.exact else "<= "
    return (
        "all" if found.rows is None else f"{found.rows:,}",
        "?" if found.shards is None else f"{found.shards:,}",
        "?" if found.tokens is None else f"{bound}{found.tokens:,}",
        "?" if found.disk is None else f"{bound}{size(found.disk)}",
        found.source,
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
