"""Dropout masks inside Triton kernels: drawn by `tl.philox` as `kernels.philox` defines them, or
read back from packed bits.

A mask tile is [BM, BK] with BK a multiple of 8. Its bits are uint8 [rows, ceil(columns / 8)], bit j
of byte g is column 8 g + j.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def drawn(seed, rows, first_group, stream, threshold, BM: tl.constexpr, BK: tl.constexpr):
    """Keep mask as int32 [BM, BK // 8, 8] for the absolute rows [BM]."""
    groups = first_group + tl.arange(0, BK // 8)
    zero = tl.zeros([BM, BK // 8], tl.uint32)
    c0 = zero + groups[None, :].to(tl.uint32)
    c1 = zero + rows[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream.to(tl.uint32), zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BM, BK // 8, 8))
    return (lanes >= threshold).to(tl.int32)


@triton.jit
def stored(bits, rows, first_group, groups, row_mask, BM: tl.constexpr, BK: tl.constexpr):
    """Keep mask as int32 [BM, BK // 8, 8] from packed bits with `groups` bytes a row."""
    columns = first_group + tl.arange(0, BK // 8)
    offsets = rows.to(tl.int64)[:, None] * groups + columns[None, :]
    packed = tl.load(bits + offsets, mask=row_mask[:, None] & (columns < groups)[None, :], other=0)
    return (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1


@triton.jit
def store(keep, bits, rows, first_group, groups, row_mask, BM: tl.constexpr, BK: tl.constexpr):
    """Pack a mask and write it; the last byte of a row may hold bits beyond its columns."""
    packed = tl.sum(keep << tl.arange(0, 8)[None, None, :], axis=2)
    columns = first_group + tl.arange(0, BK // 8)
    offsets = rows.to(tl.int64)[:, None] * groups + columns[None, :]
    inside = row_mask[:, None] & (columns < groups)[None, :]
    tl.store(bits + offsets, packed.to(tl.uint8), mask=inside)


@triton.jit
def applied(x, keep, BM: tl.constexpr, BK: tl.constexpr):
    """mask * x for a tile [BM, BK]."""
    return tl.where(tl.reshape(keep, (BM, BK)) != 0, x, tl.zeros_like(x))
