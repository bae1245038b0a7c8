"""HBM passes of our compute paths with Triton kernels: forward and backward of adapted layers.

Prints JSON; `benchmarks.ledger` starts it in a process of its own with TRITON_INTERPRET=1. Two
small widths are interpreted; both must touch the same share of every argument, else the charge at
the true width would depend on the width it was learned at. Then the launchers run at true size on
tensors without data: kernels are charged as `kernel_traffic` says, operators of torch as in
`passes`, and the bare linear's own traffic is taken off.

float16 stands for bfloat16, which the interpreter cannot compute; both have two bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.kernel_traffic import Argument, Recorder, Share, charged, shares
from benchmarks.passes import (
    DROPOUT,
    RANK,
    TOKENS,
    WIDTHS,
    Traffic,
    bare_bytes,
    one_pass,
)
from rellax_ds.kernels.composable import ComposablePath
from rellax_ds.kernels.function import Call, CFLora
from rellax_ds.kernels.philox import Dropout, threshold_of
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from rellax_ds.kernels.function import Path

SMALL_WIDTHS, SMALL_TOKENS = (256, 320), 512
SAMPLES = 4
ARCHITECTURE = 90
"""Whose launch configurations are taken: tiles decide how large partial sums are."""


@dataclass(frozen=True)
class Arm:
    """One way to run adapted layers that share an input.

    Attributes:
        name: Name in the tables.
        path: Compute path.
        dense: Whether the path computes the frozen layers, which are else called normally.
        trains_factors: Whether A and B need gradients, or only x and the gates.
        dropout_p: Drop rate.
        modules: Layers that share x.
    """

    name: str
    path: str
    dense: bool = True
    trains_factors: bool = True
    dropout_p: float = DROPOUT
    modules: int = 1


ARMS = (
    Arm("fused", "triton"),
    Arm("fused, gate-only", "triton", trains_factors=False),
    Arm("fused, p = 0", "triton", dropout_p=0.0),
    Arm("fused, q and v", "triton", modules=2),
    Arm("cublas", "cublas"),
    Arm("cublas, gate-only", "cublas", trains_factors=False),
    Arm("composable", "triton", dense=False),
    Arm("composable, p = 0", "triton", dense=False, dropout_p=0.0),
    Arm("composable without Triton, p = 0", "torch", dense=False, dropout_p=0.0),
)


class HostRows(Rows):
    """Rows whose tables hold numbers even where tensors have only shapes."""

    def tiles(self, block: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """See `Rows`."""
        with unset_fake_temporarily():
            return super().tiles(block, device)

    def tiles_by_sample(
        self, block: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rows`."""
        with unset_fake_temporarily():
            return super().tiles_by_sample(block, device)


