"""The low-rank steps as compiled loops over rows: one walk over x or dy, nothing written between.

For small ranks a CPU spends more on moving blocks through a library's products than on computing
them. Here a row is masked, projected and summed up while it lies in the first-level cache, four
rows at a time where a sum over rows is updated. Sums are reassociated for vector instructions, in
an order that is fixed when the loop is compiled.

Legend: n rows of a call, d width, r rank.
"""

from __future__ import annotations

import numba
import numpy as np

from rellax_ds.kernels.philox_cpu import _draw, _keys

MAX_RANK = 16
"""Above this a library's products are faster."""

_SUMS = {"reassoc", "contract", "nsz"}
_ROWS = 4


@numba.njit(nogil=True, cache=True, fastmath=_SUMS)
def _dots(row, factor, out):
    """out [r] = factor [r, d] row [d]."""
    rank, columns = factor.shape
    zero = np.zeros(1, row.dtype)[0]
    k = 0
    while k + 4 <= rank:
        a, b, c, e = zero, zero, zero, zero
        for i in range(columns):
            v = row[i]
            a += v * factor[k, i]
            b += v * factor[k + 1, i]
            c += v * factor[k + 2, i]
            e += v * factor[k + 3, i]
        out[k], out[k + 1], out[k + 2], out[k + 3] = a, b, c, e
        k += 4
    while k < rank:
        a = zero
        for i in range(columns):
            a += row[i] * factor[k, i]
        out[k] = a
        k += 1


@numba.njit(nogil=True, cache=True, fastmath=_SUMS)
def _expand(weights, factor, out):
    """out [d] = weights [r] factor [r, d]."""
    rank, columns = factor.shape
    w = weights[0]
    for i in range(columns):
        out[i] = w * factor[0, i]
    k = 1
    while k + 4 <= rank:
        a, b, c, e = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(columns):
            out[i] += (a * factor[k, i] + b * factor[k + 1, i]) + (
                c * factor[k + 2, i] + e * factor[k + 3, i]
            )
        k += 4
    while k < rank:
        w = weights[k]
        for i in range(columns):
            out[i] += w * factor[k, i]
        k += 1


@numba.njit(nogil=True, cache=True, fastmath=_SUMS)
def _accumulate(weights, rows, total):
    """total [r, d] += weights^T rows, for up to four rows: weights [m, r], rows [m, d]."""
    rank, columns = total.shape
    if rows.shape[0] == _ROWS:
        first, second, third, fourth = rows[0], rows[1], rows[2], rows[3]
        for k in range(rank):
            a, b, c, e = weights[0, k], weights[1, k], weights[2, k], weights[3, k]
            for i in range(columns):
                total[k, i] += (a * first[i] + b * second[i]) + (c * third[i] + e * fourth[i])
        return
    for m in range(rows.shape[0]):
        for k in range(rank):
            a = weights[m, k]
            for i in range(columns):
                total[k, i] += a * rows[m, i]


@numba.njit(nogil=True, cache=True)
def down(x, A, H, seed, first_row, threshold, stream):
    """H [n, r] = (mask * x) A^T for x [n, d] whose first row is row `first_row` of the call."""
    rows, columns = x.shape
    words = np.empty(4 * ((columns + 7) // 8), np.uint32)
    lanes = words.view(np.uint16)
    keys, least = _keys(seed), np.uint16(threshold)
    zero = np.zeros(1, x.dtype)[0]
    kept = np.empty(columns, x.dtype)
    for t in range(rows):
        _draw(words, keys, first_row + t, stream)
        for c in range(columns):
            kept[c] = x[t, c] if lanes[c] >= least else zero
        _dots(kept, A, H[t])


@numba.njit(nogil=True, cache=True)
def grad_up(dy, B, S, dS, dB):
    """dS [n, r] = dy B^T and dB [r, d] += S^T dy, for dy [n, d], B [r, d], S [n, r]."""
    rows = dy.shape[0]
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        for t in range(first, last):
            _dots(dy[t], B, dS[t])
        _accumulate(S[first:last], dy[first:last], dB)


@numba.njit(nogil=True, cache=True)
def grad_down(x, dH, A, dx, dA, seed, first_row, threshold, stream):
    """dx [n, d] += mask * (dH A) and dA [r, d] += dH^T (mask * x), for x [n, d], dH [n, r].

    With no row in dx, or none in dA, that gradient is left out; x is read for dA only.
    """
    rows, columns = dH.shape[0], A.shape[1]
    words = np.empty(4 * ((columns + 7) // 8), np.uint32)
    lanes = words.view(np.uint16)
    keys, least = _keys(seed), np.uint16(threshold)
    zero = np.zeros(1, A.dtype)[0]
    kept, term = np.empty((_ROWS, columns), A.dtype), np.empty(columns, A.dtype)
    need_dx, need_dA = dx.shape[0] > 0, dA.shape[0] > 0
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        for t in range(first, last):
            _draw(words, keys, first_row + t, stream)
            if need_dA:
                row = kept[t - first]
                for c in range(columns):
                    row[c] = x[t, c] if lanes[c] >= least else zero
            if need_dx:
                _expand(dH[t], A, term)
                for c in range(columns):
                    dx[t, c] += term[c] if lanes[c] >= least else zero
        if need_dA:
            _accumulate(dH[first:last], kept[: last - first], dA)
