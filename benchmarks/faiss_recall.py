"""FAISS against the exact engine on one user of 10^5 events: agreement, recall, speed.

The log has planted topics, the targets are the user's last events, and each sees only what came
before it. The gate: the flat index returns the exact engine's events and similarities for every
target, and the approximate ones find nine of ten of them. Beside the batch, each index is driven
online: one target, then its event is added, and so on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.retrieval.faiss_index import HistoryIndex, IndexOptions
from rellax_ds.retrieval.similarity import SimilarityCache, quantise
from rellax_ds.retrieval.subr import retrieve
from rellax_ds.tables import synthetic

if TYPE_CHECKING:
    from numpy.typing import NDArray

K = 30
MINIMUM_RECALL = 0.9
ONLINE = 200


@dataclass
class Exact:
    """What the exact engine finds for the targets, and how long it takes."""

    positions: NDArray[Any]
    similarity: NDArray[Any]
    seconds: float


def main() -> int:
    """Measure the three kinds; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--events", type=int, default=100_000)
    arguments.add_argument("--targets", type=int, default=1_024)
    arguments.add_argument("--dimensions", type=int, default=384)
    options = arguments.parse_args()
    rows = history(options.events, options.dimensions)
    ends = np.arange(options.events - options.targets, options.events)
    report = Report("faiss")
    exact = search_exactly(rows, ends)
    table = [["exact", "", 1.0, 1e3 * exact.seconds / len(ends), "", ""]]
    for kind in (IndexOptions("flat"), IndexOptions("ivf"), IndexOptions("hnsw")):
        table.append(measure(report, kind, rows, ends, exact))
    report.table(
        ["index", "build s", f"recall@{K}", "ms a target", "online ms: search", "online ms: add"],
        table,
    )
    report.body.append(
        f"One user, {options.events} events of {options.dimensions} dimensions, the last "
        f"{options.targets} as targets; {runtime.num_cpus()} threads for every engine."
    )
    return report.finish(options.report)


def history(num_events: int, dimensions: int) -> NDArray[np.float32]:
    """Vectors of the user's events in order of time, [num_events, d]."""
    spec = synthetic.Spec(
        num_users=1,
        num_items=num_events * 3 // 2,
        num_events=num_events,
        min_events=num_events,
        max_events=num_events,
        num_topics=200,
    )
    item = synthetic.event_columns(spec, 0)["item"]
    # Topics that overlap: with tight ones, any index finds everything.
    return synthetic.item_vectors(spec, 0, dimensions, noise=2.0)[item]


def search_exactly(rows: NDArray[np.float32], ends: NDArray[np.int64]) -> Exact:
    """The exact engine, an event being its own item; its cache could not help and is left out."""
    vectors, item = quantise(rows), np.arange(len(rows))
    cache = SimilarityCache.build(vectors, item, 0)
    arguments = (vectors, item, ends, np.zeros_like(ends), ends, K)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        _, events, similarity = retrieve(*arguments, cache=cache)
        seconds.append(time.perf_counter() - begin)
    shape = (len(ends), K)
    return Exact(events.reshape(shape), similarity.reshape(shape), float(np.median(seconds)))


def measure(
    report: Report,
    options: IndexOptions,
    rows: NDArray[np.float32],
    ends: NDArray[np.int64],
    exact: Exact,
) -> list[Any]:
    """Figures of one kind of index, and its row of the table."""
    begin = time.perf_counter()
    index = HistoryIndex.build(rows, options, rows)
    build = time.perf_counter() - begin
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        positions, similarity = index.search(rows[ends], K, ends)
        seconds.append(time.perf_counter() - begin)
    taken = float(np.median(seconds))
    by_time = np.argsort(positions, axis=1)
    positions = np.take_along_axis(positions, by_time, axis=1)
    similarity = np.take_along_axis(similarity, by_time, axis=1)
    same = (positions == exact.positions) & (similarity == exact.similarity)
    hits = (positions[:, :, None] == exact.positions[:, None, :]).any(axis=2)
    recall = float(hits.mean())
    if options.kind == "flat":
        report.figures["faiss_flat_agreement"] = float(same.all(axis=1).mean())
        report.check(bool(same.all()), f"{np.sum(~same)} entries of flat differ from exact")
    else:
        report.figures[f"faiss_{options.kind}_recall"] = recall
        report.check(recall >= MINIMUM_RECALL, f"{options.kind} finds {recall:.3f} of the events")
    report.figures[f"faiss_{options.kind}_speedup"] = exact.seconds / taken
    search, add = drive_online(index, rows[ends[-ONLINE:]])
    report.figures[f"faiss_{options.kind}_online_ms"] = search
    return [options.kind, build, recall, 1e3 * taken / len(ends), search, add]


def drive_online(index: HistoryIndex, rows: NDArray[np.float32]) -> tuple[float, float]:
    """Median milliseconds of a search for one target and of adding one event, taking turns."""
    search, add = [], []
    for row in rows:
        begin = time.perf_counter()
        index.search(row[None], K)
        middle = time.perf_counter()
        index.add(row[None])
        search.append(middle - begin)
        add.append(time.perf_counter() - middle)
    return 1e3 * float(np.median(search)), 1e3 * float(np.median(add))


if __name__ == "__main__":
    raise SystemExit(main())