class Inputs:
    """Tensors of one forward and backward of an arm, random, in float16."""

    def __init__(self, arm: Arm, tokens: int, width: int) -> None:
        self.arm = arm
        self.generator = torch.Generator().manual_seed(0)
        self.x = self._draw(tokens, width).requires_grad_()
        self.modules = [
            (
                self._draw(width, width),
                self._draw(RANK, width).requires_grad_(arm.trains_factors),
                self._draw(width, RANK).requires_grad_(arm.trains_factors),
                self._draw(SAMPLES, RANK, RANK).float().requires_grad_(),
            )
            for _ in range(arm.modules)
        ]
        self.upstream = [self._draw(tokens, width) for _ in range(arm.modules)]
        with unset_fake_temporarily():
            self.rows = HostRows.from_lengths([tokens // SAMPLES] * SAMPLES)
        self.dropout = None
        if arm.dropout_p:
            seed = torch.full((1,), 1 << 40, dtype=torch.int64)
            self.dropout = Dropout(seed, threshold_of(arm.dropout_p), tuple(range(arm.modules)))

    def _draw(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * 0.1).half()

    def step(self, path: Path) -> None:
        """Forward and backward."""
        arguments: list[torch.Tensor | None] = []
        for weight, A, B, gates in self.modules:
            base = weight if self.arm.dense else torch.nn.functional.linear(self.x, weight)
            arguments += [base, None, A, B, gates]
        scalings = (2.0,) * len(self.modules)
        call = Call(path, self.rows, scalings, self.dropout, self.arm.dense)
        outputs = CFLora.apply(call, self.x, *arguments)
        torch.autograd.backward(outputs, self.upstream)


def learn(arm: Arm, path: Path, tokens: int, width: int) -> dict[Argument, Share]:
    """Share of each kernel argument that is read and written, interpreted at a small shape."""
    inputs = Inputs(arm, tokens, width)
    with Recorder() as recorder:
        inputs.step(path)
    return shares(recorder.launches)


@dataclass
class Measured:
    """Passes of an arm at a shape that was never executed.

    Attributes:
        items: Passes read and written, by kernel argument or torch operator.
        extra: All passes beyond those of the arm's bare linears.
        large: Those of [T, d] tensors and their masks in kernels; the rest of `extra` is tensors of
            rank r, partial sums, tables, and operators of torch.
    """

    items: dict[str, tuple[float, float]]
    extra: float
    large: float


def measure(
    arm: Arm, path: Path, share: dict[Argument, Share], tokens: int, width: int
) -> Measured:
    """Charge the launchers' kernels and torch operators at true size."""
    unit = one_pass(tokens, width)
    with FakeTensorMode():
        inputs = Inputs(arm, tokens, width)
        with Recorder(execute=False) as recorder, Traffic() as traffic:
            inputs.step(path)
    bytes_of = charged(recorder.launches, share)
    found = {
        f"{launch}({name})": (read / unit, written / unit)
        for (launch, name), (read, written) in bytes_of.items()
    }
    for operator in traffic.operators:
        key = f"torch.{operator.name}"
        read, written = found.get(key, (0.0, 0.0))
        found[key] = (read + operator.read / unit, written + operator.written / unit)
    kinds = ((tokens, width), (tokens, -(-width // 8)))
    large = sum(
        sum(bytes_of[launch.name, name])
        for launch in recorder.launches
        for name, access in launch.accesses.items()
        if access.shape[-2:] in kinds
    )
    total = sum(read + written for read, written in found.values())
    bare = arm.modules * bare_bytes(tokens, width) / unit
    return Measured(found, total - bare, large / unit - 4 * arm.modules)


def disagreement(one: dict[Argument, Share], other: dict[Argument, Share]) -> list[str]:
    """Arguments of which the two small widths touched different shares."""
    return [
        f"{kernel}({name}): {one.get((kernel, name))} and {other.get((kernel, name))}"
        for kernel, name in sorted(one.keys() | other.keys())
        if one.get((kernel, name)) != other.get((kernel, name))
    ]


def configuration(kernel: str, itemsize: int, block_rank: int) -> Any:
    """Launch configuration of a kernel on `ARCHITECTURE`, in place of the interpreter's."""
    configs = importlib.import_module("rellax_ds.kernels.configs")
    return configs.launch(kernel, ARCHITECTURE, itemsize, block_rank)


def main() -> None:
    """Measure the named arms, or all, whose path this build has, and print JSON."""
    names = sys.argv[1:]
    paths: dict[str, Path] = {"torch": ComposablePath()}
    with contextlib.suppress(ModuleNotFoundError):
        launch = importlib.import_module("rellax_ds.kernels.launch")
        launch.tuning.choose = lambda key, call: configuration(
            key.kernel, key.itemsize, key.block_rank
        )
        paths |= {"triton": launch.TritonPath(), "cublas": launch.CublasPath()}
    results = []
    for arm in ARMS:
        if arm.path not in paths or (names and arm.name not in names):
            continue
        path = paths[arm.path]
        learned = [learn(arm, path, SMALL_TOKENS, width) for width in SMALL_WIDTHS]
        by_width = {w: measure(arm, path, learned[0], TOKENS, w) for w in WIDTHS}
        results.append(
            {
                "arm": dataclasses.asdict(arm),
                "passes": {w: found.extra for w, found in by_width.items()},
                "large": by_width[WIDTHS[0]].large,
                "items": by_width[WIDTHS[0]].items,
                "disagreement": disagreement(*learned),
            }
        )
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
