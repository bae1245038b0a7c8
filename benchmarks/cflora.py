"""One adapted linear layer on a CPU: our operator against PEFT's LoRA layer and the bare linear.

All arms share weight, input and upstream gradient, in float32, and take turns (`rounds`), with the
bare linear at both ends of a round. By default width and rank start at those of the recipes. All
arms leave the frozen product to torch's default; `model.frozen` can choose a faster one on some
CPUs, but that is no part of the operator.

The gate, at the timed shapes: value and every gradient of each of our arms against the oracle in
float64 with the same dropout mask, and without dropout those with M = I against PEFT's layer. An
error may be twice that of the plain formula, or of PEFT, in float32.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_suite.correctness import paths, relative
from benchmarks.gpu_suite.layer import DROPOUT, Arm, Layer, Shape
from benchmarks.report import Report, parser
from benchmarks.rounds import Times, interval, measure, spread, warm_up
from benchmarks.saved import saved_bytes
from rellax_ds import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensors = dict[str, torch.Tensor]
Step = dict[str, float]
"""Seconds of a full step by arm, in one round."""

WIDTHS = (576, 1024, 2048)
BARE, AGAIN, PEFT = "bare linear", "bare linear again", "PEFT"
OURS, IDENTITY = "CFLoRA cpu", "CFLoRA cpu, M = I"
TARGETS = {
    "cpu_layer_ratio_576": ("at most", 0.75),
    "cpu_overhead_removed_1024": ("at least", 0.6),
    "cpu_overhead_removed_2048": ("at least", 0.6),
    "gate_tax": ("at most", 1.03),
}
ARMS = ("all", "uncompiled", "figures")
LEGEND = """\
Forward is without a graph and with dropout on; backward and full are of a step of both, which
also saves for the backward; milliseconds are medians over rounds. Ratios are of full steps within
a round: median, and in brackets the quartiles. Gradients of x and of what the arm trains are made
anew in every step: A and B in PEFT's arms, A, B and the gates in ours, the gates alone in
`gate-only`, A and B alone with M = I. The gates are given; the layer that makes them from h, the
optimiser and everything outside the layer is not counted, nor is peak memory. `saved` are the bytes
autograd keeps between forward and backward, weights and factors left out. It counts x where a layer
keeps x itself, though x is the output of the layer before and often lives anyway. `faults` are
page faults of a full step: the allocator is settled first so that freed memory is reused, which
helps the arms that need most of it.
`PEFT` is its layer as it comes; `CFLoRA eager` is the formula as it reads, with `F.dropout`. The
compiled layer is timed at the first width only, because compiling takes long, and is in no figure.
The figures are of wall time; where other processes run, the ratios of CPU seconds differ from them
and the run should be repeated. Much of the gain is the cheaper dropout mask, and a model dilutes it
with all its other layers."""


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the gate fails."""
    options = _arguments().parse_args(given)
    runtime.prepare()
    page = Report("cflora")
    threads_before = torch.get_num_threads()
    try:
        run(page, options)
    finally:
        torch.set_num_threads(threads_before)
    return page.finish(options.report)


def _arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    made.add_argument("--tokens", type=int, default=2048, help="of the micro-batch")
    made.add_argument("--samples", type=int, default=8, help="each has a gate of its own")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="figures are of the first"
    )
    made.add_argument("--rounds", type=int, default=60, help="at most, of each table")
    made.add_argument("--minutes", type=float, default=6.0, help="for all timing together")
    made.add_argument(
        "--arms", choices=ARMS, default=ARMS[0], help="all, all but the compiled, or the figures'"
    )
    return made


