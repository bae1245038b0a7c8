"""The dropout generator of `kernels.philox`, compiled for a CPU: bit for bit the same masks.

Each function walks the rows of a block once: it draws a row's lanes into a buffer that stays in the
first-level cache and uses them at once, so a mask is never written to memory and costs less to draw
again in the backward pass than to read back. The inner loops run over neighbouring column groups
and columns, which the compiler turns into vector instructions.
"""

from __future__ import annotations

import numba
import numpy as np

_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@numba.njit(nogil=True, cache=True, inline="always")
def _keys(seed):
    """Key pairs of the 7 rounds, uint64 [7, 2]."""
    keys = np.empty((7, 2), np.uint64)
    low, high = seed & _WORD, seed >> _HALF
    for i in range(7):
        keys[i, 0], keys[i, 1] = low, high
        low, high = (low + _W0) & _WORD, (high + _W1) & _WORD
    return keys


@numba.njit(nogil=True, cache=True)
def _draw(words, keys, row, stream):
    """Fill words uint32 [4 * groups] with the draws of one row, in column order."""
    row, stream = np.uint64(row), np.uint64(stream)
    for g in range(words.shape[0] // 4):
        c0, c1, c2, c3 = np.uint64(g), row, stream, np.uint64(0)
        for i in range(7):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1 = (p1 >> _HALF) ^ c1 ^ keys[i, 0], p1 & _WORD
            c2, c3 = (p0 >> _HALF) ^ c3 ^ keys[i, 1], p0 & _WORD
        words[4 * g] = np.uint32(c0)
        words[4 * g + 1] = np.uint32(c1)
        words[4 * g + 2] = np.uint32(c2)
        words[4 * g + 3] = np.uint32(c3)


@numba.njit(nogil=True, cache=True)
def drop(x, out, seed, first_row, threshold, stream):
    """out = mask * x for a block x [n, d] whose first row is row `first_row` of the call."""
    rows, columns = x.shape
    words = np.empty(4 * ((columns + 7) // 8), np.uint32)
    lanes = words.view(np.uint16)
    keys, least = _keys(seed), np.uint16(threshold)
    zero = np.zeros(1, x.dtype)[0]
    for t in range(rows):
        _draw(words, keys, first_row + t, stream)
        for c in range(columns):
            out[t, c] = x[t, c] if lanes[c] >= least else zero


@numba.njit(nogil=True, cache=True)
def add_kept(term, out, seed, first_row, threshold, stream):
    """out += mask * term for a block [n, d]."""
    rows, columns = term.shape
    words = np.empty(4 * ((columns + 7) // 8), np.uint32)
    lanes = words.view(np.uint16)
    keys, least = _keys(seed), np.uint16(threshold)
    zero = np.zeros(1, term.dtype)[0]
    for t in range(rows):
        _draw(words, keys, first_row + t, stream)
        for c in range(columns):
            out[t, c] += term[t, c] if lanes[c] >= least else zero


@numba.njit(nogil=True, cache=True)
def drop_and_add_kept(x, dropped, term, out, seed, first_row, threshold, stream):
    """Both of the above with one draw: dropped = mask * x and out += mask * term.

    In two loops, because one loop over four arrays is not turned into vector instructions.
    """
    rows, columns = x.shape
    words = np.empty(4 * ((columns + 7) // 8), np.uint32)
    lanes = words.view(np.uint16)
    keys, least = _keys(seed), np.uint16(threshold)
    zero = np.zeros(1, x.dtype)[0]
    for t in range(rows):
        _draw(words, keys, first_row + t, stream)
        for c in range(columns):
            dropped[t, c] = x[t, c] if lanes[c] >= least else zero
        for c in range(columns):
            out[t, c] += term[t, c] if lanes[c] >= least else zero
