"""Inputs of the operator and its fp64 oracle, shared by the tests of every path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rellax_ds.kernels.philox import Dropout, threshold_of
from rellax_ds.kernels.rows import Rows
from rellax_ds.ops import Dense, Factors, cflora

NAMES = ("x", "A", "B", "gates")
PADDED = Rows.padded(3, 7)
RAGGED = Rows.from_lengths([1, 63, 64, 65, 0, 128, 129])
TWO_RUNS = Rows.from_ids(torch.tensor([-1, 0, 0, 2, 2, 2, -1, -1, 0, 3, 3, -1]), samples=5)


@dataclass
class Case:
    """One call: tensors by name for each module, all in float64."""

    rows: Rows
    x: torch.Tensor
    modules: list[dict[str, torch.Tensor]]
    p: float
    seed: int

    def run(self, path: str, dtype: torch.dtype, needs: tuple[str, ...] = NAMES, **options):
        """Outputs, and gradients by name, of one path in one type."""
        x = self.x.to(dtype).requires_grad_("x" in needs)
        bases, factors, wanted = [], [], [("x", x)] if "x" in needs else []
        for m, tensors in enumerate(self.modules):
            made = {k: t.to(dtype) for k, t in tensors.items()}
            for name in NAMES[1:]:
                if name in made and name in needs:
                    made[name].requires_grad_()
                    wanted.append((f"{name}{m}", made[name]))
            bases.append(Dense(made["weight"], made.get("bias")))
            factors.append(Factors(made["A"], made["B"], made.get("gates"), 1.7 + m))
        ys = cflora(
            x,
            bases,
            factors,
            self.rows,
            dropout_p=self.p,
            training=True,
            seed=torch.tensor([self.seed]),
            path=path,
            **options,
        )
        weights = [torch.cos(torch.arange(y.numel(), dtype=dtype)).view(y.shape) for y in ys]
        if not wanted:
            return ys, {}
        total = sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
        gradients = torch.autograd.grad(total, [t for _, t in wanted])
        return ys, dict(zip((n for n, _ in wanted), gradients, strict=True))


def case(
    rows: Rows,
    d_in: int = 31,
    d_outs: tuple[int, ...] = (33,),
    ranks: tuple[int, ...] = (5,),
    p: float = 0.0,
    gated: bool = True,
    bias: bool = True,
    seed: int = (1 << 40) + 3,
) -> Case:
    """A made-up call with random inputs."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    modules = []
    for d_out, rank in zip(d_outs, ranks, strict=True):
        tensors = {"weight": randn(d_out, d_in) / d_in**0.5, "A": randn(rank, d_in) / d_in**0.5}
        tensors["B"] = randn(d_out, rank)
        if bias:
            tensors["bias"] = randn(d_out)
        if gated:
            tensors["gates"] = randn(rows.samples, rank, rank)
        modules.append(tensors)
    return Case(rows, randn(rows.tokens, d_in), modules, p, seed)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative root mean square error."""
    scale = exact.detach().double().norm().clamp_min(1e-30)
    return float((ours.detach().double() - exact.detach().double()).norm() / scale)


def assert_close(made: Case, path: str, dtype: torch.dtype, needs=NAMES, **options) -> None:
    """Value and every gradient of a path against the oracle: its error is at most twice that of
    the same formula in the same type, plus a few units of rounding.
    """
    exact_ys, exact = made.run("reference", torch.float64, needs, **options)
    eager_ys, eager = made.run("reference", dtype, needs, **options)
    ys, gradients = made.run(path, dtype, needs, **options)
    floor = 4 * torch.finfo(dtype).eps
    for m, y in enumerate(ys):
        assert y.dtype == dtype
        assert error(y, exact_ys[m]) <= 2 * error(eager_ys[m], exact_ys[m]) + floor, f"y{m}"
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        limit = 2 * error(eager[name], exact[name]) + floor
        assert error(gradient, exact[name]) <= limit, name


def dropout(p: float, seed: int, streams: tuple[int, ...] = (0,)) -> Dropout:
    """The dropout object of a call."""
    return Dropout(torch.tensor([seed]), threshold_of(p), streams)
