"""The byte ledger of an adapted linear: HBM passes, predicted GPU times, bytes saved for backward.

An adapter adds hardly any arithmetic to a frozen linear and a lot of memory traffic, so its cost on
a GPU is bytes. They can be counted on any machine: for eager PyTorch from the operators that run
(`passes`), for our kernels from the addresses they follow in Triton's interpreter
(`kernel_traffic`). Forward and backward of one square layer with trained A and B unless said
otherwise, rank 16, 8192 tokens, in passes P of a 16-bit [T, d] tensor beyond the bare linear.
Everything counts: rank-r tensors, scratch, partial sums.

The times are predicted from these bytes and a stated speed of GEMM and HBM; no GPU was used.
Gate: PEFT's layer costs what its formula says, what the interpreter teaches about a kernel does not
depend on the width, and ours stays within the passes and saved bytes it is designed for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.passes import DROPOUT, RANK, TOKENS, WIDTHS, one_pass, peft_passes
from benchmarks.report import Report, parser
from benchmarks.saved import our_saved, peft_saved
from rellax_ds import runtime

GEMM, BANDWIDTH = 700e12, 0.9 * 3.35e12
FORMULA = "t = 4 T d^2 / 700e12 + passes * P / (0.9 * 3.35e12)"

# Passes by the written-out formula: every operator of PEFT's layer, rank-r tensors left out.
ORACLE = {"PEFT, fp32 adapters": 52.0, "PEFT, bf16 adapters": 21.0, "PEFT, bf16, p = 0": 16.0}
RANK_R = 0.1
"""What rank-r tensors may add to the oracle, in passes."""

LIMITS = {"passes_fused": 3.5, "passes_gate_only": 2.3, "saved_gate_only_share": 0.01}
"""Most passes beyond the bare linear, and most bytes saved for backward as a share of PEFT's."""

SAVED_RANK, SAVED_TOKENS, SAVED_WIDTHS = 8, 512, (576, 1024, 4096)


def main() -> int:
    """Count, predict and print."""
    options = parser(__doc__).parse_args()
    report = Report("ledger")
    eager = eager_passes()
    for name, expected in ORACLE.items():
        off = eager[name][WIDTHS[0]] - expected
        report.check(0 <= off <= RANK_R, f"{name}: {expected + off:.2f} passes, not {expected}")
    kernels = kernel_passes()
    for found in kernels:
        report.check(
            not found["disagreement"],
            f"{found['arm']['name']}: shares depend on the width: {found['disagreement']}",
        )
    ours = {found["arm"]["name"]: found["passes"] for found in kernels}
    for figure, (arms, name) in {
        "passes_fused": (ours, "fused"),
        "passes_gate_only": (ours, "fused, gate-only"),
        "passes_peft_bf16": (eager, "PEFT, bf16 adapters"),
        "passes_peft_fp32": (eager, "PEFT, fp32 adapters"),
    }.items():
        report.check(name in arms, f"{name}: this build lacks the path")
        if name in arms:
            report.figures[figure] = arms[name][WIDTHS[0]]
    single = {found["arm"]["name"] for found in kernels if found["arm"]["modules"] == 1}
    passes_tables(report, eager, ours)
    times_table(report, {**eager, **{k: v for k, v in ours.items() if k in single}})
    for found in kernels:
        if found["arm"]["name"] in ("fused", "fused, gate-only"):
            items_table(report, found)
    saved_table(report)
    for figure, limit in LIMITS.items():
        value = report.figures.get(figure, limit)
        report.check(value <= limit, f"{figure} is {value:.4g}, the limit is {limit:g}")
    return report.finish(options.report)


def eager_passes() -> dict[str, dict[int, float]]:
    """Passes of PEFT's own layer by arm and width."""
    bf16, fp32 = torch.bfloat16, torch.float32
    arms = {
        "PEFT, fp32 adapters": (fp32, DROPOUT),
        "PEFT, bf16 adapters": (bf16, DROPOUT),
        "PEFT, bf16, p = 0": (bf16, 0.0),
    }
    return {
        name: {width: peft_passes(width, dtype, p) for width in WIDTHS}
        for name, (dtype, p) in arms.items()
    }


