"""Exact causal top-K: for every sample, the earlier events of its user most like the target item.

Work lies in event order, by user and then by prefix, so a history is a slice and nothing is of size
events x events. Similarities come from the cache of popular items or, for a user with rarer ones,
from matrix products over blocks of a user's targets and their longest prefix. Both are exact (see
`similarity`), so the result is the same for any partition, block or number of threads. Of equal
similarities the later events win.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rellax_ds.retrieval.selection import select_cached, select_mixed
from rellax_ds.retrieval.similarity import SimilarityCache, cosine

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

_BLOCK_ROWS = 128
_PIECES_PER_THREAD = 4
SAMPLE_COST = 64
"""What choosing costs beside the scoring, in scored pairs."""


@dataclass(frozen=True)
class _Work:
    """Samples with places in the output; what every block of the search shares.

    Attributes:
        vectors: Quantised item vectors, float64 [num_items, d].
        cache: Similarities of popular items.
        item: int32 [num_events], item of every event.
        code: uint16 [num_events], column of the event's item in the cache, 0 for a rare one.
        rare: int64 [num_events + 1], how many events before each row are of items not cached.
        target: int64 [n], item of every sample.
        start: int64 [n].
        end: int64 [n].
        place: int64 [n], first entry of the sample in `events`.
        k: K.
        events: int64, the result.
        similarity: float32, their similarities.
    """

    vectors: torch.Tensor
    cache: SimilarityCache
    item: NDArray[np.integer]
    code: NDArray[np.uint16]
    rare: Ints
    target: Ints
    start: Ints
    end: Ints
    place: Ints
    k: int
    events: Ints
    similarity: Floats


def retrieve(
    vectors: torch.Tensor,
    event_item: NDArray[np.integer],
    target_item: NDArray[np.integer],
    history_start: Ints,
    history_end: Ints,
    num_retrieved: int,
    *,
    cache: SimilarityCache | None = None,
    num_threads: int = 1,
) -> tuple[Ints, Ints, Floats]:
    """The K events of each history whose items are most similar to the target.

    Of equally similar events the later ones are taken. A history shorter than K is returned whole.

    Args:
        vectors: Quantised item vectors, float64 [num_items, d], see `quantise`.
        event_item: Item of every event.
        target_item: Item of every sample, [n].
        history_start: First event of the history of every sample, [n]; equal for samples of one
            user.
        history_end: End (exclusive) of that history, [n].
        num_retrieved: K.
        cache: Similarities of popular items; by default made for these samples.
        num_threads: Threads that select side by side.

    Returns:
        Offsets [n + 1], event rows in chronological order, and their cosine similarity; the events
        of sample i are `offsets[i]:offsets[i + 1]`.
    """
    length = history_end - history_start
    if cache is None:
        cache = SimilarityCache.build(vectors, event_item, int(length.sum()))
    offsets = np.zeros(target_item.size + 1, np.int64)
    np.cumsum(np.minimum(length, num_retrieved), out=offsets[1:])
    place_of_event = cache.place[event_item]
    rare = np.zeros(event_item.size + 1, np.int64)
    np.cumsum(place_of_event < 0, out=rare[1:])
    work = _Work(
        vectors=vectors,
        cache=cache,
        item=event_item,
        code=np.maximum(place_of_event, 0).astype(np.uint16),
        rare=rare,
        target=target_item.astype(np.int64),
        start=history_start,
        end=history_end,
        place=offsets[:-1],
        k=num_retrieved,
        events=np.empty(offsets[-1], np.int64),
        similarity=np.empty(offsets[-1], np.float32),
    )
    mixed = (cache.place[work.target] < 0) | (rare[history_end] > rare[history_start])
    cached = np.flatnonzero(~mixed)
    rows_of_cache = cache.place[work.target[cached]].astype(np.uint16)
    cached = cached[np.argsort(rows_of_cache, kind="stable")]
    jobs = [(_search_cached, rows) for rows in _share(cached, length[cached], num_threads)]
    jobs += [(_search_mixed, rows) for rows in _users(work, np.flatnonzero(mixed), num_threads)]
    _run(jobs, work, num_threads)
    return offsets, work.events, work.similarity


def _run(jobs: list[tuple[Callable[..., None], Ints]], work: _Work, num_threads: int) -> None:
    if num_threads == 1:
        for job, rows in jobs:
            job(work, rows)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(job, work, rows) for job, rows in jobs]:
            future.result()


def _share(rows: Ints, length: Ints, num_threads: int) -> list[Ints]:
    """Cut rows into pieces of about equal cost."""
    pieces = num_threads * _PIECES_PER_THREAD if num_threads > 1 else 1
    cost = np.cumsum(length + SAMPLE_COST)
    total = int(cost[-1]) if cost.size else 0
    cuts = np.searchsorted(cost, total * np.arange(1, pieces) / pieces)
    return [piece for piece in np.split(rows, cuts) if piece.size]


def _users(work: _Work, rows: Ints, num_threads: int) -> list[Ints]:
    """The same for samples that are searched user by user: no user is cut."""
    order = rows[np.lexsort((work.end[rows], work.start[rows]))]
    pieces = _share(order, work.end[order] - work.start[order], num_threads)
    owner = work.start[order]
    bounds = np.searchsorted(owner, [work.start[piece[0]] for piece in pieces[1:]])
    return [piece for piece in np.split(order, bounds) if piece.size]


def _search_cached(work: _Work, rows: Ints) -> None:
    select_cached(
        work.cache.cosine.view(np.int32),
        work.code,
        work.cache.place[work.target[rows]],
        work.start[rows],
        work.end[rows],
        work.place[rows],
        work.k,
        work.events,
        work.similarity.view(np.int32),
    )


def _search_mixed(work: _Work, rows: Ints) -> None:
    """Search samples in (user, prefix) order, a user at a time."""
    bounds = np.flatnonzero(np.diff(work.start[rows], prepend=-1, append=-1))
    for lower, upper in itertools.pairwise(bounds):
        _search_user(work, rows[lower:upper])


def _search_user(work: _Work, rows: Ints) -> None:
    """Search one user's samples, ordered by prefix, in blocks of bounded size."""
    start, longest = int(work.start[rows[0]]), int(work.end[rows[-1]])
    history = work.vectors[torch.from_numpy(work.item[start:longest].astype(np.int64))]
    for first in range(0, rows.size, _BLOCK_ROWS):
        _search_block(work, rows[first : first + _BLOCK_ROWS], start, history)


def _search_block(work: _Work, rows: Ints, start: int, history: torch.Tensor) -> None:
    """Multiply what the cache lacks, targets or behaviours, and select."""
    end = int(work.end[rows[-1]])
    row = work.cache.place[work.target[rows]]
    targets = work.vectors[torch.from_numpy(work.target[rows])]
    rare = np.flatnonzero(np.diff(work.rare[start : end + 1]))
    cached = row >= 0
    direct = cosine(targets[torch.from_numpy(~cached)], history[: end - start])
    patch = cosine(targets[torch.from_numpy(cached)], history[torch.from_numpy(rare)])
    select_mixed(
        work.cache.cosine.view(np.int32),
        work.code,
        row,
        start,
        work.end[rows],
        work.place[rows],
        work.k,
        work.events,
        work.similarity.view(np.int32),
        np.where(cached, np.cumsum(cached), np.cumsum(~cached)) - 1,
        direct.view(np.int32),
        start + rare,
        patch.view(np.int32),
    )
