"""The K best behaviours of a sample: look the scores up, find the K-th largest, write what reaches
it.

Scores become integers of the same order as the float32 they are, and the K-th largest is found by
halving an interval and counting the scores above its middle, until the count is K: straight loops,
which the compiler can turn into vector instructions, where a heap would branch at every score.
Nothing is sorted, because events are written in the order they lie in, which is time. Compiled by
numba, outside the interpreter's lock, so that threads run side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def select_cached(
    cosine: Any, code: Any, row: Any, start: Any, end: Any, place: Any, k: int, out: Any, found: Any
) -> None:
    """Choose for samples whose every similarity is in the cache.

    Samples with the same target should follow one another: its row of the cache then stays near the
    processor, and histories, which lie one after the other, are what is streamed.

    Args:
        cosine: float32 [C, C] seen as int32.
        code: uint16 [num_events], column of every event's item.
        row: int32 [n], row of every sample's target.
        start: int64 [n], first event of the history.
        end: int64 [n], its end.
        place: int64 [n], where a sample's events go in `out`.
        k: Events of a sample at most.
        out: int64, receives events in chronological order.
        found: float32 seen as int32, receives their similarities.
    """
    score = np.empty(_longest(start, end), np.int32)
    for i in range(row.size):
        first = start[i]
        n = end[i] - first
        scores_of_row = cosine[row[i]]
        for j in range(n):
            score[j] = _ordered(scores_of_row[code[first + j]])
        _choose(score, n, k, first, place[i], out, found)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def select_mixed(
    cosine: Any,
    code: Any,
    row: Any,
    start: int,
    end: Any,
    place: Any,
    k: int,
    out: Any,
    found: Any,
    line: Any,
    direct: Any,
    patch_event: Any,
    patch: Any,
) -> None:
    """Choose for samples of one user, some similarities of which are not in the cache.

    Args:
        cosine: See `select_cached`.
        code: See `select_cached`; anything valid for an item that is not cached.
        row: See `select_cached`; -1 for a target that is not cached.
        start: First event of the histories.
        end: int64 [n].
        place: int64 [n].
        k: Events of a sample at most.
        out: See `select_cached`.
        found: See `select_cached`.
        line: int64 [n], the sample's line of `direct` where `row` is -1, else of `patch`.
        direct: float32 [., longest history] seen as int32, similarity to every event.
        patch_event: int64 [p], ascending, events from `start` on whose item is not cached.
        patch: float32 [., p] seen as int32, similarity to those.
    """
    score = np.empty(max(1, end.max() - start), np.int32)
    for i in range(row.size):
        n = end[i] - start
        known = line[i]
        if row[i] < 0:
            for j in range(n):
                score[j] = _ordered(direct[known, j])
        else:
            scores_of_row = cosine[row[i]]
            for j in range(n):
                score[j] = _ordered(scores_of_row[code[start + j]])
            for p in range(patch_event.size):
                j = patch_event[p] - start
                if j >= n:
                    break
                score[j] = _ordered(patch[known, p])
        _choose(score, n, k, start, place[i], out, found)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _longest(start: Any, end: Any) -> int:
    longest = 1
    for i in range(start.size):
        longest = max(longest, end[i] - start[i])
    return longest


@njit(nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _ordered(bits: Any) -> Any:
    """An integer in the order of the float32 with these bits; its own inverse."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@njit(nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _count(score: Any, n: int, bar: Any) -> Any:
    """How many scores reach the bar; counted in int32, like the scores, to fill vector lanes."""
    reached = np.int32(0)
    for j in range(n):
        reached += np.int32(score[j] >= bar)
    return reached


@njit(nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _choose(score: Any, n: int, k: int, first: int, place: int, out: Any, found: Any) -> None:
    """Write the k largest of `score[:n]`, equal ones from the end, in ascending position."""
    if n <= k:
        for j in range(n):
            out[place + j] = first + j
            found[place + j] = _ordered(score[j])
        return
    # At least k scores reach `low`, fewer than k reach `high`.
    least, most = score[0], score[0]
    for j in range(n):
        least = min(least, score[j])
        most = max(most, score[j])
    low, high = np.int64(least), np.int64(most) + 1
    count = n
    while count != k and high - low > 1:
        middle = (low + high) >> 1
        bar = np.int32(middle)
        reached = _count(score, n, bar)
        if reached >= k:
            low, count = middle, reached
        else:
            high = middle
    bar = np.int32(low)
    # More than k reach the bar when several equal it: the earliest of those are left out.
    surplus = count - k
    written = 0
    j = 0
    while written < k and surplus > 0:
        out[place + written] = j
        level = score[j] == bar
        written += score[j] > bar
        surplus -= level
        j += 1
    while written < k:
        out[place + written] = j
        written += score[j] >= bar
        j += 1
    for n in range(place, place + k):
        found[n] = _ordered(score[out[n]])
        out[n] += first
