"""The skinny kernels: everything of the operator whose output has r columns (F1, B1, B2, B4).

All of them are bound by reading one [T, d] tensor, so each reads it once, for up to three modules
that share x. Only F1 and B2 know samples: they walk a tile table whose tiles never straddle two.
Reductions go to partial sums that are added in a fixed order, so results repeat to the bit. Ranks
are padded to BR, a power of two of at least 16, in registers only.

Legend: N modules of one launch, R rank, BM rows and BK or BN columns of a tile, d a width. Tensors
that exist per module are stacked: A [N, R, d], G [N, S, R, R], H and S [N, T, R], bits
[N or 1, T, ceil(d / 8)]. Row offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rellax_ds.kernels import masks


@triton.jit
def _dropped(
    x,
    module,
    seed,
    bits,
    rows,
    first_group,
    groups,
    tokens,
    stream,
    threshold,
    row_mask,
    DRAW: tl.constexpr,
    STORE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """mask * x of one module; its mask is drawn, and stored on request, or read from bits."""
    plane = bits + module.to(tl.int64) * tokens * groups
    if DRAW:
        keep = masks.drawn(seed, rows, first_group, stream, threshold, BM, BK)
        if STORE:
            masks.store(keep, plane, rows, first_group, groups, row_mask, BM, BK)
    else:
        keep = masks.stored(plane, rows, first_group, groups, row_mask, BM, BK)
    return masks.applied(x, keep, BM, BK)


@triton.jit
def _project(x, A, module, columns, d, acc, R: tl.constexpr, BR: tl.constexpr):
    """acc [BM, BR] += x A^T over the tile's columns."""
    ranks = tl.arange(0, BR)
    offsets = (module * R + ranks)[None, :].to(tl.int64) * d + columns[:, None]
    inside = (ranks < R)[None, :] & (columns < d)[:, None]
    return tl.dot(x, tl.load(A + offsets, mask=inside, other=0.0), acc, input_precision="ieee")


@triton.jit
def _ranks_of(sample, R: tl.constexpr):
    """R, or 0 for rows of no sample. A limit and not a condition: the interpreter of Triton 3.9
    refuses a mask that a scalar condition was joined to.
    """
    return tl.where(sample >= 0, R, 0)


