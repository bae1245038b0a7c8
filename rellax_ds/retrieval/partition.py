"""Retrieval cut into partitions: columns in event order, a worker, and the merge by sample id.

Samples are numbered in time order, but searched in event order, where a partition is a stretch of
users and a history is a slice. `prepare` lays the columns out once, as arrays that every worker
maps instead of reading; partitions are cut by scored pairs, so that they take about equally long,
and through a user where one user is too much. A worker's part lists its samples in ascending id;
the merge walks all parts side by side and holds one row group of each.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rellax_ds import schema
from rellax_ds.errors import ArtifactError
from rellax_ds.partitions import Partition
from rellax_ds.retrieval.similarity import SimilarityCache, quantise
from rellax_ds.retrieval.subr import SAMPLE_COST, retrieve
from rellax_ds.retrieval.subr_device import DeviceSearch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

_COLUMNS = ("item", "sample", "event", "start", "end")
_SCHEMA = pa.schema(list(schema.RETRIEVED.items()))
_PART_GROUP = 1 << 10
_CHUNK = 1 << 15
_FILE_GROUP = 1 << 11  # shots are drawn at random: one row decodes a group
_SORTED_IDS = "DELTA_BINARY_PACKED"
_ENCODING = {
    "sample": _SORTED_IDS,
    "events.list.element": _SORTED_IDS,
    "similarity.list.element": "BYTE_STREAM_SPLIT",
}


def prepare(tables: Path, vectors_path: Path, folder: Path) -> None:
    """Lay out what the workers map; does nothing when `folder` is there, for it is whole.

    Args:
        tables: Folder of stage 1.
        vectors_path: Float32 [num_items, d], unit rows, npy.
        folder: Folder to make.
    """
    if folder.is_dir():
        return
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    item = _column(tables / "events.parquet", "item")
    event = _column(tables / "samples.parquet", "event")
    order = np.argsort(event, kind="stable")
    start = _column(tables / "samples.parquet", "history_start")[order]
    end = _column(tables / "samples.parquet", "history_end")[order]
    columns = {"item": item, "sample": order, "event": event[order], "start": start, "end": end}
    for name in _COLUMNS:
        np.save(staged / f"{name}.npy", columns[name])
    vectors = quantise(np.load(vectors_path))
    SimilarityCache.build(vectors, item, int((end - start).sum())).save(staged)
    staged.rename(folder)


def cut(folder: Path, samples_per_partition: int) -> list[Partition]:
    """Partitions of about equal cost, `samples_per_partition` samples on average."""
    start, end = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("start", "end"))
    cost = np.cumsum(end - start + SAMPLE_COST)
    number = -(-cost.size // samples_per_partition)
    inner = np.searchsorted(cost, cost[-1] * np.arange(1, number) / number) if number else []
    bounds = np.unique([0, *inner, cost.size]).tolist()
    return [
        Partition(f"part-{n:05d}", {"start": first, "stop": stop})
        for n, (first, stop) in enumerate(itertools.pairwise(bounds))
    ]


class Retriever:
    """Partition worker: retrieves for a range of samples in event order.

    Writes `PARTITION.parquet` with the columns of `schema.RETRIEVED`, in ascending sample id.
    """

    def __init__(
        self, *, columns: str, vectors_path: str, num_retrieved: int, device: str = "cpu"
    ) -> None:
        """Map what every partition needs.

        Args:
            columns: Folder that `prepare` made.
            vectors_path: Float32 [num_items, d], unit rows, npy.
            num_retrieved: K.
            device: Where to search; another than the CPU proposes in half precision and decides
                exactly, with the same result.
        """
        torch.set_num_threads(1)
        folder = Path(columns)
        self._columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        vectors = quantise(np.load(vectors_path))
        self._retrieve: Callable[..., tuple[Ints, Ints, Any]]
        if device == "cpu":
            cache = SimilarityCache.load(folder)
            self._retrieve = functools.partial(retrieve, vectors, cache=cache)
        else:
            self._retrieve = DeviceSearch(vectors, device).retrieve
        self._num_retrieved = num_retrieved

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Retrieve for the samples at positions `start:stop` of the event order."""
        chosen = slice(partition.payload["start"], partition.payload["stop"])
        sample, event, start, end = (np.asarray(self._columns[c][chosen]) for c in _COLUMNS[1:])
        first, stop = int(start.min()), int(event.max()) + 1
        item = np.asarray(self._columns["item"][first:stop])
        by_id = np.argsort(sample)
        offsets, events, similarity = self._retrieve(
            item,
            item[event[by_id] - first],
            start[by_id] - first,
            end[by_id] - first,
            self._num_retrieved,
        )
        lists = [pa.LargeListArray.from_arrays(offsets, x) for x in (events + first, similarity)]
        table = pa.table([pa.array(sample[by_id]), *lists], schema=_SCHEMA)
        with _writer(directory / f"{partition.name}.parquet") as writer:
            writer.write_table(table, row_group_size=_PART_GROUP)
        return {"samples": len(sample), "events": int(events.size)}


def merge(parts: Sequence[Path], path: Path, num_samples: int) -> None:
    """Join the workers' parts into one table in sample order, a chunk at a time.

    Args:
        parts: Files of the partitions.
        path: File to write.
        num_samples: Samples there must be.

    Raises:
        ArtifactError: A sample is missing or occurs twice.
    """
    cursors = [_Cursor(part) for part in parts]
    with _writer(path) as writer:
        for first in range(0, num_samples, _CHUNK):
            last = min(first + _CHUNK, num_samples)
            table = pa.concat_tables([_SCHEMA.empty_table(), *(c.until(last) for c in cursors)])
            sample = table.column("sample").to_numpy()
            order = np.argsort(sample)
            if not np.array_equal(sample[order], np.arange(first, last)):
                raise ArtifactError(
                    f"{path}: the parts do not hold samples {first} to {last - 1} once each; "
                    "delete the stage's folder in .running and run `rellax retrieval` again"
                )
            whole = table.take(pa.array(order)).combine_chunks()
            writer.write_table(whole, row_group_size=_FILE_GROUP)


class _Cursor:
    """A part read from its start, one row group at a time.

    There may be thousands, so none holds its file open or reads ahead.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = pq.read_metadata(path)
        self._next = 0
        self._held = _SCHEMA.empty_table()

    def until(self, last: int) -> pa.Table:
        """The rows not yet given whose sample id is below `last`."""
        taken = [_SCHEMA.empty_table()]
        while True:
            sample = self._held.column("sample").to_numpy()
            count = int(np.searchsorted(sample, last))
            taken.append(self._held.slice(0, count))
            self._held = self._held.slice(count)
            if count < sample.size or self._next == self._metadata.num_row_groups:
                return pa.concat_tables(taken)
            with pq.ParquetFile(self._path, metadata=self._metadata, pre_buffer=False) as file:
                self._held = file.read_row_group(self._next, use_threads=False)
            self._next += 1


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        _SCHEMA,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding=_ENCODING,
    )


def _column(path: Path, name: str) -> NDArray[Any]:
    values: NDArray[Any] = pq.read_table(path, columns=[name]).column(name).to_numpy()
    return values
