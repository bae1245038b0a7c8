"""Every compute path against the oracle in float64 on odd shapes: value and all gradients.

The bound is relative: a path may be off by twice what the plain formula is off by in the same type,
plus a few units of rounding. Dropout masks are a function of the seed, so they are the same on all
sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rellax_ds import ops
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from benchmarks.gpu_suite.suite import Section

Tensors = dict[str, torch.Tensor]
TYPES = (torch.bfloat16, torch.float16, torch.float32)
DROPOUTS = (0.0, 0.05)


@dataclass(frozen=True)
class Shape:
    """Lengths of the samples, widths and rank of one case."""

    lengths: tuple[int, ...]
    d_in: int
    d_out: int
    rank: int


RAGGED = (1, 63, 64, 65, 0, 128, 129)
GPU_SHAPES = (
    Shape(RAGGED, 123, 97, 5),
    Shape(RAGGED, 2049, 1023, 16),
    Shape((512, 512), 4096, 4096, 8),
    Shape((300, 7, 1000), 1024, 4097, 64),
)
CPU_SHAPES = (Shape((1, 7, 0, 9), 31, 33, 5), Shape((8, 8), 64, 48, 16))


def paths(device: str) -> tuple[str, ...]:
    """Compute paths to judge besides the oracle: on a GPU all that belong there, and one that is
    missing fails; on a CPU those that exist.
    """
    if device == "cuda":
        return ("composable", "cublas", "triton")
    return tuple(path for path in ("composable", "cpu") if path in ops.available())


def check(section: Section, device: str) -> None:
    """Compare all paths; worst error of each path and type over shapes and dropout rates."""
    table = section.table(
        "Relative RMS error against float64, worst over shapes, dropout 0 and 0.05, and tensors; "
        "`eager`: the plain formula in the same type at that place.",
        ["path", "type", "tensor", "error", "eager", "checked"],
    )
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    for path in paths(device):
        for dtype in TYPES:
            with section.part(f"{path} in {dtype}"):
                found = [
                    (name, ours, eager, shape, p)
                    for shape in shapes
                    for p in DROPOUTS
                    for name, ours, eager in errors(shape, p, path, dtype, device)
                ]
                for name, ours, eager, shape, p in found:
                    limit = 2 * eager + 4 * torch.finfo(dtype).eps
                    if not ours <= limit:  # also where it is not a number
                        section.failures.append(
                            f"{path} in {dtype}: {name} is off by {ours:.2e}, the plain formula by "
                            f"{eager:.2e}, at {shape} and dropout {p}"
                        )
                worst = max(found, key=lambda each: each[1])
                table.rows.append([path, str(dtype), *worst[:3], len(found)])


def errors(
    shape: Shape, p: float, path: str, dtype: torch.dtype, device: str
) -> list[tuple[str, float, float]]:
    """Name, error of the path, and error of the plain formula, of the value and each gradient."""
    made = tensors(shape, device)
    rows = Rows.from_lengths(shape.lengths)
    exact = run(made, rows, p, "reference", torch.float64)
    eager = run(made, rows, p, "reference", dtype)
    ours = run(made, rows, p, path, dtype)
    return [
        (name, relative(ours[name], exact[name]), relative(eager[name], exact[name]))
        for name in exact
    ]


def tensors(shape: Shape, device: str) -> Tensors:
    """Random inputs in float64; the upstream gradient is among them."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(shape.lengths)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(size, generator=generator, device=device, dtype=torch.float64)
        return made * scale

    return {
        "x": draw(tokens, shape.d_in),
        "weight": draw(shape.d_out, shape.d_in, scale=shape.d_in**-0.5),
        "bias": draw(shape.d_out),
        "A": draw(shape.rank, shape.d_in, scale=shape.d_in**-0.5),
        "B": draw(shape.d_out, shape.rank),
        "gates": draw(len(shape.lengths), shape.rank, shape.rank),
        "upstream": draw(tokens, shape.d_out),
    }


def run(made: Tensors, rows: Rows, p: float, path: str, dtype: torch.dtype) -> Tensors:
    """Output and gradients of x, A, B and the gates by one path in one type."""
    given = {name: tensor.to(dtype) for name, tensor in made.items()}
    wanted = {name: given[name].requires_grad_() for name in ("x", "A", "B", "gates")}
    (y,) = ops.cflora(
        given["x"],
        [ops.Dense(given["weight"], given["bias"])],
        [ops.Factors(given["A"], given["B"], given["gates"], 2.0)],
        rows,
        dropout_p=p,
        training=True,
        seed=torch.full((1,), (1 << 40) + 3, dtype=torch.int64, device=given["x"].device),
        path=path,
    )
    gradients = torch.autograd.grad(y, list(wanted.values()), given["upstream"])
    named = {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {"y": y.detach(), **named}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative root mean square error."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())