@triton.jit
def _gate(
    acc,
    G,
    H,
    S,
    module,
    sample,
    samples,
    rows,
    row_mask,
    tokens,
    factor,
    scaling,
    R: tl.constexpr,
    BR: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write H = factor * acc and S = scaling * H G of one tile and module."""
    ranks = tl.arange(0, BR)
    hidden = acc * factor
    at = (module.to(tl.int64) * tokens + rows.to(tl.int64))[:, None] * R + ranks[None, :]
    inside = row_mask[:, None] & (ranks < R)[None, :]
    tl.store(H + at, hidden.to(H.dtype.element_ty), mask=inside)
    if GATED:
        start = (module * samples + sample).to(tl.int64) * R * R
        square = (ranks < R)[:, None] & (ranks < _ranks_of(sample, R))[None, :]
        gate = tl.load(G + start + ranks[:, None] * R + ranks[None, :], mask=square, other=0.0)
        gated = tl.dot(hidden, gate, input_precision="tf32x3")
    else:
        gated = tl.where(sample >= 0, hidden, tl.zeros_like(hidden))
    tl.store(S + at, (gated * scaling).to(S.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    x,
    A,
    G,
    H,
    S,
    bits,
    seed,
    tiles,
    tokens,
    d,
    samples,
    threshold,
    factor,
    scale_0,
    scale_1,
    scale_2,
    stream_0,
    stream_1,
    stream_2,
    N: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED: tl.constexpr,
    STORE: tl.constexpr,
):
    """F1: H = dropout(x) A^T and S = s H G for a tile of rows of one sample."""
    entry = tiles + tl.program_id(0) * 3
    first, count, sample = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows = first + tl.arange(0, BM)
    row_mask = tl.arange(0, BM) < count
    groups = (d + 7) // 8
    key = tl.load(seed) if DROPOUT else 0
    acc_0 = tl.zeros([BM, BR], tl.float32)
    acc_1 = tl.zeros([BM, BR], tl.float32)
    acc_2 = tl.zeros([BM, BR], tl.float32)
    zero = tl.program_id(0) * 0
    for start in range(0, d, BK):
        columns = start + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        inside = row_mask[:, None] & (columns < d)[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        kept = values
        if DROPOUT:
            kept = _dropped(
                values, zero, key, bits, rows, start // 8, groups, tokens, stream_0 + zero,
                threshold, row_mask, True, STORE, BM, BK,
            )  # fmt: skip
        acc_0 = _project(kept, A, zero, columns, d, acc_0, R, BR)
        if N > 1:
            if DROPOUT and not SHARED:
                kept = _dropped(
                    values, zero + 1, key, bits, rows, start // 8, groups, tokens,
                    stream_1 + zero, threshold, row_mask, True, STORE, BM, BK,
                )  # fmt: skip
            acc_1 = _project(kept, A, zero + 1, columns, d, acc_1, R, BR)
        if N > 2:
            if DROPOUT and not SHARED:
                kept = _dropped(
                    values, zero + 2, key, bits, rows, start // 8, groups, tokens,
                    stream_2 + zero, threshold, row_mask, True, STORE, BM, BK,
                )  # fmt: skip
            acc_2 = _project(kept, A, zero + 2, columns, d, acc_2, R, BR)
    _gate(
        acc_0, G, H, S, zero, sample, samples, rows, row_mask, tokens, factor, scale_0, R, BR, GATED
    )
    if N > 1:
        _gate(
            acc_1, G, H, S, zero + 1, sample, samples, rows, row_mask, tokens, factor, scale_1, R,
            BR, GATED,
        )  # fmt: skip
    if N > 2:
        _gate(
            acc_2, G, H, S, zero + 2, sample, samples, rows, row_mask, tokens, factor, scale_2, R,
            BR, GATED,
        )  # fmt: skip


@triton.jit
def grad_up_kernel(
    dy,
    B,
    S,
    dS_parts,
    dB_parts,
    tokens,
    d,
    rows_per_program,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NEED_S: tl.constexpr,
    NEED_B: tl.constexpr,
):
    """B1: for BN columns and a share of the rows of dy, partial dS = dy B [column chunk, T, R] and
    partial dB = dy^T S [row share, d, R]; dy is read once for both.
    """
    chunk, share = tl.program_id(0), tl.program_id(1)
    columns = chunk * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    column_mask = (columns < d)[:, None] & (ranks < R)[None, :]
    up = tl.load(
        B + columns.to(tl.int64)[:, None] * R + ranks[None, :], mask=column_mask, other=0.0
    )
    total = tl.zeros([BN, BR], tl.float32)
    stop = tl.minimum((share + 1) * rows_per_program, tokens)
    for start in range(share * rows_per_program, stop, BM):
        rows = start + tl.arange(0, BM)
        row_mask = rows < stop
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        values = tl.load(dy + at, mask=row_mask[:, None] & (columns < d)[None, :], other=0.0)
        rank_mask = row_mask[:, None] & (ranks < R)[None, :]
        rank_at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        if NEED_S:
            part = tl.dot(values, up, input_precision="ieee")
            plane = chunk.to(tl.int64) * tokens * R
            tl.store(dS_parts + plane + rank_at, part, mask=rank_mask)
        if NEED_B:
            gated = tl.load(S + rank_at, mask=rank_mask, other=0.0)
            total = tl.dot(tl.trans(values), gated, total, input_precision="ieee")
    if NEED_B:
        plane = share.to(tl.int64) * d * R
        at = columns.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(dB_parts + plane + at, total, mask=column_mask)


@triton.jit
def grad_gate_kernel(
    dS_parts,
    H,
    G,
    dH,
    dG_parts,
    tiles,
    tokens,
    chunks,
    scaling,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    GATED: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_G: tl.constexpr,
):
    """B2: for a tile of rows of one sample, dS from its partials, dH = s dS G^T, and the part of
    dG = s H^T dS that comes from this tile.
    """
    tile = tl.program_id(0)
    entry = tiles + tile * 3
    first, count, sample = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows = first + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    inside = (tl.arange(0, BM) < count)[:, None] & (ranks < R)[None, :]
    at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    total = tl.zeros([BM, BR], tl.float32)
    for chunk in range(0, chunks):
        plane = tl.cast(chunk, tl.int64) * tokens * R
        total += tl.load(dS_parts + plane + at, mask=inside, other=0.0)
    square = ranks[:, None] * R + ranks[None, :]
    square_mask = (ranks < R)[:, None] & (ranks < R)[None, :]
    if NEED_H:
        if GATED:
            start = sample.to(tl.int64) * R * R
            known = square_mask & (ranks < _ranks_of(sample, R))[None, :]
            gate = tl.load(G + start + square, mask=known, other=0.0)
            gradient = tl.dot(total, tl.trans(gate), input_precision="ieee")
        else:
            gradient = tl.where(sample >= 0, total, tl.zeros_like(total))
        tl.store(dH + at, (gradient * scaling).to(dH.dtype.element_ty), mask=inside)
    if NEED_G:
        hidden = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
        part = tl.dot(tl.trans(hidden), total, input_precision="ieee") * scaling
        tl.store(dG_parts + tile.to(tl.int64) * R * R + square, part, mask=square_mask)


@triton.jit
def segment_kernel(parts, order, offsets, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out[b] = sum of the parts of sample b, in the order of its tiles; zero without any."""
    sample = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.load(offsets + sample), tl.load(offsets + sample + 1)):
        tile = tl.load(order + index).to(tl.int64)
        total += tl.load(parts + tile * SIZE + lanes, mask=lanes < SIZE, other=0.0)
    tl.store(out + sample.to(tl.int64) * SIZE + lanes, total, mask=lanes < SIZE)


