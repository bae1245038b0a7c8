"""SUBR against the published algorithm, against the bare products it could be made of, and at size.

Default, on an ML-1M-shaped log: the published way takes a data-frame row at a time, gathers the
history's vectors by an id map, multiplies, sorts everything and keeps K; the limit is the time of
nothing but float32 matrix products and `topk` on the same user and prefix blocks, without gather,
mask or output. All three run in turns in one process and on all cores, each once to warm up and
once for the clock. Gate: equal results on every sampled row.

`--shape ml25m`: the whole search of an ML-25M-shaped log in a process of its own, from columns on
disk to the merged table on disk, and its peak memory. Gate: sampled rows against brute force.
`--linear`: seconds against scored pairs over logs of growing histories.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import Report, parser
from rellax_ds import runtime, schema
from rellax_ds.partitions import process
from rellax_ds.retrieval import partition
from rellax_ds.retrieval.similarity import SimilarityCache, quantise
from rellax_ds.retrieval.subr import retrieve
from rellax_ds.tables import synthetic

if TYPE_CHECKING:
    from collections.abc import Callable

DIMENSIONS, K, MIN_HISTORY, SEED = 512, 30, 5, 42
SAMPLED = 2000
BLOCK_ROWS = 256
RUNS = 5


def main() -> int:
    """Run the chosen comparison."""
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="ml1m", choices=sorted(synthetic.SHAPES))
    arguments.add_argument("--linear", action="store_true", help="cost against scored pairs")
    arguments.add_argument("--search", type=Path, help="internal: search the log in this folder")
    options = arguments.parse_args()
    if options.search:
        search(options.search)
        return 0
    if options.linear:
        return linear().finish(options.report)
    if options.shape == "ml25m":
        return at_size(options.shape).finish(options.report)
    return compare(options.shape).finish(options.report)


class Log:
    """A generated log with its samples in event order."""

    def __init__(self, spec: synthetic.Spec) -> None:
        columns = synthetic.event_columns(spec, SEED)
        self.item, self.user_start = columns["item"], columns["user_start"]
        event = np.arange(spec.num_events)
        start = np.repeat(self.user_start[:-1], np.diff(self.user_start))
        self.event = np.flatnonzero(event - start >= MIN_HISTORY)
        self.start, self.end = start[self.event], self.event
        self.target = self.item[self.event]
        self.vectors = synthetic.item_vectors(spec, SEED, DIMENSIONS)

    @property
    def pairs(self) -> int:
        """Scored (target, behaviour) pairs."""
        return int((self.end - self.start).sum())


def compare(shape: str) -> Report:
    """Ours, the limit and the published way in turns."""
    report = Report(f"subr {shape}")
    log, threads = Log(synthetic.shape(shape)), runtime.num_cpus()
    torch.set_num_threads(threads)
    rows = np.sort(np.random.default_rng(SEED).choice(log.event.size, SAMPLED, replace=False))
    frame = published_frame(log, rows)
    blocks = user_blocks(log)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: ours(log, threads), log.event.size),
        "limit": (lambda: bare_limit(log, blocks), log.event.size),
        "published": (lambda: published(frame, log.vectors), SAMPLED),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(RUNS):
        for name, (run, samples) in ways.items():
            run()  # in every turn: what ran before it leaves caches and clocks in its own state
            seconds, results[name] = timed(run)
            times[name].append(seconds / samples)
    (offsets, events, _), kept = results["ours"], results["published"]
    found = [events[offsets[n] : offsets[n + 1]] - log.start[n] for n in rows]
    check(report, log, rows, found, kept)
    median = {name: statistics.median(values) for name, values in times.items()}
    report.figures = {
        "subr_speedup_vs_published": median["published"] / median["ours"],
        "subr_share_of_limit": median["limit"] / median["ours"],
        "subr_samples_per_second": 1 / median["ours"],
    }
    report.body.append(
        f"{log.event.size} samples, {log.pairs} scored pairs, d {DIMENSIONS}, K {K}, float32 "
        f"products in the limit, {threads} threads; medians of {RUNS} turns."
    )
    report.table(
        ["way", "samples/s", "slowest", "fastest"],
        [
            [name, 1 / median[name], 1 / max(values), 1 / min(values)]
            for name, values in times.items()
        ],
    )
    return report


def ours(log: Log, threads: int) -> tuple[Any, Any, Any]:
    """The engine from raw unit vectors on: rounding, cache and search."""
    vectors = quantise(log.vectors)
    cache = SimilarityCache.build(vectors, log.item, log.pairs)
    return retrieve(
        vectors, log.item, log.target, log.start, log.end, K, cache=cache, num_threads=threads
    )


def published_frame(log: Log, rows: np.ndarray[Any, Any]) -> pl.DataFrame:
    """Sampled rows as the published preprocessing stores them: a list of ids for every sample."""
    history = [log.item[log.start[n] : log.end[n]].astype(str).tolist() for n in rows]
    return pl.DataFrame({"item": log.target[rows].astype(str), "history": history})


def published(frame: pl.DataFrame, vectors: np.ndarray[Any, Any]) -> list[list[int]]:
    """The published algorithm in our words: positions of the K most similar, in time order."""
    row_of = {str(n): n for n in range(len(vectors))}
    kept = []
    for row in frame.iter_rows(named=True):
        behaviours = vectors[[row_of[name] for name in row["history"]]]
        similarity = behaviours @ vectors[row_of[row["item"]]]
        kept.append(sorted(np.argsort(-similarity)[:K].tolist()))
    return kept


def user_blocks(log: Log) -> list[tuple[int, int, int]]:
    """(first event, first target, last target) of blocks of one user's targets."""
    return [
        (int(first), int(row), int(min(row + BLOCK_ROWS, last)))
        for first, last in zip(log.user_start, log.user_start[1:], strict=False)
        for row in range(int(first) + MIN_HISTORY, int(last), BLOCK_ROWS)
    ]


