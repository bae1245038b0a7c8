"""How mixed a history is: the number of distinct first genres among its K events.

ReLLaX motivates retrieval by it (the retrieved K are more alike than the recent K), so the figure
is written beside every retrieval: when retrieved is not below recent, ids, vectors or order are
wrong. It proves plumbing, not ranking quality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rellax_ds import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


def heterogeneity(
    items: pa.Table,
    events: pa.Table,
    samples: pa.Table,
    retrieved: pa.Table,
    at: Sequence[int],
    split: str = "test",
) -> dict[str, dict[str, float]]:
    """Mean number of distinct first genres in the recent and in the retrieved K, over a split.

    Args:
        items: The item table; first genre in `genre`.
        events: The event table.
        samples: The sample table.
        retrieved: Stage 3's table, row = sample id.
        at: Values of K; the retrieved K are the K most similar of those kept, ties to the later.
        split: Name of the split.

    Returns:
        `{"recent": {K: mean}, "retrieved": {K: mean}}` with K as text.
    """
    chosen = np.flatnonzero(samples.column("split").to_numpy() == schema.SPLITS.index(split))
    codes = items.column("genre").combine_chunks().dictionary_encode().indices.to_numpy()
    genre = codes.astype(np.int64)[events.column("item").to_numpy()]
    start = samples.column("history_start").to_numpy()[chosen]
    end = samples.column("history_end").to_numpy()[chosen]

    lists = retrieved.take(chosen)
    offsets = lists.column("events").combine_chunks().offsets.to_numpy()
    counts = np.diff(offsets)
    row = np.repeat(np.arange(chosen.size), counts)
    event = lists.column("events").combine_chunks().flatten().to_numpy()
    similarity = lists.column("similarity").combine_chunks().flatten().to_numpy()
    by_rank = np.lexsort((-event, -similarity, row))
    rank = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)

    result: dict[str, dict[str, float]] = {"recent": {}, "retrieved": {}}
    for k in at:
        first = np.maximum(start, end - k)
        recent_row, recent_event = _ranges(first, end)
        result["recent"][str(k)] = _distinct(recent_row, genre[recent_event], chosen.size)
        top = by_rank[rank < k]
        result["retrieved"][str(k)] = _distinct(row[top], genre[event[top]], chosen.size)
    return result


def _ranges(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """All numbers of all ranges `first:end`, and the range each belongs to."""
    counts = end - first
    row = np.repeat(np.arange(first.size), counts)
    within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within


def _distinct(row: Ints, genre: Ints, num_rows: int) -> float:
    """Mean over rows of the number of distinct genres."""
    pairs = np.unique(row * (int(genre.max(initial=0)) + 1) + genre)
    return pairs.size / max(num_rows, 1)