def run(page: Report, options: argparse.Namespace) -> None:
    """The gate, and behind it every width with every number of threads."""
    shapes = [Shape(w, options.tokens, options.samples, options.rank) for w in options.widths]
    torch.set_num_threads(options.threads[0])
    for shape in shapes:
        check(page, shape)
    if page.failures:
        return
    page.body.append(f"Gate passed at widths {', '.join(map(str, options.widths))}.\n\n{LEGEND}")
    end = time.perf_counter() + 60 * options.minutes
    # Seconds of a round go with the square of the width and with the arms; what is left is shared.
    tables = [
        (threads, shape, options.arms if threads == options.threads[0] else "figures")
        for threads in options.threads
        for shape in shapes
    ]
    costs = [s.width**2 * (1.0 if arms == "figures" else 2.5) for _, s, arms in tables]
    for place, (threads, shape, chosen) in enumerate(tables):
        torch.set_num_threads(threads)
        layer = Layer(shape, "cpu", torch.float32)
        arms = figure_arms(layer) if chosen == "figures" else all_arms(layer)
        if chosen == "all" and place == 0:
            arms[-1:-1] = compiled_arms(layer)
        warm_up(arms, layer)
        left, share = end - time.perf_counter(), costs[place] / sum(costs[place:])
        times = measure(arms, layer, options.rounds, left * share)
        describe(page, arms, times, layer, threads)
        conclude(page, times, shape.width if threads == options.threads[0] else None)
    taxes = [page.figures.pop(f"gate_tax_{width}") for width in options.widths]
    page.figures["gate_tax"] = statistics.median(taxes)
    page.body.append(f"gate_tax, the median over the widths: {shown('gate_tax', page.figures)}.")


def figure_arms(layer: Layer) -> list[Arm]:
    """What the figures need, the bare linear first and last."""
    return [
        layer.bare(BARE),
        layer.peft(PEFT, torch.float32),
        layer.ours(OURS, "cpu"),
        layer.ours(IDENTITY, "cpu", gated=False),
        layer.bare(AGAIN),
    ]


def all_arms(layer: Layer) -> list[Arm]:
    """All arms but the compiled one, the bare linear first and last."""
    return [
        layer.bare(BARE),
        layer.peft(PEFT, torch.float32),
        layer.peft("PEFT, bf16 adapters", torch.bfloat16),
        layer.eager(),
        *our_arms(layer),
        layer.bare(AGAIN),
    ]


def compiled_arms(layer: Layer) -> list[Arm]:
    """PEFT's layer compiled, where there is a compiler."""
    arm = layer.peft("PEFT, compiled", torch.float32)
    arm.call = torch.compile(arm.call, dynamic=False)
    return [arm] if shutil.which("g++") else []


def our_arms(layer: Layer) -> list[Arm]:
    """The operator on every path a CPU has."""
    return [
        arm
        for path in paths("cpu")
        for arm in (
            layer.ours(f"CFLoRA {path}", path),
            layer.ours(f"CFLoRA {path}, M = I", path, gated=False),
            layer.ours(f"CFLoRA {path}, gate-only", path, trains_factors=False),
        )
    ]


def check(page: Report, shape: Shape, judged: Callable[[Layer], Sequence[Arm]] = our_arms) -> None:
    """The correctness gate at one shape, for the arms `judged` makes of a layer."""
    for dropout in (DROPOUT, 0.0):
        layers = [Layer(shape, "cpu", kind, dropout) for kind in (torch.float64, torch.float32)]
        oracles: dict[tuple[str, ...], list[Tensors]] = {}
        peft = [] if dropout else [outcome(each.peft(PEFT, each.dtype), each) for each in layers]
        eager = [] if dropout else [layers[1].eager()]  # its mask is torch's own
        for arm in (*judged(layers[1]), *eager):
            trained = tuple(arm.trained)
            if trained not in oracles:
                gated, factors = "gates" in trained, "A" in trained
                oracles[trained] = [
                    outcome(each.ours("oracle", "reference", gated, factors), each)
                    for each in layers
                ]
            found = outcome(arm, layers[1])
            place = f"{arm.name} at width {shape.width} and dropout {dropout}"
            compare(page, place, found, *oracles[trained])
            if peft and "gates" not in trained:
                compare(page, f"{place} against PEFT", found, *peft)


