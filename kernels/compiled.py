"""The low-rank term as one opaque operator for `torch.compile`.

Under a compiler the frozen layer belongs to the graph and only what the compiler cannot see
through, the gated low-rank term with its positional dropout, is an operator of ours: it breaks no
graph, and its mask is not the compiler's to redraw. Rows travel as a tensor, so a new packing does
not compile anew.

Legend: T rows, S samples, r rank, as in `kernels.function`.
"""

from __future__ import annotations

from typing import Any

import torch

from rellax_ds.kernels.composable import arithmetic
from rellax_ds.kernels.function import accumulation
from rellax_ds.kernels.philox import Dropout
from rellax_ds.kernels.rows import Rows

Layout = tuple[torch.Tensor, int, int]
"""Rows as an operator takes them: the run table int64 [n, 3] on the CPU, S, and L of a padded batch
or -1."""


def layout_of(rows: Rows | None, x: torch.Tensor) -> Layout:
    """Rows in a form a graph can hold; None is a padded batch [S, L, d] or one sample."""
    if rows is not None:
        return rows.table, rows.samples, -1
    samples = x.shape[0] if x.dim() == 3 else 1
    length = x.shape[1] if x.dim() == 3 else x.numel() // x.shape[-1]
    return torch.empty(0, 3, dtype=torch.int64), samples, length


def update(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    G: torch.Tensor | None,
    seed: torch.Tensor,
    layout: Layout,
    scaling: float,
    threshold: int,
    stream: int,
) -> torch.Tensor:
    """y + s (dropout(x) A^T) G B^T for y [T, d_out] and x [T, d_in]; threshold 0 is no dropout."""
    wide = accumulation(x.dtype)
    gates = None if G is None else G.to(wide)
    table, samples, length = layout
    out: torch.Tensor = _forward(
        y,
        x,
        A.to(x.dtype),
        B.to(x.dtype),
        gates,
        seed,
        table,
        samples,
        length,
        scaling,
        threshold,
        stream,
    )[0]
    return out


@torch.library.custom_op("rellax_ds::cflora", mutates_args=())
def _forward(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    G: torch.Tensor | None,
    seed: torch.Tensor,
    table: torch.Tensor,
    samples: int,
    length: int,
    scaling: float,
    threshold: int,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    path, rows = arithmetic(x.device.type), _rows(table, samples, length)
    dropout = Dropout(seed, threshold, (stream,)) if threshold else None
    (H,), (S,), _ = path.down(x, (A,), (G,), rows, (scaling,), dropout, False)
    out = y.clone()
    path.add((out,), (S,), (B,))
    return out, H, S


@_forward.register_fake
def _(y, x, A, B, G, seed, table, samples, length, scaling, threshold, stream):  # type: ignore[no-untyped-def]
    rank = x.new_empty(x.shape[0], A.shape[0])
    return torch.empty_like(y), rank, torch.empty_like(rank)


@torch.library.custom_op("rellax_ds::cflora_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    H: torch.Tensor,
    S: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    G: torch.Tensor | None,
    seed: torch.Tensor,
    table: torch.Tensor,
    samples: int,
    length: int,
    scaling: float,
    threshold: int,
    stream: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    need_x, need_A, need_B, need_G = needs
    path, rows = arithmetic(dy.device.type), _rows(table, samples, length)
    dropout = Dropout(seed, threshold, (stream,)) if threshold else None
    need_dH = need_x or need_A
    dS: Any
    dH: Any
    (dS,), (dB,) = path.grad_up((dy,), (B,), (S if need_B else None,), need_dH or need_G)
    dx = dA = dG = None
    if need_dH or need_G:
        kept = H if need_G else None
        (dH,), (dG,) = path.grad_gate((dS,), (kept,), (G,), rows, (scaling,), need_dH)
    if need_dH:
        dx, (dA,) = path.grad_down((dy,), None, (dH,), (A,), x, dropout, (), need_x, (need_A,))
    return tuple(dy.new_empty(0) if g is None else g for g in (dx, dA, dB, dG))  # type: ignore[return-value]


@_backward.register_fake
def _(dy, x, H, S, A, B, G, seed, table, samples, length, scaling, threshold, stream, needs):  # type: ignore[no-untyped-def]
    shapes = ((dy.shape[0], A.shape[1]), A.shape, B.shape, None if G is None else G.shape)
    like = (dy, A, B, dy if G is None else G)
    return tuple(
        t.new_empty(shape if need and shape is not None else 0)
        for t, shape, need in zip(like, shapes, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, x, A, B, G, seed, table, *ctx.settings = inputs
    ctx.needs = list(ctx.needs_input_grad[1:5])
    _, H, S = output
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x if ctx.needs[1] else None, H, S, A, B, G, seed, table)


def _gradients(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    x, H, S, A, B, G, seed, table = ctx.saved_tensors
    found = _backward(dy, x, H, S, A, B, G, seed, table, *ctx.settings, ctx.needs)
    kept = (g if need else None for g, need in zip(found, ctx.needs, strict=True))
    return (dy, *kept, None, None, *(None for _ in ctx.settings))


_forward.register_autograd(_gradients, setup_context=_save)


def _rows(table: torch.Tensor, samples: int, length: int) -> Rows:
    if length >= 0:
        return Rows.padded(samples, length)
    return Rows([tuple(run) for run in table.tolist()], samples)