def bare_limit(log: Log, blocks: list[tuple[int, int, int]]) -> None:
    """Matrix product and top-k of every block, on vectors that are already gathered."""
    longest = int(np.diff(log.user_start).max())
    gathered = torch.from_numpy(log.vectors[log.item[:longest]])
    for start, first, last in blocks:
        scores = gathered[first - start : last - start] @ gathered[: last - start].T
        scores.topk(min(K, last - start), dim=1)


def check(
    report: Report, log: Log, rows: Any, found: list[np.ndarray[Any, Any]], kept: list[list[int]]
) -> None:
    """Equal positions, except where the published float32 sums cannot tell two items apart."""
    different = 0
    for n, ours_, theirs in zip(rows, found, kept, strict=True):
        behaviours = log.vectors[log.item[log.start[n] : log.end[n]]].astype(np.float64)
        similarity = behaviours @ log.vectors[log.target[n]].astype(np.float64)
        close = np.isclose(np.sort(similarity[ours_]), np.sort(similarity[theirs]), atol=1e-6)
        different += not close.all()
    report.check(not different, f"{different} of {len(rows)} sampled rows differ")


def at_size(shape: str) -> Report:
    """Search a log that does not fit twice, in a process of its own."""
    report = Report(f"subr {shape}")
    with tempfile.TemporaryDirectory(prefix="rellax-subr-") as name:
        folder = Path(name)
        log = Log(synthetic.shape(shape))
        write_columns(log, folder)
        command = [sys.executable, "-m", "benchmarks.subr", "--search", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        spot_check(report, log, folder / "retrieved.parquet")
        size = (folder / "retrieved.parquet").stat().st_size
    report.figures = {
        f"subr_{shape}_peak_gib": facts["peak"] / 2**30,
        f"subr_{shape}_seconds": sum(facts["seconds"].values()),
        f"subr_{shape}_samples_per_second": log.event.size / sum(facts["seconds"].values()),
    }
    report.check(facts["peak"] < 6 * 2**30, "peak memory is not below 6 GiB")
    report.body.append(
        f"{log.event.size} samples, {log.pairs} scored pairs, longest history "
        f"{int((log.end - log.start).max())}, d {DIMENSIONS}, K {K}; {facts['partitions']} "
        f"partitions on {runtime.num_cpus()} threads of one process; the result has "
        f"{size / 2**30:.2f} GiB. {facts['cached']:.1%} of the events are of cached items."
    )
    report.table(["step", "seconds"], [[k, float(v)] for k, v in facts["seconds"].items()])
    return report


def write_columns(log: Log, folder: Path) -> None:
    """The columns of stages 1 and 2 that retrieval reads; sample ids in a seeded order."""
    order = np.random.default_rng(SEED).permutation(log.event.size)
    samples = {
        "event": log.event[order],
        "history_start": log.start[order],
        "history_end": log.end[order],
    }
    pq.write_table(pa.table(samples), folder / "samples.parquet")
    pq.write_table(pa.table({"item": log.item}), folder / "events.parquet")
    np.save(folder / "vectors.npy", log.vectors)


def search(folder: Path) -> None:
    """Prepare, search and merge; print seconds of each and the peak of this process."""
    seconds = {}
    columns, vectors = folder / "columns", folder / "vectors.npy"
    seconds["prepare"], _ = timed(lambda: partition.prepare(folder, vectors, columns))
    worker = partition.Retriever(columns=str(columns), vectors_path=str(vectors), num_retrieved=K)
    parts = partition.cut(columns, 1 << 16)

    def run_all() -> list[Any]:
        with ThreadPoolExecutor(runtime.num_cpus()) as pool:
            return list(pool.map(lambda part: process(worker, part, folder, "key"), parts))

    seconds["search"], _ = timed(run_all)
    paths = [folder / f"{part.name}.parquet" for part in parts]
    count = pq.read_metadata(folder / "samples.parquet").num_rows
    seconds["merge"], _ = timed(lambda: partition.merge(paths, folder / "retrieved.parquet", count))
    place = np.load(columns / "cache_place.npy")
    facts = {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "partitions": len(parts),
        "cached": float((place[np.load(columns / "item.npy")] >= 0).mean()),
    }
    print(json.dumps(facts))


def spot_check(report: Report, log: Log, path: Path) -> None:
    """Rows of the file against brute force on the same log."""
    order = np.random.default_rng(SEED).permutation(log.event.size)
    file = pq.ParquetFile(path)
    report.check(file.metadata.num_rows == log.event.size, "the table misses samples")
    group = file.read_row_group(file.num_row_groups // 2)
    schema.check_table(group, schema.RETRIEVED, str(path))
    wrong = 0
    for row in group.slice(0, 200).to_pylist():
        n = order[row["sample"]]
        history = log.item[log.start[n] : log.end[n]]
        whole = np.rint(log.vectors[[log.target[n], *history]].astype(np.float64) * 2**26)
        score = (whole[1:] @ whole[0] / 2**52).astype(np.float32)
        best = np.lexsort((-np.arange(score.size), -score))[:K]
        wrong += row["events"] != (log.start[n] + np.sort(best)).tolist()
    report.check(not wrong, f"{wrong} of 200 rows differ from brute force")


def linear() -> Report:
    """Seconds against scored pairs, one thread, histories growing eightfold."""
    report = Report("subr linear")
    rows, costs = [], []
    for users in (8000, 4000, 2000, 1000):
        spec = synthetic.Spec(users, 3706, 800_000, max_events=3000, spread=0.3)
        log = Log(spec)
        vectors = quantise(log.vectors)
        cache = SimilarityCache.build(vectors, log.item, log.pairs)

        def run(log: Log = log, vectors: Any = vectors, cache: Any = cache) -> Any:
            return retrieve(vectors, log.item, log.target, log.start, log.end, K, cache=cache)

        run()
        seconds = statistics.median(timed(run)[0] for _ in range(RUNS))
        costs.append(seconds / log.pairs * 1e9)
        rows.append([users, log.event.size, log.pairs, seconds, costs[-1]])
    report.table(["users", "samples", "pairs", "seconds", "ns a pair"], rows)
    report.figures = {"subr_cost_growth": costs[-1] / costs[0]}
    report.check(costs[-1] <= 1.2 * costs[0], "cost grows faster than scored pairs")
    return report


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    sys.exit(main())
