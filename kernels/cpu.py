"""The operator on a CPU: matrix products of torch, and dropout without a dropped copy of x.

Plain LoRA loses more time to dropout on a CPU than to its products: the mask is drawn element by
element, written, read, and a dropped copy of x is written and read. Here rows are taken in blocks
that stay in cache; a compiled generator draws the mask while it multiplies, and draws the same one
again in the backward pass, so nothing of size [T, d] is stored or made besides the outputs. Small
ranks, in the types a CPU computes, go row by row through `fused_cpu`. Without dropout the
re-bracketed products of the composable path are already the shortest way. Where torch has several
threads, compiled loops take as many, each a share of the rows.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from rellax_ds.kernels import fused_cpu, philox_cpu
from rellax_ds.kernels.composable import ComposablePath, gate_rows
from rellax_ds.kernels.function import Optionals, Tensors, accumulation
from rellax_ds.kernels.philox import Dropout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rellax_ds.kernels.rows import Rows

_BLOCK_ELEMENTS = 1 << 17
"""Of a thread's share of a block, which stays in its cache."""

_MIN_ROWS = 16
_SHARED_ELEMENTS = 1 << 15
"""A thread is not called for less than this."""

Draw = tuple[np.uint64, int, int, int]
"""Seed, first row, threshold and stream of the generator."""


class CpuPath(ComposablePath):
    """Blocked, compiled dropout around torch's products; see `Path` for what each method computes.

    Products with few columns are made as [r, d] [d, T], which BLAS does faster than [T, d] [d, r].
    Masks do not depend on the number of threads; sums over rows may, as those of torch do.
    """

    name = "cpu"

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
        if dropout is None:
            return super().down(x, A, G, rows, scalings, dropout, keep_mask)
        x = x.contiguous()
        if _fused(x, A):
            H = tuple(_fused_down(x, a, dropout, m) for m, a in enumerate(A))
            return (
                H,
                tuple(gate_rows(h, g, rows, s) for h, g, s in zip(H, G, scalings, strict=True)),
                (),
            )
        wide = accumulation(x.dtype)
        scaled = [a.to(wide) * dropout.scale for a in A]
        turned = [x.new_empty(a.shape[0], x.shape[0], dtype=wide) for a in A]
        tile = x.new_empty(_block_rows(x), x.shape[1], dtype=wide)
        for first, block in _blocks(x):
            values, dropped = block.to(wide), tile[: block.shape[0]]
            for stream, modules in _by_stream(dropout).items():
                _share(philox_cpu.drop, (values, dropped), _draw(dropout, first, stream))
                for m in modules:
                    part = slice(first, first + block.shape[0])
                    torch.mm(scaled[m], dropped.t(), out=turned[m][:, part])
        H = tuple(h.t().contiguous() for h in turned)
        narrow = tuple(h.to(x.dtype) for h in H)
        S = tuple(
            gate_rows(h, g, rows, s).to(x.dtype) for h, g, s in zip(H, G, scalings, strict=True)
        )
        return narrow, S, ()

    def grad_up(
        self, dys: Tensors, B: Tensors, S: Optionals, need_dS: bool
    ) -> tuple[Optionals, Optionals]:
        """B1, with both products of a block of dy while it is in cache."""
        if not need_dS or any(s is None for s in S):
            return super().grad_up(dys, B, S, need_dS)
        if all(_fused(dy, (b.t(),)) for dy, b in zip(dys, B, strict=True)):
            found = [_fused_grad_up(dy, b, s) for dy, b, s in zip(dys, B, S, strict=True)]
            return tuple(dS for dS, _ in found), tuple(dB for _, dB in found)
        dS, dB = [], []
        for dy, b, s in zip(dys, B, S, strict=True):
            wide = accumulation(dy.dtype)
            up, left = b.to(wide).t().contiguous(), s.to(wide).t()
            turned = dy.new_empty(b.shape[1], dy.shape[0], dtype=wide)
            total = dy.new_zeros(b.shape[1], b.shape[0], dtype=wide)
            for first, block in _blocks(dy):
                part = slice(first, first + block.shape[0])
                values = block.to(wide)
                torch.mm(up, values.t(), out=turned[:, part])
                total.addmm_(left[:, part], values)
            dS.append(turned.t().contiguous().to(dy.dtype))
            dB.append(total.t())
        return tuple(dS), tuple(dB)

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
        """B3 and B4, in one walk over the rows."""
        if dropout is None:
            return super().grad_down(dys, weights, dH, A, x, dropout, mask, need_dx, need_dA)
        dx = _base_gradient(dys, weights, dH[0], A[0].shape[1]) if need_dx else None
        x = None if x is None else x.contiguous()
        if _fused(dH[0], A) and (x is None or x.dtype == dH[0].dtype):
            return dx, tuple(
                _fused_grad_down(x if need else None, dh, a, dx, dropout, m)
                for m, (dh, a, need) in enumerate(zip(dH, A, need_dA, strict=True))
            )
        wide = accumulation(dH[0].dtype)
        down = [a.to(wide) for a in A]
        scaled = [dh.to(wide) * dropout.scale for dh in dH]
        dA = [torch.zeros_like(a) if need else None for a, need in zip(down, need_dA, strict=True)]
        like = dx if x is None else x
        assert like is not None
        tiles = like.new_empty(2, _block_rows(like), like.shape[1], dtype=wide)
        for first, block in _blocks(like):
            part = slice(first, first + block.shape[0])
            kept, term_tile = tiles[:, : block.shape[0]]
            for stream, modules in _by_stream(dropout).items():
                draw = _draw(dropout, first, stream)
                term = None
                if need_dx:
                    term = _sum_of_products(scaled, down, modules, part, term_tile)
                _walk(None if x is None else block, kept, term, dx, part, draw)
                for m in modules:
                    if dA[m] is not None:
                        dA[m].addmm_(scaled[m][part].t(), kept)
        return dx, tuple(dA)


