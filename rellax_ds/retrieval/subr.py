"""Exact causal top-K: for every sample, the earlier events of its user most like the target item.

Work is blocked by user: target vectors against history vectors is one matrix product, and the
causal mask, the selection and the order of time are operations on its rows. Nothing is of size
events x events.

Results are the same to the last bit for any partition, block or machine. Floating-point products
are not: their rounding depends on the block's shape. So unit vectors are rounded to integers of at
most 2^26 and multiplied in float64: by Cauchy-Schwarz every partial sum stays below 2^53, every
operation is exact, and the order of summation cannot matter. The rounding moves a cosine by less
than float32 arithmetic does.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from rellax_ds import schema
from rellax_ds.tables import write_parquet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.partitions import Partition

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

_SCALE = float(2**26)
_BLOCK_ELEMENTS = 1 << 21
_TILE_ROWS = 1 << 12


class Retriever:
    """Partition worker: retrieves for a range of samples.

    Writes `PARTITION.parquet` with the columns of `schema.RETRIEVED`.
    """

    def __init__(
        self, *, events_path: str, samples_path: str, vectors_path: str, num_retrieved: int
    ) -> None:
        """Read what every partition needs: the events' items and the item vectors.

        Args:
            events_path: The event table, Parquet.
            samples_path: The sample table, Parquet.
            vectors_path: Float32 [num_items, d], unit rows, npy.
            num_retrieved: K.
        """
        torch.set_num_threads(1)
        self._event_item = _column(pl.read_parquet(events_path, columns=["item"]), "item")
        self._samples_path = samples_path
        self._vectors = quantise(np.load(vectors_path))
        self._num_retrieved = num_retrieved

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Retrieve for samples `start:stop`."""
        start, stop = partition.payload["start"], partition.payload["stop"]
        samples = (
            pl.scan_parquet(self._samples_path)
            .select("item", "history_start", "history_end")
            .slice(start, stop - start)
            .collect()
        )
        offsets, events, similarity = retrieve(
            self._vectors,
            self._event_item,
            _column(samples, "item"),
            _column(samples, "history_start"),
            _column(samples, "history_end"),
            self._num_retrieved,
        )
        table = pa.table(
            [
                pa.array(np.arange(start, stop)),
                pa.LargeListArray.from_arrays(offsets, events),
                pa.LargeListArray.from_arrays(offsets, similarity),
            ],
            schema=pa.schema(list(schema.RETRIEVED.items())),
        )
        write_parquet(table, directory / f"{partition.name}.parquet")
        return {"samples": stop - start, "events": int(events.size)}


def quantise(vectors: Floats) -> torch.Tensor:
    """Unit vectors as whole numbers in float64, whose products `retrieve` forms exactly."""
    return torch.from_numpy(np.rint(vectors.astype(np.float64) * _SCALE))


def retrieve(
    vectors: torch.Tensor,
    event_item: Ints,
    target_item: Ints,
    history_start: Ints,
    history_end: Ints,
    num_retrieved: int,
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

    Returns:
        Offsets [n + 1], event rows in chronological order, and their cosine similarity; the events
        of sample i are `offsets[i]:offsets[i + 1]`.
    """
    found: list[tuple[Ints, Ints, Floats]] = []
    order = np.lexsort((history_end, history_start))
    starts = history_start[order]
    bounds = np.flatnonzero(np.diff(starts, prepend=-1, append=-1))
    for lower, upper in itertools.pairwise(bounds):
        rows, ends = order[lower:upper], history_end[order[lower:upper]]
        for first, last in _blocks(ends - starts[lower]):
            stop = ends[last - 1]
            block = rows[first:last]
            history = event_item[starts[lower] : stop]
            similarity = _similarity(vectors, target_item[block], history)
            row, column, value = _select(
                similarity, torch.from_numpy(ends[first:last] - starts[lower]), num_retrieved
            )
            found.append((block[row], starts[lower] + column, value))
    if not found:
        return np.zeros(target_item.size + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, "f4")
    sample, events, similarity_found = (np.concatenate(part) for part in zip(*found, strict=True))
    # Stable: the events of a sample come from one block, in chronological order.
    by_sample = np.argsort(sample, kind="stable")
    offsets = np.zeros(target_item.size + 1, np.int64)
    np.cumsum(np.bincount(sample, minlength=target_item.size), out=offsets[1:])
    return offsets, events[by_sample], similarity_found[by_sample]


def _blocks(lengths: Ints) -> list[tuple[int, int]]:
    """Cut a user's samples, ordered by history length, so that rows x longest history is
    bounded.
    """
    blocks, first = [], 0
    while first < lengths.size:
        # The longest history of a block is its last one.
        fits = np.arange(1, lengths.size - first + 1) * lengths[first:] <= _BLOCK_ELEMENTS
        last = first + max(1, int(np.count_nonzero(fits)))
        blocks.append((first, last))
        first = last
    return blocks


def _similarity(vectors: torch.Tensor, targets: Ints, history: Ints) -> torch.Tensor:
    """Exact scaled cosine, float64 [targets, history]; gathers history vectors a tile at a time."""
    queries = vectors[torch.from_numpy(targets)]
    similarity = torch.empty(targets.size, history.size, dtype=torch.float64)
    for first in range(0, history.size, _TILE_ROWS):
        tile = torch.from_numpy(history[first : first + _TILE_ROWS])
        similarity[:, first : first + _TILE_ROWS] = queries @ vectors[tile].T
    return similarity


def _select(
    similarity: torch.Tensor, lengths: torch.Tensor, num_retrieved: int
) -> tuple[Ints, Ints, Floats]:
    """Row, column and cosine of the K largest entries per row among its first `lengths` columns."""
    columns = torch.arange(similarity.shape[1])
    visible = columns < lengths[:, None]
    similarity = similarity.masked_fill(~visible, -torch.inf)
    kept = visible
    if similarity.shape[1] > num_retrieved:
        threshold = similarity.topk(num_retrieved, dim=1).values[:, -1:]
        above = similarity > threshold
        level = similarity == threshold
        room = num_retrieved - above.sum(dim=1, keepdim=True)
        from_latest = level.sum(dim=1, keepdim=True) - level.cumsum(dim=1)
        kept = visible & (above | (level & (from_latest < room)))
    row, column = kept.nonzero(as_tuple=True)
    cosine = (similarity[row, column] / _SCALE**2).to(torch.float32)
    return row.numpy(), column.numpy(), cosine.numpy()


def _column(frame: pl.DataFrame, name: str) -> Ints:
    values: Ints = frame[name].cast(pl.Int64).to_numpy(writable=True)
    return values
