"""The two large products of the operator with the low-rank term inside (F2 and B3).

One kernel computes out [M, N] = L [M, K] R [K, N] + P [M, r] Q [r, N]. The accumulator starts as
the low-rank term and then runs the ordinary main loop, so the term costs neither a pass over the
output nor a second accumulator.

F2, the forward: L = x, R = W^T, P = S, Q = B^T, and the bias. B3, the gradient of x: L = dy, R = W,
P = dH, Q = A, with the dropout mask of x on the term. Row offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rellax_ds.kernels import masks


@triton.jit
def gemm_kernel(
    left,
    right,
    P,
    Q,
    bias,
    out,
    bits,
    seed,
    M,
    N,
    K,
    right_k,
    right_n,
    q_r,
    q_n,
    threshold,
    factor,
    stream,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One [BM, BN] tile of the output; tiles run in groups of GROUP rows so that R stays in L2."""
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    width = GROUP * column_tiles
    first = program // width * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + program % width % height
    column_tile = program % width // height
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    ranks = tl.arange(0, BR)
    term = tl.load(
        P + rows.to(tl.int64)[:, None] * R + ranks[None, :],
        mask=row_mask[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    factor_tile = tl.load(
        Q + ranks.to(tl.int64)[:, None] * q_r + columns.to(tl.int64)[None, :] * q_n,
        mask=(ranks < R)[:, None] & column_mask[None, :],
        other=0.0,
    )
    acc = tl.dot(term, factor_tile, input_precision="ieee")
    if DROPOUT:
        group, groups = column_tile * (BN // 8), (N + 7) // 8
        if STORED:
            keep = masks.stored(bits, rows, group, groups, row_mask, BM, BN)
        else:
            keep = masks.drawn(tl.load(seed), rows, group, stream + program * 0, threshold, BM, BN)
        acc = masks.applied(acc * factor, keep, BM, BN)
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = row_mask[:, None] & column_mask[None, :]
    if ACCUMULATE:
        acc += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    left_at = left + rows.to(tl.int64)[:, None] * K
    right_at = right + columns.to(tl.int64)[None, :] * right_n
    for start in range(0, K, BK):
        depth = start + tl.arange(0, BK)
        depth_mask = depth < K
        l_tile = tl.load(
            left_at + depth[None, :], mask=row_mask[:, None] & depth_mask[None, :], other=0.0
        )
        r_tile = tl.load(
            right_at + depth.to(tl.int64)[:, None] * right_k,
            mask=depth_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(l_tile, r_tile, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
