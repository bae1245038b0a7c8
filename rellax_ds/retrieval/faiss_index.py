"""Top-K over one very long history with FAISS: what `subr` does by blocks of samples, as an index
that grows by an event at a time.

`subr` scores every pair of target and earlier event, which is the right thing for a log. From 10^5
events a user on, and online, where one target meets a history that has just grown, an index is:
`flat` scans in float32 and is exact, `ivf` and `hnsw` look at a part of the history.

FAISS only proposes. Every proposed event is scored again in `subr`'s arithmetic (whole numbers,
exact sums, the cosine rounded to float32) and ranked by (similarity, then the later event), so a
returned similarity never depends on the kind of index. For `flat` the error of FAISS's own scores
is bounded: a query whose K-th event lies within that bound of an event left out, as when an item
repeats often, is answered from all events above the bound, and so equals `subr`'s answer to the
last bit. For the other kinds recall is a number to measure: `python -m benchmarks.faiss_recall`.

A query sees the first `end` events only, by a selector inside FAISS. The lists of `ivf` are fitted
on a catalogue, not on a history. The links of `hnsw` are not: searched after later events were
added, it still returns none of them, but may take another way through the earlier ones.

This module must stay free of torch: faiss-gpu and torch bring CUDA runtimes of different
generations, so the index lives in a Ray actor of its own (`start_actor`) and speaks numpy.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rellax_ds import runtime
from rellax_ds.errors import ConfigError, KernelUnavailableError, TableError
from rellax_ds.partitions import connect

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]

Kind = Literal["flat", "ivf", "hnsw"]

_SCALE = float(2**26)
_MARGIN = 32  # proposals beyond K: enough unless many events tie for the last place
_BLOCK_ROWS = 256
_TAIL = 512  # events by which the ends of one block's queries may differ
_TILE_ROWS = 1 << 12
_TILE_NUMBERS = 1 << 23
_NORM_TOLERANCE = 1e-3
_MOST_GPU_PROPOSALS = 2048


@dataclass(frozen=True)
class IndexOptions:
    """How an index is built and searched.

    Attributes:
        kind: `flat` (exact), `ivf` (inverted lists) or `hnsw` (a graph of neighbours).
        num_lists: Lists of `ivf`; a catalogue of 39 vectors or more a list fits them well.
        num_probes: Lists of `ivf` that a query reads.
        num_links: Neighbours of a node of `hnsw`.
        build_width: Candidates that `hnsw` keeps while it inserts.
        search_width: Candidates that `hnsw` keeps while it searches.
    """

    kind: Kind = "flat"
    num_lists: int = 256
    num_probes: int = 32
    num_links: int = 32
    build_width: int = 80
    search_width: int = 256


class HistoryIndex:
    """The events of one history in order of time, searchable while it grows."""

    def __init__(
        self,
        dimensions: int,
        options: IndexOptions | None = None,
        catalogue: Floats | None = None,
    ) -> None:
        """Make an empty index, on a GPU if FAISS has one (`hnsw` has no GPU form).

        Args:
            dimensions: d.
            options: Kind and effort; exact by default.
            catalogue: Item vectors, float32 [num_items, d], that the lists of `ivf` are fitted on.

        Raises:
            ConfigError: `ivf` without a catalogue of at least `num_lists` items.
            KernelUnavailableError: FAISS is not installed.
        """
        self.options = options or IndexOptions()
        self.dimensions = dimensions
        self._faiss = _import_faiss()
        self._index = self._empty(catalogue)
        self._vectors = np.empty((0, dimensions), np.float32)
        self._size = 0
        has_gpu = self.options.kind != "hnsw" and self._faiss.get_num_gpus()
        # Shared by all copies: each of its kind takes a share of the GPU's memory.
        self._resources = self._faiss.StandardGpuResources() if has_gpu else None
        self._gpu_index = self._on_gpu()

    @classmethod
    def build(
        cls,
        vectors: Floats,
        options: IndexOptions | None = None,
        catalogue: Floats | None = None,
    ) -> HistoryIndex:
        """The index of a whole history, float32 [num_events, d]; see the class and `add`."""
        index = cls(vectors.shape[1], options, catalogue)
        index.add(vectors)
        return index

    def empty_copy(self) -> HistoryIndex:
        """An empty index with the same options and, for `ivf`, the same lists."""
        fresh = copy.copy(self)
        fresh._index = self._faiss.clone_index(self._index)
        fresh._index.reset()
        fresh._vectors = np.empty((0, self.dimensions), np.float32)
        fresh._size = 0
        fresh._gpu_index = fresh._on_gpu()
        return fresh

    @property
    def device(self) -> str:
        """Where queries over the whole history run: `cpu` or `cuda`."""
        return "cpu" if self._gpu_index is None else "cuda"

    def __len__(self) -> int:
        return self._size

    def add(self, vectors: Floats) -> None:
        """Append events that come after all others.

        Args:
            vectors: Item vectors in order of time, float32 [n, d]; unit rows, or zeros for items
                without text, which are similar to nothing.

        Raises:
            TableError: The array has another width, or a row is longer than 1.
        """
        vectors = self._checked(vectors, "an event's vector")
        size = self._size + len(vectors)
        if size > len(self._vectors):
            grown = np.empty((max(size, 2 * len(self._vectors)), self.dimensions), np.float32)
            grown[: self._size] = self._vectors[: self._size]
            self._vectors = grown
        self._vectors[self._size : size] = vectors
        self._size = size
        for index in (self._index, self._gpu_index):
            if index is not None:
                index.add(vectors)

    def search(self, queries: Floats, k: int, ends: Ints | None = None) -> tuple[Ints, Floats]:
        """The K events of the history most similar to each query.

        Args:
            queries: Vectors of targets, float32 [n, d].
            k: K.
            ends: Number of first events that each query sees, int64 [n]; by default all.

        Returns:
            Positions in the history, int64 [n, K], the most similar first and of equals the later
            first, and their cosine, float32 [n, K]; -1 and -inf where fewer than K were found.

        Raises:
            ConfigError: K is below 1.
            TableError: A query has another width or is longer than 1; an end is beyond the history.
        """
        if k < 1:
            raise ConfigError(f"faiss index: k is {k}; ask for one event or more")
        queries = self._checked(queries, "a query")
        ends = np.full(len(queries), self._size, np.int64) if ends is None else ends
        if ends.shape != (len(queries),) or ((ends < 0) | (ends > self._size)).any():
            raise TableError(
                f"faiss index: ends {ends.shape} of {len(queries)} queries must lie in 0 to "
                f"{self._size}, the events added so far; add the events first"
            )
        positions = np.full((len(queries), k), -1, np.int64)
        similarity = np.full((len(queries), k), -np.inf, np.float32)
        order = np.argsort(ends, kind="stable")
        for first, last in _blocks(ends[order]):
            rows = order[first:last]
            found, value = self._search_block(queries[rows], k, ends[rows])
            positions[rows, : found.shape[1]] = found
            similarity[rows, : found.shape[1]] = value
        return positions, similarity

    def _on_gpu(self) -> Any:
        if self._resources is None:
            return None
        return self._faiss.index_cpu_to_gpu(self._resources, 0, self._index)

    def _search_block(self, queries: Floats, k: int, ends: Ints) -> tuple[Ints, Floats]:
        """Queries whose ends lie close: the index answers for the events all of them see, the few
        events beyond are scored one and all.
        """
        prefix = int(ends.min(initial=self._size))
        whole = _quantised(queries)
        tail = np.arange(prefix, int(ends.max(initial=0)))
        tail_value = self._score_range(whole, prefix, prefix + tail.size)
        tail_value[tail >= ends[:, None]] = -np.inf

        count = min(k + max(_MARGIN, k), prefix)
        found, floor = self._propose(queries, count, prefix)
        value = self._score(whole, found)
        found = np.concatenate([found, np.broadcast_to(tail, tail_value.shape)], axis=1)
        found, value = _rank(found, np.concatenate([value, tail_value], axis=1), k)
        if self.options.kind == "flat" and count < prefix:
            reachable = (floor + self._error_bound()).astype(np.float32)
            for row in np.flatnonzero(value[:, -1] <= reachable):
                one = slice(row, row + 1)
                near = self._at_least(queries[one], float(value[row, -1]), prefix)
                near = np.concatenate([near, np.arange(prefix, ends[row])])[None]
                found[one], value[one] = _rank(near, self._score(whole[one], near), k)
        return found, value

    def _propose(self, queries: Floats, count: int, prefix: int) -> tuple[Ints, Doubles]:
        """FAISS's best `count` of the first `prefix` events, and its score of the last of them."""
        if count == 0:
            return np.zeros((len(queries), 0), np.int64), np.full(len(queries), -np.inf)
        index, parameters = self._gpu_index, None
        if index is None or prefix < self._size or count > _MOST_GPU_PROPOSALS:
            index, parameters = self._index, self._parameters(count, prefix)
        score, found = index.search(queries, count, params=parameters)
        return found, score[:, -1].astype(np.float64)

    def _at_least(self, query: Floats, similarity: float, prefix: int) -> Ints:
        """All of the first `prefix` events whose exact cosine may reach `similarity`."""
        radius = similarity - self._error_bound() - 2.0**-22
        _, _, found = self._index.range_search(query, radius, params=self._parameters(0, prefix))
        events: Ints = found
        return events

    def _score(self, whole: Doubles, found: Ints) -> Floats:
        """Exact cosine of each query with its own events, float32 [n, count]; -inf at -1."""
        value = np.empty(found.shape, np.float32)
        width = max(1, min(found.shape[1], _TILE_ROWS))
        step = max(1, _TILE_NUMBERS // (width * self.dimensions))
        for row, column in itertools.product(
            range(0, len(found), step), range(0, found.shape[1], width)
        ):
            tile = slice(row, row + step), slice(column, column + width)
            events = _quantised(self._vectors[found[tile]])
            value[tile] = _cosine((events @ whole[tile[0], :, None])[:, :, 0])
        value[found < 0] = -np.inf
        return value

    def _score_range(self, whole: Doubles, start: int, stop: int) -> Floats:
        """Exact cosine of all queries with events `start:stop`, float32 [n, stop - start]."""
        value = np.empty((len(whole), stop - start), np.float32)
        for first in range(start, stop, _TILE_ROWS):
            last = min(first + _TILE_ROWS, stop)
            product = whole @ _quantised(self._vectors[first:last]).T
            value[:, first - start : last - start] = _cosine(product)
        return value

    def _error_bound(self) -> float:
        """How far FAISS's float32 score of unit vectors may lie from the exact one: rounding of d
        products and sums in any order, and of the vectors to whole numbers.
        """
        return 1.01 * self.dimensions * 2.0**-24 + float(np.sqrt(self.dimensions)) * 2.0**-26

    def _parameters(self, count: int, prefix: int) -> Any:
        selector = self._faiss.IDSelectorRange(0, prefix)
        if self.options.kind == "ivf":
            return self._faiss.SearchParametersIVF(sel=selector, nprobe=self.options.num_probes)
        if self.options.kind == "hnsw":
            width = max(self.options.search_width, count)
            return self._faiss.SearchParametersHNSW(sel=selector, efSearch=width)
        return self._faiss.SearchParameters(sel=selector)

    def _empty(self, catalogue: Floats | None) -> Any:
        faiss, options = self._faiss, self.options
        if options.kind == "hnsw":
            index = faiss.IndexHNSWFlat(
                self.dimensions, options.num_links, faiss.METRIC_INNER_PRODUCT
            )
            index.hnsw.efConstruction = options.build_width
            return index
        flat = faiss.IndexFlatIP(self.dimensions)
        if options.kind == "flat":
            return flat
        if catalogue is None or len(catalogue) < options.num_lists:
            given = "none" if catalogue is None else f"one of {len(catalogue)} items"
            raise ConfigError(
                f"faiss index: ivf fits its {options.num_lists} lists on a catalogue of at least "
                f"as many items, {given} was given; give the item vectors or lower num_lists"
            )
        index = faiss.IndexIVFFlat(
            flat, self.dimensions, options.num_lists, faiss.METRIC_INNER_PRODUCT
        )
        index.nprobe = options.num_probes  # a copy on a GPU takes it from here
        index.cp.min_points_per_centroid = 1  # a small catalogue is no cause for a warning
        index.train(self._checked(catalogue, "an item's vector"))
        return index

    def _checked(self, vectors: Floats, what: str) -> Floats:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise TableError(
                f"faiss index: {what} has the shape {vectors.shape[1:]}, the index "
                f"({self.dimensions},); use vectors of one encoder"
            )
        vectors = np.ascontiguousarray(vectors, np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(norms <= 1.0 + _NORM_TOLERANCE))
        if wrong.size:
            raise TableError(
                f"faiss index: {what}, row {wrong[0]}, has length {norms[wrong[0]]:.4g}; "
                "divide vectors by their length"
            )
        return vectors


class FaissActor:
    """The histories of many users, each in an index of its own; what the Ray actor runs."""

    def __init__(
        self,
        dimensions: int,
        options: IndexOptions | None = None,
        catalogue: Floats | None = None,
        num_threads: int = 1,
    ) -> None:
        """Hold no history yet.

        Args:
            dimensions: d.
            options: Kind and effort, for every history.
            catalogue: See `HistoryIndex`.
            num_threads: Threads of FAISS in this process.
        """
        _import_faiss().omp_set_num_threads(num_threads)
        self._empty = HistoryIndex(dimensions, options, catalogue)
        self._histories: dict[int, HistoryIndex] = {}
        runtime.logger.info("faiss index: searches on %s", self._empty.device)

    def device(self) -> str:
        """Where whole histories are searched: `cpu` or `cuda`."""
        return self._empty.device

    def add(self, user: int, vectors: Floats) -> int:
        """Append events to a user's history, see `HistoryIndex.add`; returns its new length."""
        if user not in self._histories:
            self._histories[user] = self._empty.empty_copy()
        self._histories[user].add(vectors)
        return len(self._histories[user])

    def search(
        self, user: int, queries: Floats, k: int, ends: Ints | None = None
    ) -> tuple[Ints, Floats]:
        """See `HistoryIndex.search`; a user without events has an empty history."""
        return self._histories.get(user, self._empty).search(queries, k, ends)


def start_actor(
    dimensions: int,
    options: IndexOptions | None = None,
    catalogue: Floats | None = None,
    *,
    num_cpus: int = 1,
    num_gpus: float = 0.0,
) -> Any:
    """Start a `FaissActor` on Ray, in a process that never loads torch.

    Args:
        dimensions: d.
        options: Kind and effort.
        catalogue: See `HistoryIndex`.
        num_cpus: Cores of the actor, which are the threads of FAISS.
        num_gpus: GPUs of the actor; used if faiss-gpu is installed there.

    Returns:
        The actor's handle: `ray.get(actor.add.remote(user, vectors))`,
        `ray.get(actor.search.remote(user, queries, k))`.
    """
    connect()
    import ray

    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(FaissActor)
    return remote.remote(dimensions, options, catalogue, num_cpus)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise KernelUnavailableError(
            "faiss index: FAISS is not installed; `pip install rellax-ds[cpu]`, or [gpu] for the "
            "CUDA build, not both"
        ) from None
    return faiss


def _quantised(vectors: Floats) -> Doubles:
    """Whole numbers in float64, see `similarity`, which computes the same with torch."""
    whole: Doubles = np.rint(vectors.astype(np.float64) * _SCALE)
    return whole


def _cosine(product: Doubles) -> Floats:
    """Float32 cosine of an exact product of whole numbers; adding zero makes -0 the 0 it equals."""
    return (product / _SCALE**2).astype(np.float32) + np.float32(0.0)


def _blocks(ends: Ints) -> list[tuple[int, int]]:
    """Cut ascending `ends` into runs of at most `_BLOCK_ROWS` that differ by at most `_TAIL`."""
    blocks, first = [], 0
    while first < ends.size:
        last = int(np.searchsorted(ends, ends[first] + _TAIL, side="right"))
        last = min(last, first + _BLOCK_ROWS)
        blocks.append((first, last))
        first = last
    return blocks


def _rank(found: Ints, value: Floats, k: int) -> tuple[Ints, Floats]:
    """The K best of every row: the most similar first, of equals the later; -1 where none is."""
    order = np.lexsort((-found, -value))[:, :k]
    value = np.take_along_axis(value, order, axis=1)
    return np.where(value > -np.inf, np.take_along_axis(found, order, axis=1), -1), value
