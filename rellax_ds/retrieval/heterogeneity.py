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
    from collections.abc import Iterable, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


def heterogeneity(
    items: pa.Table,
    events: pa.Table,
    samples: pa.Table,
    retrieved: Iterable[pa.Table],
    at: Sequence[int],
    split: str = "test",
) -> dict[str, dict[str, float]]:
    """Mean number of distinct first genres in the recent and in the retrieved K, over a split.

    Args:
        items: The item table's column `genre`, the first genre.
        events: The event table's column `item`.
        samples: The sample table's columns `split`, `history_start` and `history_end`.
        retrieved: Stage 3's table in consecutive pieces, the first beginning with sample 0.
        at: Values of K; the retrieved K are the K most similar of those kept, ties to the later.
        split: Name of the split.

    Returns:
        `{"recent": {K: mean}, "retrieved": {K: mean}}` with K as text.
    """
    chosen = samples.column("split").to_numpy() == schema.SPLITS.index(split)
    start = samples.column("history_start").to_numpy()
    end = samples.column("history_end").to_numpy()
    codes = items.column("genre").combine_chunks().dictionary_encode().indices.to_numpy()
    genre = codes[events.column("item").to_numpy()].astype(np.int64)
    totals = {kind: dict.fromkeys(at, 0) for kind in ("recent", "retrieved")}
    first = 0
    for piece in retrieved:
        rows = first + np.flatnonzero(chosen[first : first + piece.num_rows])
        top = Ranked(piece.take(rows - first))
        for k in at:
            recent = _ranges(np.maximum(start[rows], end[rows] - k), end[rows])
            totals["recent"][k] += _distinct(*recent, genre)
            totals["retrieved"][k] += _distinct(*top.best(k), genre)
        first += piece.num_rows
    count = max(int(chosen.sum()), 1)
    return {kind: {str(k): total / count for k, total in of.items()} for kind, of in totals.items()}


class Ranked:
    """Retrieved lists in the order of similarity, ties to the later event."""

    def __init__(self, lists: pa.Table) -> None:
        """Rank some rows of stage 3's table."""
        counts = np.diff(lists.column("events").combine_chunks().offsets.to_numpy())
        row = np.repeat(np.arange(lists.num_rows), counts)
        event = lists.column("events").combine_chunks().flatten().to_numpy()
        similarity = lists.column("similarity").combine_chunks().flatten().to_numpy()
        order = np.lexsort((-event, -similarity, row))
        self._row, self._event = row[order], event[order]
        self._rank = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)

    def best(self, k: int) -> tuple[Ints, Ints]:
        """List and event of the K most similar of every list."""
        kept = self._rank < k
        return self._row[kept], self._event[kept]


def _ranges(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """All numbers of all ranges `first:end`, and the range each belongs to."""
    counts = end - first
    row = np.repeat(np.arange(first.size), counts)
    within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within


def _distinct(row: Ints, event: Ints, genre: Ints) -> int:
    """Number of distinct (row, genre) pairs."""
    of_event = genre[event]
    return int(np.unique(row * (int(of_event.max(initial=0)) + 1) + of_event).size)