def outcome(arm: Arm, layer: Layer) -> Tensors:
    """Value and gradients by name, with the dropout mask of one seed."""
    torch.manual_seed(1)
    y = arm.call(layer.x)
    wanted = {"x": layer.x, **arm.trained}
    gradients = torch.autograd.grad(y, list(wanted.values()), layer.upstream)
    named = {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {"y": y.detach(), **named}


def compare(page: Report, place: str, found: Tensors, exact: Tensors, plain: Tensors) -> None:
    """Check each tensor's error against twice that of `plain`."""
    for name in exact:
        limit = 2 * relative(plain[name], exact[name]) + 4 * torch.finfo(torch.float32).eps
        off = relative(found[name], exact[name])
        page.check(off <= limit, f"{place}: {name} is off by {off:.1e}, allowed is {limit:.1e}")


def ratio(step: Step) -> float:
    """Ours over PEFT's layer."""
    return step[OURS] / step[PEFT]


def removed(step: Step) -> float:
    """Share of what PEFT's layer adds to the bare linear that ours does not add."""
    return (step[PEFT] - step[OURS]) / (step[PEFT] - step[BARE])


def tax(step: Step) -> float:
    """Ours with M(h) over ours with M = I."""
    return step[OURS] / step[IDENTITY]


CLAIMS: dict[str, Callable[[Step], float]] = {
    "cpu_layer_ratio": ratio,
    "cpu_overhead_removed": removed,
    "gate_tax": tax,
}


def paired(
    times: dict[str, Times], of: Callable[[Step], float], clock: str = "full"
) -> list[float]:
    """`of` the full steps of every round; the bare linear is the mean of its two turns."""
    rounds = zip(*(getattr(arm, clock) for arm in times.values()), strict=True)
    steps = [dict(zip(times, row, strict=True)) for row in rounds]
    return [of({**step, BARE: (step[BARE] + step[AGAIN]) / 2}) for step in steps]


def describe(
    page: Report, arms: Sequence[Arm], times: dict[str, Times], layer: Layer, threads: int
) -> None:
    """The table of one width; the bare linear's own turns are divided by each other."""
    rows = []
    for arm in arms:
        of = times[arm.name]
        backward = [full - forward for full, forward in zip(of.full, of.forward, strict=True)]
        saved = saved_bytes(functools.partial(arm.call, layer.x), arm.parameters) / 2**20
        rows.append(
            [
                arm.name,
                *(statistics.median(each) * 1e3 for each in (of.inference, backward, of.full)),
                *(spread(of.full, times[base].full) for base in (BARE, PEFT)),
                saved,
                round(statistics.median(of.faults)),
            ]
        )
    shape, every = layer.shape, times.values()
    share = sum(sum(each.busy) for each in every) / sum(sum(each.full) for each in every)
    page.body.append(
        f"## Width {shape.width}, {threads} thread{'s' * (threads > 1)}\n\n{shape.tokens} tokens "
        f"in {shape.samples} samples, rank {shape.rank}, dropout {layer.dropout}, "
        f"{len(times[BARE].full)} rounds; CPU seconds over thread seconds {share / threads:.2f}."
    )
    header = [
        "arm",
        "forward ms",
        "backward ms",
        "full ms",
        "/ bare",
        "/ PEFT",
        "saved MiB",
        "faults",
    ]
    page.table(header, rows)


def conclude(page: Report, times: dict[str, Times], width: int | None) -> None:
    """Medians over rounds with intervals; where `width` is given they are figures."""
    rows = []
    for claim, of in CLAIMS.items():
        values = paired(times, of)
        cell = f"{statistics.median(values):.3f}"
        if width is not None:
            name = f"{claim}_{width}"
            page.figures[name] = statistics.median(values)
            cell = shown(name, page.figures)
        on_cpu = statistics.median(paired(times, of, "busy"))
        rows.append([claim, cell, interval(values), f"{on_cpu:.3f}"])
    page.table(["over rounds", "median", "95 % bootstrap interval", "median of CPU seconds"], rows)


def shown(name: str, figures: dict[str, float]) -> str:
    """A figure beside its target, where it has one."""
    value = figures[name]
    if name not in TARGETS:
        return f"{value:.3f}"
    sign, target = TARGETS[name]
    met = value <= target if sign == "at most" else value >= target
    return f"{value:.3f}, target {sign} {target}: {'met' if met else 'NOT met'}"


if __name__ == "__main__":
    sys.exit(main())
