"""One adapted linear: time and memory of every arm, the bare linear at both ends.

The arms of one shape run in one process one after the other, on the same input. The bare linear is
measured first and last; the difference of the two is the noise. PEFT appears twice, because its
default keeps adapters in float32, and much of any gain over that is the type and not the kernel.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu_suite.correctness import paths
from benchmarks.gpu_suite.timing import median_ms, peak_mib
from benchmarks.saved import saved_bytes
from rellax_ds import ops
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_suite.suite import Section

DROPOUT, SCALING = 0.05, 2.0


@dataclass(frozen=True)
class Shape:
    """Width, tokens, samples and rank of a square layer."""

    width: int
    tokens: int
    samples: int
    rank: int


GPU_SHAPES = (
    Shape(4096, 8192, 16, 16),
    Shape(4096, 2048, 4, 16),
    Shape(5120, 8192, 16, 8),
    Shape(8192, 8192, 16, 16),
    Shape(4096, 8192, 16, 64),
)
CPU_SHAPES = (Shape(64, 32, 4, 8),)


@dataclass
class Arm:
    """A layer to time: `call` maps x [T, d] to y; `trained` are tensors with gradients but x."""

    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    trained: dict[str, torch.Tensor]
    parameters: list[torch.Tensor]


class Layer:
    """The frozen linear and the factors all arms share; the same numbers whatever the type."""

    def __init__(
        self,
        shape: Shape,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        dropout: float = DROPOUT,
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.dtype, self.dropout = shape, device, dtype, dropout
        self.base = nn.Linear(shape.width, shape.width, bias=False, device=device)
        self.base.to(dtype).requires_grad_(False)
        self.A = torch.randn(shape.rank, shape.width, device=device) / shape.width**0.5
        self.B = torch.randn(shape.width, shape.rank, device=device)
        self.gates = torch.randn(shape.samples, shape.rank, shape.rank, device=device)
        self.gates.requires_grad_()
        size = (shape.tokens, shape.width)
        self.x = torch.randn(size, device=device).to(dtype).requires_grad_()
        self.upstream = torch.randn(size, device=device).to(dtype)
        self.rows = Rows.padded(shape.samples, shape.tokens // shape.samples)

    def arms(self) -> Iterator[Arm]:
        """All arms, the bare linear at both ends; made one at a time to save memory."""
        yield self.bare("bare linear")
        yield self.peft("PEFT, default (fp32 adapters)", torch.float32)
        yield self.peft("PEFT, bf16 adapters", torch.bfloat16)
        yield self.peft("PEFT, bf16 adapters, compiled", torch.bfloat16, compiled=True)
        yield self.eager()
        for path in paths(self.device):
            yield self.ours(f"CFLoRA {path}", path)
            yield self.ours(f"CFLoRA {path}, M = I", path, gated=False)
            yield self.ours(f"CFLoRA {path}, gate-only", path, trains_factors=False)
        yield self.bare("bare linear again")

    def bare(self, name: str) -> Arm:
        """The frozen linear alone."""
        return Arm(name, self.base, {}, [self.base.weight])

    def peft(self, name: str, dtype: torch.dtype, compiled: bool = False) -> Arm:
        """PEFT's layer with our factors."""
        config = peft.LoraConfig(r=self.shape.rank, lora_alpha=1, lora_dropout=self.dropout)
        layer = LoraLinear(
            self.base,
            "default",
            config=config,
            r=self.shape.rank,
            lora_alpha=int(SCALING * self.shape.rank),
        ).to(self.device)
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
        trained = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        with torch.no_grad():
            trained["A"].copy_(self.A)
            trained["B"].copy_(self.B)
        backend = "inductor" if self.device == "cuda" else "aot_eager"  # no compiler to wait for
        call = torch.compile(layer, backend=backend) if compiled else layer
        return Arm(name, call, trained, [*layer.parameters()])

    def eager(self) -> Arm:
        """CFLoRA as the formula reads, in the type of x."""
        A, B = self._factors(True)
        shape = (self.shape.samples, -1, self.shape.rank)

        def call(x: torch.Tensor) -> torch.Tensor:
            hidden = F.linear(F.dropout(x, self.dropout, training=True), A.to(x.dtype))
            gated = torch.bmm(hidden.view(shape), self.gates.to(x.dtype)).flatten(0, 1)
            return self.base(x) + F.linear(gated, B.to(x.dtype)) * SCALING

        return Arm(
            "CFLoRA eager",
            call,
            {"A": A, "B": B, "gates": self.gates},
            [self.base.weight, A, B],
        )

    def ours(self, name: str, path: str, gated: bool = True, trains_factors: bool = True) -> Arm:
        """The operator on one path."""
        A, B = self._factors(trains_factors)
        gates = self.gates if gated else None
        factors = [ops.Factors(A, B, gates, SCALING)]

        def call(x: torch.Tensor) -> torch.Tensor:
            (y,) = ops.cflora(
                x, [self.base], factors, self.rows, dropout_p=self.dropout, training=True, path=path
            )
            return y

        trained = {"A": A, "B": B} if trains_factors else {}
        if gated:
            trained["gates"] = self.gates
        return Arm(name, call, trained, [self.base.weight, A, B])

    def _factors(self, trained: bool) -> list[torch.Tensor]:
        return [f.to(self.dtype).detach().clone().requires_grad_(trained) for f in (self.A, self.B)]


def measure(section: Section, device: str) -> None:
    """Time every arm at every shape; an arm that fails is recorded and left out."""
    for shape in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        layer = Layer(shape, device)
        table = section.table(
            f"bf16, d {shape.width}, {shape.tokens} tokens, {shape.samples} samples, rank "
            f"{shape.rank}, dropout {DROPOUT}; milliseconds, backward = full - forward, ratio "
            "of full to the bare linear.",
            ["arm", "forward", "backward", "full", "/ bare", "saved MiB", "peak MiB"],
        )
        bare = 0.0
        for arm in layer.arms():
            with section.part(f"{arm.name} at {shape}"):
                row = timed(arm, layer)
                bare = bare or row[2]
                table.rows.append([arm.name, *row[:3], row[2] / bare, *row[3:]])
        del layer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def timed(arm: Arm, layer: Layer) -> tuple[float, float, float, float, float | None]:
    """Milliseconds of forward, of backward as the rest of both, and of both; MiB saved for backward
    and at the peak.
    """
    x, wanted = layer.x, [layer.x, *arm.trained.values()]

    def full() -> None:
        torch.autograd.grad(arm.call(x), wanted, layer.upstream)

    full()
    forward, both = (median_ms(run, layer.device) for run in (lambda: arm.call(x), full))
    saved = saved_bytes(lambda: arm.call(x), arm.parameters) / 2**20
    return forward, both - forward, both, saved, peak_mib(full, layer.device)