@triton.jit
def _outer(dH, module, values, rows, row_mask, tokens, acc, R: tl.constexpr, BR: tl.constexpr):
    """acc [BN, BR] += values^T dH over the tile's rows."""
    ranks = tl.arange(0, BR)
    at = (module.to(tl.int64) * tokens + rows.to(tl.int64))[:, None] * R + ranks[None, :]
    inside = row_mask[:, None] & (ranks < R)[None, :]
    gradient = tl.load(dH + at, mask=inside, other=0.0)
    return tl.dot(tl.trans(values), gradient, acc, input_precision="ieee")


@triton.jit
def _write_part(
    parts,
    acc,
    module,
    share,
    columns,
    d,
    factor,
    N: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
):
    ranks = tl.arange(0, BR)
    at = ((share * N + module).to(tl.int64) * d + columns)[:, None] * R + ranks[None, :]
    inside = (columns < d)[:, None] & (ranks < R)[None, :]
    tl.store(parts + at, acc * factor, mask=inside)


@triton.jit
def grad_a_kernel(
    dH,
    x,
    parts,
    bits,
    seed,
    tokens,
    d,
    rows_per_program,
    threshold,
    factor,
    stream_0,
    stream_1,
    stream_2,
    N: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED: tl.constexpr,
    STORED: tl.constexpr,
):
    """B4: for BN columns and a share of the rows of x, partial dA^T = dropout(x)^T dH
    [row share, N, d, R]; transposed, so that the wide side meets the tensor cores.
    """
    chunk, share = tl.program_id(0), tl.program_id(1)
    columns = chunk * BN + tl.arange(0, BN)
    groups = (d + 7) // 8
    key = 0
    if DROPOUT and not STORED:
        key = tl.load(seed)
    acc_0 = tl.zeros([BN, BR], tl.float32)
    acc_1 = tl.zeros([BN, BR], tl.float32)
    acc_2 = tl.zeros([BN, BR], tl.float32)
    stop = tl.minimum((share + 1) * rows_per_program, tokens)
    zero = share * 0
    group = chunk * (BN // 8)
    for start in range(share * rows_per_program, stop, BM):
        rows = start + tl.arange(0, BM)
        row_mask = rows < stop
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        values = tl.load(x + at, mask=row_mask[:, None] & (columns < d)[None, :], other=0.0)
        kept = values
        if DROPOUT:
            kept = _dropped(
                values, zero, key, bits, rows, group, groups, tokens, stream_0 + zero, threshold,
                row_mask, not STORED, False, BM, BN,
            )  # fmt: skip
        acc_0 = _outer(dH, zero, kept, rows, row_mask, tokens, acc_0, R, BR)
        if N > 1:
            if DROPOUT and not SHARED:
                kept = _dropped(
                    values, zero + 1, key, bits, rows, group, groups, tokens, stream_1 + zero,
                    threshold, row_mask, not STORED, False, BM, BN,
                )  # fmt: skip
            acc_1 = _outer(dH, zero + 1, kept, rows, row_mask, tokens, acc_1, R, BR)
        if N > 2:
            if DROPOUT and not SHARED:
                kept = _dropped(
                    values, zero + 2, key, bits, rows, group, groups, tokens, stream_2 + zero,
                    threshold, row_mask, not STORED, False, BM, BN,
                )  # fmt: skip
            acc_2 = _outer(dH, zero + 2, kept, rows, row_mask, tokens, acc_2, R, BR)
    _write_part(parts, acc_0, zero, share, columns, d, factor, N, R, BR)
    if N > 1:
        _write_part(parts, acc_1, zero + 1, share, columns, d, factor, N, R, BR)
    if N > 2:
        _write_part(parts, acc_2, zero + 2, share, columns, d, factor, N, R, BR)
