"""The CFLoRA operator as one autograd function, and the five steps a compute path must provide.

The function owns what is the same for every path: which gradients are wanted, what is saved for
them, and in which type they are returned. A path owns the arithmetic. Its methods carry the ids of
the kernels that do the same work on a GPU (F1, F2, B1 to B4).

Legend: T token rows, S samples, d_in and d_out layer widths, r rank, s = alpha / r, G [S, r, r]
gates in the row convention S_t = s H_t G. Everything that exists once per module is a tuple: a
stacked call serves several modules that share x.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from rellax_ds.kernels.philox import Dropout

if TYPE_CHECKING:
    from rellax_ds.kernels.rows import Rows

Tensors = tuple[torch.Tensor, ...]
Optionals = tuple[torch.Tensor | None, ...]

PER_MODULE = 5
"""Tensors of one module in the argument list: weight or output, bias, A, B, G."""


class Path(ABC):
    """Arithmetic of the operator; stateless, so one object serves all layers.

    Factors arrive in the type of x, gates and gradients of rank-r tensors in `accumulation` type.
    No method may change an argument, except `add`. Outputs are fresh tensors.
    """

    name: str

    stores_mask = False
    """Whether `down` may return the mask for the backward pass instead of drawing it again."""

    @abstractmethod
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
        """F1: H = dropout(x) A^T and S = s H G, both [T, r] in the type of x.

        Without a gate S = s H; rows of no sample get S = 0 whether or not there is a gate.

        Returns:
            H and S of every module, and the mask in this path's own form, or () to draw it again.
        """

    @abstractmethod
    def up(
        self, x: torch.Tensor, weights: Tensors, biases: Optionals, S: Tensors, B: Tensors
    ) -> Tensors:
        """F2: y = x W^T + bias + S B^T, [T, d_out]."""

    @abstractmethod
    def add(self, ys: Tensors, S: Tensors, B: Tensors) -> None:
        """Add S B^T in place to base outputs y [T, d_out]."""

    @abstractmethod
    def grad_up(
        self, dys: Tensors, B: Tensors, S: Optionals, need_dS: bool
    ) -> tuple[Optionals, Optionals]:
        """B1: dS = dy B [T, r] if wanted, and dB = dy^T S [d_out, r] where S is given."""

    @abstractmethod
    def grad_gate(
        self,
        dS: Tensors,
        H: Optionals,
        G: Optionals,
        rows: Rows,
        scalings: tuple[float, ...],
        need_dH: bool,
    ) -> tuple[Optionals, Optionals]:
        """B2: dH = s dS G^T [T, r] if wanted, and dG = s sum_t H_t^T dS_t where H is given.

        dG is exactly zero, never None, for a sample without rows.
        """

    @abstractmethod
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
        """B3 and B4: dx = sum of dy W (with `weights`) and mask * (dH A), and dA = dH^T x_hat."""


@dataclass(frozen=True)
class Call:
    """What one call of the operator is, besides its tensors.

    Attributes:
        path: Who computes.
        rows: Owner of each row of x.
        scalings: s of each module.
        dropout: Dropout on the input of A, or None.
        dense: Whether modules bring weights; otherwise outputs of their base layers.
    """

    path: Path
    rows: Rows
    scalings: tuple[float, ...]
    dropout: Dropout | None
    dense: bool


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of r x r products: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class CFLora(torch.autograd.Function):
    """y = W x + s B M(h) A x for modules sharing x.

    Arguments are a `Call`, x [T, d_in], then per module its weight [d_out, d_in] or base output
    [T, d_out], its bias or None, A, B, and G or None.

    Base outputs are changed in place. Weights and biases get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor, *tensors: torch.Tensor | None) -> Tensors:
        """Outputs of all modules, each [T, d_out]."""
        bases, biases, As, Bs, Gs = split(tensors)
        need_x, *needs = ctx.needs_input_grad[1:]
        _, _, need_A, need_B, need_G = split(tuple(needs))
        has_gradient = any(need_A) or any(need_B) or any(need_G) or need_x
        keep_mask = has_gradient and any(need_A) and call.path.stores_mask
        with _in_own_types(x.device.type):
            A, B, G = _typed(x, As, Bs, Gs)
            H, S, mask = call.path.down(x, A, G, call.rows, call.scalings, call.dropout, keep_mask)
            if call.dense:
                outputs = call.path.up(x, bases, biases, S, B)
            else:
                call.path.add(bases, S, B)
                ctx.mark_dirty(*bases)
                outputs = bases
        ctx.call, ctx.need_x = call, need_x
        ctx.needs = (need_A, need_G)
        ctx.x_type = x.dtype
        ctx.device = x.device.type
        saved: list[torch.Tensor | None] = [x if any(need_A) else None]
        saved += [h if need else None for h, need in zip(H, need_G, strict=True)]
        saved += [s if need else None for s, need in zip(S, need_B, strict=True)]
        saved += bases if call.dense and need_x else [None] * len(bases)
        saved += [*As, *Bs, *Gs, *mask]
        if has_gradient:
            ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A, B and G, and dy itself for base outputs."""
        call: Call = ctx.call
        n = len(dys)
        x, *rest = ctx.saved_tensors
        H, S, weights, As, Bs, Gs = (tuple(rest[i * n : (i + 1) * n]) for i in range(6))
        mask = tuple(rest[6 * n :])
        need_A, need_G = ctx.needs
        need_dH = ctx.need_x or any(need_A)
        dS: Any
        dH: Any
        dG: Optionals = (None,) * n
        dA: Optionals = (None,) * n
        dx = None
        with _in_own_types(ctx.device):
            A, B, G = _typed(dys[0].new_empty(0, dtype=ctx.x_type), As, Bs, Gs)
            grads = tuple(dy.to(ctx.x_type) for dy in dys)
            dS, dB = call.path.grad_up(grads, B, S, need_dH or any(need_G))
            if need_dH or any(need_G):
                dH, dG = call.path.grad_gate(dS, H, G, call.rows, call.scalings, need_dH)
            if need_dH:
                dense = weights if call.dense and ctx.need_x else None
                dx, dA = call.path.grad_down(
                    grads, dense, dH, A, x, call.dropout, mask, ctx.need_x, need_A
                )
        per_module = []
        for m in range(n):
            per_module += [
                None if call.dense else dys[m],
                None,
                _cast(dA[m], As[m]),
                _cast(dB[m], Bs[m]),
                _cast(dG[m] if need_G[m] else None, Gs[m]),
            ]
        return (None, dx, *per_module)


def split(tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Columns of the flat argument list: bases, biases, As, Bs, Gs."""
    return tuple(tuple(tensors[i::PER_MODULE]) for i in range(PER_MODULE))


def _typed(
    x: torch.Tensor, As: Tensors, Bs: Tensors, Gs: Optionals
) -> tuple[Tensors, Tensors, Optionals]:
    """Factors in the type of x, gates in its accumulation type."""
    wide = accumulation(x.dtype)
    return (
        tuple(a.to(x.dtype) for a in As),
        tuple(b.to(x.dtype) for b in Bs),
        tuple(None if g is None else g.to(wide) for g in Gs),
    )


def _in_own_types(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Context without autocast, which would change the types chosen here; free where it is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _cast(gradient: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