def kernel_passes() -> list[dict[str, Any]]:
    """What `benchmarks.kernel_passes` finds, in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_passes"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=runtime.child_environment({"TRITON_INTERPRET": "1"}),
    )
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for found in results:
        found["passes"] = {int(width): value for width, value in found["passes"].items()}
    return results


def predicted(passes: float, width: int) -> float:
    """Predicted seconds of forward and backward on an H100 by `FORMULA`."""
    return 4 * TOKENS * width**2 / GEMM + passes * one_pass(TOKENS, width) / BANDWIDTH


def passes_tables(
    report: Report, eager: dict[str, dict[int, float]], ours: dict[str, dict[int, float]]
) -> None:
    """Passes by arm and width."""
    report.body.append(
        f"**Passes beyond the bare linear**, forward and backward, T {TOKENS}, rank {RANK}, "
        f"dropout {DROPOUT} unless p = 0. PEFT: its own layer on meta tensors "
        "at true size, dropout as `native_dropout`. Ours: Triton kernels charged with size of each "
        "argument at true size times the share of it that the kernel touches in the interpreter, "
        "each byte once per kernel (repeats are served by L2); operators of torch as for PEFT. "
        "`composable` calls the frozen layer normally; `q and v` are two layers on one input, "
        "against two bare linears."
    )
    rows = [[name, *by_width.values()] for name, by_width in (eager | ours).items()]
    report.table(["arm", *(f"d {width}" for width in WIDTHS)], rows)


def times_table(report: Report, arms: dict[str, dict[int, float]]) -> None:
    """Predicted times by arm and width, and the ratio to PEFT with bf16 adapters."""
    report.body.append(
        f"**Predicted, not measured**: microseconds on an H100, forward and backward of one layer, "
        f"T {TOKENS}, `{FORMULA}` with the passes above; in brackets PEFT bf16 over the arm. Every "
        "pass is taken as exposed, and our GEMM as fast as the vendor's."
    )
    rows = [["bare linear", *(f"{predicted(0, width) * 1e6:.0f}" for width in WIDTHS)]]
    for name, by_width in arms.items():
        row = [name]
        for width, passes in by_width.items():
            base = predicted(arms["PEFT, bf16 adapters"][width], width)
            seconds = predicted(passes, width)
            row.append(f"{seconds * 1e6:.0f} ({base / seconds:.2f})")
        rows.append(row)
    report.table(["arm", *(f"d {width}" for width in WIDTHS)], rows)


def items_table(report: Report, found: dict[str, Any]) -> None:
    """Passes of one arm by kernel argument, small ones summed up."""
    passes, large = found["passes"][WIDTHS[0]], found["large"]
    report.body.append(
        f"**{found['arm']['name']}** at d {WIDTHS[0]}: of {passes:.3f} passes {large:.3f} are "
        f"[T, d] tensors and masks, {passes - large:.3f} partial sums, rank-r tensors and tables. "
        "Itemised with the frozen linear's own traffic (2 P and the weight, forward and backward); "
        "`a=b` is one tensor passed as several arguments, as absent ones are."
    )
    shown = {k: v for k, v in found["items"].items() if sum(v) >= 0.01}
    small = [v for v in found["items"].values() if sum(v) < 0.01]
    rows = [[key, float(read), float(written)] for key, (read, written) in shown.items()]
    rows.append(
        [f"{len(small)} smaller", *(float(sum(pair[i] for pair in small)) for i in range(2))]
    )
    report.table(["argument or operator", "read", "written"], rows)


def saved_table(report: Report) -> None:
    """Bytes a token saved for backward; the gate-only share at the largest width in bf16."""
    report.body.append(
        f"**Saved for backward**, bytes a token of one layer, rank {SAVED_RANK}, dropout "
        f"{DROPOUT}, {SAVED_TOKENS} tokens; distinct storages, parameters left out, gates of the "
        "batch included. PEFT on meta tensors with a GPU's dropout (mask of one byte an element). "
        "Ours on this CPU; a path that stores its mask adds d / 8 where A is trained. The share is "
        "that of gate-only in PEFT with adapters in the type of x."
    )
    rows: list[list[object]] = []
    share = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        for width in SAVED_WIDTHS:
            shape = (SAVED_TOKENS, width, SAVED_RANK, dtype)
            wide = peft_saved(*shape, torch.float32, DROPOUT)
            same = peft_saved(*shape, dtype, DROPOUT)
            trained = our_saved(*shape, DROPOUT, trains_factors=True)
            gates = our_saved(*shape, DROPOUT, trains_factors=False)
            share = gates / same
            sizes = [f"{value / SAVED_TOKENS:.0f}" for value in (wide, same, trained, gates)]
            name = str(dtype).removeprefix("torch.")
            rows.append([name, width, *sizes, f"1 / {1 / share:.0f}"])
    header = ["type", "d", "PEFT fp32", "PEFT same type", "ours", "ours, gate-only", "share"]
    report.table(header, rows)
    report.figures["saved_gate_only_share"] = share


if __name__ == "__main__":
    sys.exit(main())
