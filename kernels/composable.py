"""The operator in plain torch algebra on any device and type: re-bracketed, nothing of size
[T, d] made twice.

It asks for nothing but matrix products, so it serves whatever the special paths do not: bases that
must be called normally, unknown devices, float64. A dropout mask is drawn again in the backward
pass.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import torch

from rellax_ds.kernels.function import Optionals, Path, Tensors, accumulation
from rellax_ds.kernels.philox import Dropout, keep_mask

if TYPE_CHECKING:
    from rellax_ds.kernels.rows import Rows


@functools.cache
def arithmetic(device_type: str) -> Path:
    """The best arithmetic for low-rank terms beside a base that is called normally."""
    if device_type == "cpu":
        return _load("rellax_ds.kernels.cpu", "CpuPath") or ComposablePath()
    if device_type == "cuda":
        return _load("rellax_ds.kernels.launch", "CublasPath") or ComposablePath()
    return ComposablePath()


def _load(module: str, name: str) -> Path | None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    usable = not getattr(found, "unavailable", str)()
    return getattr(found, name)() if usable else None


class ComposablePath(Path):
    """Matrix products of torch; see `Path` for what each method computes."""

    name = "composable"

    def down(
        self,
        x: torch.Tensor,
        A: Tensors,
        G: Optionals,
        rows: Rows,
        scalings: tuple[float, ...],
        dropout: Dropout | None,
        keep_mask: bool,
    ) -> tuple[Tensors, Tensors, Tensors]:
        """F1."""
        H = tuple(_project(x, a, dropout, m) for m, a in enumerate(A))
        S = tuple(
            gate_rows(h, g, rows, s).to(x.dtype) for h, g, s in zip(H, G, scalings, strict=True)
        )
        return H, S, ()

    def up(
        self, x: torch.Tensor, weights: Tensors, biases: Optionals, S: Tensors, B: Tensors
    ) -> Tensors:
        """F2."""
        ys = tuple(
            torch.nn.functional.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)
        )
        self.add(ys, S, B)
        return ys

    def add(self, ys: Tensors, S: Tensors, B: Tensors) -> None:
        """Add S B^T in place."""
        for y, s, b in zip(ys, S, B, strict=True):
            y.addmm_(s.to(y.dtype), b.t().to(y.dtype))

    def grad_up(
        self, dys: Tensors, B: Tensors, S: Optionals, need_dS: bool
    ) -> tuple[Optionals, Optionals]:
        """B1."""
        dS = tuple(dy @ columns(b) if need_dS else None for dy, b in zip(dys, B, strict=True))
        dB = tuple(None if s is None else (s.t() @ dy).t() for dy, s in zip(dys, S, strict=True))
        return dS, dB

    def grad_gate(
        self,
        dS: Tensors,
        H: Optionals,
        G: Optionals,
        rows: Rows,
        scalings: tuple[float, ...],
        need_dH: bool,
    ) -> tuple[Optionals, Optionals]:
        """B2."""
        dH: list[torch.Tensor | None] = []
        dG: list[torch.Tensor | None] = []
        for ds, h, g, s in zip(dS, H, G, scalings, strict=True):
            transposed = None if g is None else g.transpose(1, 2)
            dH.append(gate_rows(ds, transposed, rows, s).to(ds.dtype) if need_dH else None)
            dG.append(None if h is None else gate_gradient(h, ds, rows, s))
        return tuple(dH), tuple(dG)

    def grad_down(
        self,
        dys: Tensors,
        weights: Tensors | None,
        dH: Tensors,
        A: Tensors,
        x: torch.Tensor | None,
        dropout: Dropout | None,
        mask: Tensors,
        need_dx: bool,
        need_dA: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, Optionals]:
        """B3 and B4."""
        dx: torch.Tensor | None = None
        dA: list[torch.Tensor | None] = []
        for m, (dh, a) in enumerate(zip(dH, A, strict=True)):
            keep = None
            if dropout is not None:
                dh = dh * dropout.scale
                keep = _mask(dh.shape[0], a.shape[1], dropout, m)
            if need_dx:
                if weights is not None:
                    dx = dys[m] @ weights[m] if dx is None else dx.addmm_(dys[m], weights[m])
                if keep is None:
                    dx = dh @ a if dx is None else dx.addmm_(dh, a)
                else:
                    term = (dh @ a).mul_(keep)
                    dx = term if dx is None else dx.add_(term)
            if need_dA[m]:
                assert x is not None
                dA.append(dh.t() @ (x if keep is None else x * keep))
            else:
                dA.append(None)
        return dx, tuple(dA)


def columns(B: torch.Tensor) -> torch.Tensor:
    """B with contiguous columns: a skinny product with it is then several times faster on a
    CPU.
    """
    return B.t().contiguous().t()


def gate_rows(H: torch.Tensor, G: torch.Tensor | None, rows: Rows, scaling: float) -> torch.Tensor:
    """s H_t G_b(t) [T, r] in accumulation type; 0 for rows of no sample; s H where G is None."""
    wide = H.to(accumulation(H.dtype))
    if rows.uniform_length:
        if G is None:
            return wide * scaling
        shaped = wide.view(rows.samples, rows.uniform_length, -1)
        return torch.bmm(shaped, G).flatten(0, 1).mul_(scaling)
    out = torch.zeros_like(wide)
    for first, count, sample in rows.runs:
        if sample >= 0:
            part = wide[first : first + count]
            out[first : first + count] = part if G is None else part @ G[sample]
    return out.mul_(scaling)


def gate_gradient(H: torch.Tensor, dS: torch.Tensor, rows: Rows, scaling: float) -> torch.Tensor:
    """dG = s sum over a sample's rows of H_t^T dS_t, [S, r, r] in accumulation type."""
    wide = accumulation(H.dtype)
    H, dS = H.to(wide), dS.to(wide)
    if rows.uniform_length:
        shape = (rows.samples, rows.uniform_length, -1)
        return torch.bmm(H.view(shape).transpose(1, 2), dS.view(shape)).mul_(scaling)
    dG = H.new_zeros(rows.samples, H.shape[1], dS.shape[1])
    for first, count, sample in rows.runs:
        if sample >= 0:
            dG[sample].addmm_(H[first : first + count].t(), dS[first : first + count])
    return dG.mul_(scaling)


def _project(
    x: torch.Tensor, A: torch.Tensor, dropout: Dropout | None, module: int
) -> torch.Tensor:
    if dropout is None:
        return x @ A.t()
    return (x * _mask(x.shape[0], x.shape[1], dropout, module)) @ (A.t() * dropout.scale)


def _mask(rows: int, columns: int, dropout: Dropout, module: int) -> torch.Tensor:
    return keep_mask(
        int(dropout.seed),
        rows,
        columns,
        dropout.threshold,
        dropout.streams[module],
        dropout.seed.device,
    )