def _fused(like: torch.Tensor, factors: Tensors) -> bool:
    """Whether the loops over rows serve: small ranks [r, d], in a type of the CPU's own."""
    small = all(0 < factor.shape[0] <= fused_cpu.MAX_RANK for factor in factors)
    return small and like.dtype == accumulation(like.dtype)


def _fused_down(x: torch.Tensor, A: torch.Tensor, dropout: Dropout, module: int) -> torch.Tensor:
    """H [T, r]."""
    H = x.new_empty(x.shape[0], A.shape[0])
    seed, _, threshold, stream = _draw(dropout, 0, dropout.streams[module])
    values, factor, out = x.numpy(), (A * dropout.scale).contiguous().numpy(), H.numpy()

    def part(low: int, high: int, share: int) -> None:
        fused_cpu.down(values[low:high], factor, out[low:high], seed, low, threshold, stream)

    _in_threads(part, _shares(x), x.shape[0])
    return H


def _fused_grad_up(
    dy: torch.Tensor, B: torch.Tensor, S: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS [T, r] and dB [d_out, r]."""
    assert S is not None
    dS = dy.new_empty(dy.shape[0], B.shape[1])
    shares = _shares(dy)
    total = dy.new_zeros(shares, B.shape[1], B.shape[0])
    values, factor = dy.contiguous().numpy(), B.t().contiguous().numpy()
    weights, out, sums = S.contiguous().numpy(), dS.numpy(), total.numpy()

    def part(low: int, high: int, share: int) -> None:
        given = (values[low:high], factor, weights[low:high])
        fused_cpu.grad_up(*given, out[low:high], sums[share])

    _in_threads(part, shares, dy.shape[0])
    return dS, total.sum(0).t()


def _fused_grad_down(
    x: torch.Tensor | None,
    dH: torch.Tensor,
    A: torch.Tensor,
    dx: torch.Tensor | None,
    dropout: Dropout,
    module: int,
) -> torch.Tensor | None:
    """Adds to dx [T, d] where given; returns dA [r, d] where x is."""
    nothing = dH.new_empty(0, A.shape[1])
    like = x if dx is None else dx
    if like is None:
        return None
    shares = _shares(like)
    total = dH.new_zeros(shares, A.shape[0] if x is not None else 0, A.shape[1])
    values, out = (nothing if x is None else x).numpy(), (nothing if dx is None else dx).numpy()
    seed, _, threshold, stream = _draw(dropout, 0, dropout.streams[module])
    weights, factor = (dH * dropout.scale).numpy(), A.contiguous().numpy()
    sums = total.numpy()

    def part(low: int, high: int, share: int) -> None:
        given = (values[low:high], weights[low:high], factor, out[low:high], sums[share])
        fused_cpu.grad_down(*given, seed, low, threshold, stream)

    _in_threads(part, shares, dH.shape[0])
    return None if x is None else total.sum(0)


def _walk(
    x: torch.Tensor | None,
    kept: torch.Tensor,
    term: torch.Tensor | None,
    dx: torch.Tensor | None,
    part: slice,
    draw: Draw,
) -> None:
    """Draw the mask of a block once: `kept` becomes the kept part of x, dx gains that of
    `term`.
    """
    values = None if x is None else x.to(kept.dtype)
    if term is None:
        assert values is not None
        _share(philox_cpu.drop, (values, kept), draw)
        return
    assert dx is not None
    out = dx[part].to(term.dtype)
    if values is None:
        _share(philox_cpu.add_kept, (term, out), draw)
    else:
        _share(philox_cpu.drop_and_add_kept, (values, kept, term, out), draw)
    if out.dtype != dx.dtype:
        dx[part] = out


def _share(walk: Callable[..., None], tensors: tuple[torch.Tensor, ...], draw: Draw) -> None:
    """Walk over the rows of a block, in as many threads as torch has."""
    seed, first, threshold, stream = draw
    arrays = [tensor.numpy() for tensor in tensors]

    def part(low: int, high: int, share: int) -> None:
        walk(*(array[low:high] for array in arrays), seed, first + low, threshold, stream)

    _in_threads(part, _shares(tensors[0]), arrays[0].shape[0])


def _shares(tensor: torch.Tensor) -> int:
    """Threads for the rows of a tensor."""
    return min(torch.get_num_threads(), max(tensor.numel() // _SHARED_ELEMENTS, 1))


def _in_threads(part: Callable[[int, int, int], None], shares: int, rows: int) -> None:
    """Call `part` with the first row, the end and the number of every share."""
    bounds = [rows * share // shares for share in range(shares + 1)]
    waiting = [
        _pool(os.getpid(), shares - 1).submit(part, bounds[share], bounds[share + 1], share)
        for share in range(1, shares)
    ]
    part(0, bounds[1], 0)
    for each in waiting:
        each.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one process; those of a parent do not live on after a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"cflora-{process}")


def _base_gradient(
    dys: Tensors, weights: Tensors | None, like: torch.Tensor, width: int
) -> torch.Tensor:
    """Sum of dy W, or zeros where the base layers differentiate themselves."""
    if weights is None:
        return like.new_zeros(like.shape[0], width)
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def _sum_of_products(
    left: list[torch.Tensor],
    right: list[torch.Tensor],
    modules: list[int],
    part: slice,
    out: torch.Tensor,
) -> torch.Tensor:
    torch.mm(left[modules[0]][part], right[modules[0]], out=out)
    for m in modules[1:]:
        out.addmm_(left[m][part], right[m])
    return out


def _block_rows(tensor: torch.Tensor) -> int:
    """Rows of a block whose shares stay in the threads' caches."""
    elements = _BLOCK_ELEMENTS * torch.get_num_threads()
    return min(tensor.shape[0], max(_MIN_ROWS, elements // max(tensor.shape[1], 1)))


def _blocks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows, each with its first row."""
    for first in range(0, tensor.shape[0], max(_block_rows(tensor), 1)):
        yield first, tensor[first : first + _block_rows(tensor)]


def _by_stream(dropout: Dropout) -> dict[int, list[int]]:
    """Modules that share a mask."""
    groups: dict[int, list[int]] = {}
    for module, stream in enumerate(dropout.streams):
        groups.setdefault(stream, []).append(module)
    return groups


def _draw(dropout: Dropout, first_row: int, stream: int) -> Draw:
    """Arguments of the compiled generator for a block of rows."""
    seed = np.uint64(int(dropout.seed) & 0xFFFFFFFFFFFFFFFF)
    return seed, first_row, dropout.threshold, stream
