"""The data path at scale: stages 1 to 5 on made-up logs, each in a process of its own.

A log has planted topics, so quality can be asserted with speed: the gate checks row counts, that
retrieved events share the target's topic more often than the latest ones, and on the real
MovieLens-100K (if its files are there) that retrieved histories are less mixed and grow more slowly
mixed with K than recent ones.

Times are those of the manifests: a stage from its start to its commit, with Ray's start. The log is
generated in memory before stage 1's clock starts. Memory is the proportional set size of the
stage's whole process tree, Ray included, sampled: what the machine must have. The encoder and the
tokenizer are a random two-layer model's, so stage 2's speed is that of its plumbing; `--encoder`
takes a real one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml

from benchmarks.report import Report, parser
from rellax_ds import assets, runtime, schema
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import DataConfig, Recipe, load_recipe
from rellax_ds.errors import AssetError
from rellax_ds.partitions import connect, disconnect
from rellax_ds.retrieval import partition
from rellax_ds.shards import pool
from rellax_ds.tables import split, synthetic, write_tables
from rellax_ds.testing import tiny_causal_lm

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tables", "embeddings", "retrieval", "crm", "shards")
UNITS = ("events", "items", "samples", "samples", "prompts")
SEED = 0
SCORED = 20_000  # test samples whose topics are compared
SAMPLING_SECONDS = 0.25
SCALING_ROUNDS = 3


@dataclass
class Cost:
    """What a stage took: seconds of its manifest, gibibytes of its process tree, rows."""

    seconds: float
    gib: float
    rows: int


def main() -> int:
    """Run the sizes and print their figures; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", nargs="+", default=["1e5", "1e6"], metavar="EVENTS")
    arguments.add_argument("--encoder", default="backbone", help="asset, name or folder")
    arguments.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    runtime.prepare()
    if options.generate is not None:
        return generate(options.generate, options.sizes[0])
    report = Report(f"data path {' '.join(options.sizes)}")
    with tempfile.TemporaryDirectory(prefix="rellax-data-path-") as name:
        folder = Path(name)
        for size in options.sizes:
            work = WorkDir(folder / size)
            measure(report, write_recipe(folder, size, options.encoder), work, size)
        measure_scaling(report, work, options.sizes[-1])
        measure_heterogeneity(report, folder)
    return report.finish(options.report)


def write_recipe(folder: Path, size: str, encoder: str) -> Path:
    """The recipe of a size; one epoch of the recommender, the published number of shots."""
    backbone = tiny_causal_lm(folder / "llm")
    document = {
        # A random causal model carries to every later token what a text begins with: the topic.
        "embeddings": {"encoder": encoder, "text": "{genre}. {title}"},
        "crm": {"max_epochs": 1, "batch_size": 4096},
        "shards": {
            "history": "retrieved",
            "train_rows": 8192,
            "valid_rows": 2048,
            "test_rows": 2048,
        },
        "model": {"backbone": str(backbone)},
    }
    path = folder / f"data_path_{size}.yaml"
    path.write_text(yaml.safe_dump({"description": "a made-up log", **document}), "utf-8")
    return path


def measure(report: Report, recipe_path: Path, work: WorkDir, size: str) -> None:
    """Run the stages of one size, check what they wrote and add the figures."""
    spec = synthetic.shape(size)
    arguments = ["--recipe", str(recipe_path), "--work-dir", str(work.root)]
    costs = {}
    for stage in STAGES:
        command = ["-m", "rellax_ds.cli", stage, *arguments]
        if stage == "tables":
            command = ["-m", "benchmarks.data_path", "--generate", str(work.root), "--sizes", size]
        gib = run([sys.executable, *command])
        manifest = work.require(stage)
        costs[stage] = Cost(manifest.seconds, gib, rows_of(stage, manifest.counts))
        runtime.logger.info("%s, %s: %.1f s, %.2f GiB", size, stage, manifest.seconds, gib)
    check_rows(report, load_recipe(recipe_path), work, spec, costs)
    shares = topic_shares(work, spec)
    report.check(
        shares["retrieved"] > shares["recent"],
        f"{size}: {shares['retrieved']:.3f} of the retrieved events share the target's topic, "
        f"{shares['recent']:.3f} of the recent",
    )
    seconds = sum(cost.seconds for cost in costs.values())
    report.figures[f"samples_per_second_{size}"] = costs["retrieval"].rows / seconds
    report.figures[f"peak_gib_{size}"] = max(cost.gib for cost in costs.values())
    report.figures[f"seconds_{size}"] = seconds
    for kind, share in shares.items():
        report.figures[f"topic_share_{kind}_{size}"] = share
    rows = [
        [stage, cost.seconds, f"{cost.rows} {unit}", cost.rows / cost.seconds, cost.gib]
        for (stage, cost), unit in zip(costs.items(), UNITS, strict=True)
    ]
    report.body.append(f"{size} events: {spec.num_users} users, {spec.num_items} items")
    report.table(["stage", "seconds", "rows", "rows/s", "peak GiB"], rows)


def generate(root: Path, size: str) -> int:
    """Stage 1 on a generated log, in this process: commit the tables, timed from the log on."""
    log = synthetic.raw_log(synthetic.shape(size), SEED)
    attempt = WorkDir(root).open("tables", {"log": f"{size} seed {SEED}"}, {})
    folder = attempt.begin()
    tables = split.build_tables(log, DataConfig())
    write_tables(tables, folder)
    attempt.commit({"events": tables.events.num_rows, "samples": tables.samples.num_rows})
    return 0


def run(command: Sequence[str]) -> float:
    """Run a process to its end; returns the peak memory of it and its descendants, in GiB."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=runtime.child_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak = [0.0]
        sampler = threading.Thread(target=watch, args=(child.pid, peak))
        sampler.start()
        status = child.wait()
        sampler.join()
        if status:
            output.seek(0)
            raise SystemExit(output.read().decode(errors="replace")[-4000:])
    return peak[0]


def watch(pid: int, peak: list[float]) -> None:
    """Sample a process tree until its root is gone; keeps the largest sum in `peak[0]`."""
    root = psutil.Process(pid)
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        total = 0
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                # Memory that processes share counts once, divided among them.
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak[0] = max(peak[0], total / 2**30)
        time.sleep(SAMPLING_SECONDS)


def rows_of(stage: str, counts: dict[str, Any]) -> int:
    """Rows that a stage's rate refers to, see `UNITS`."""
    if stage == "shards":
        return sum(int(counts[split]["rows"]) for split in schema.SPLITS)
    return int(counts[UNITS[STAGES.index(stage)]])


def check_rows(
    report: Report, recipe: Recipe, work: WorkDir, spec: synthetic.Spec, costs: dict[str, Cost]
) -> None:
    """Every stage must hold exactly the rows that the log implies."""
    num_samples = spec.num_events - recipe.data.min_history * spec.num_users
    shards = recipe.shards
    shots = shards.train_rows + (shards.valid_rows or 0) + (shards.test_rows or 0)
    expected = (spec.num_events, spec.num_items, num_samples, num_samples, shots)
    for (stage, cost), rows in zip(costs.items(), expected, strict=True):
        report.check(cost.rows == rows, f"{stage} has {cost.rows} rows, not {rows}")
    retrieved = pq.read_metadata(work.stage_dir("retrieval") / "retrieved.parquet").num_rows
    logits = np.load(work.stage_dir("crm") / "logits.npy", mmap_mode="r")
    report.check(retrieved == len(logits) == num_samples, "a stage lacks samples")
    report.check(bool(np.isfinite(logits).all()), "the recommender's logits are not finite")


def topic_shares(work: WorkDir, spec: synthetic.Spec) -> dict[str, float]:
    """How many of the K events share the target's topic, over the last test samples."""
    tables = work.stage_dir("tables")
    item = pq.read_table(tables / "events.parquet", columns=["item"])["item"].to_numpy()
    topic = synthetic.item_topics(spec, SEED)[item]
    num_samples = pq.read_metadata(tables / "samples.parquet").num_rows
    rows = np.arange(max(0, num_samples - SCORED), num_samples)
    samples = pool.take_rows(tables / "samples.parquet", ["event", "history_end"], rows)
    target = topic[samples["event"].to_numpy()]
    path = work.stage_dir("retrieval") / "retrieved.parquet"
    lists = pool.take_rows(path, ["events"], rows)["events"].combine_chunks()
    counts = np.diff(lists.offsets.to_numpy())
    row = np.repeat(np.arange(rows.size), counts)
    within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    recent = samples["history_end"].to_numpy()[row] - 1 - within
    return {
        "recent": float((topic[recent] == target[row]).mean()),
        "retrieved": float((topic[lists.flatten().to_numpy()] == target[row]).mean()),
    }


class Searcher:
    """A retrieval worker as a Ray actor."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Map the columns."""
        self._worker = partition.Retriever(**settings)

    def run(self, part: Any, directory: str) -> int:
        """Search one partition; returns its samples."""
        return int(self._worker(part, Path(directory))["samples"])


def measure_scaling(report: Report, work: WorkDir, size: str) -> None:
    """SUBR's partitions on one and on two Ray workers that are already warm."""
    import ray
    from ray.util import ActorPool

    report.check(runtime.num_cpus() >= 2, "scaling to two workers needs two cores")
    columns = work.root / "columns"
    vectors = work.stage_dir("embeddings") / "item_vectors.npy"
    partition.prepare(work.stage_dir("tables"), vectors, columns)
    num_samples = pq.read_metadata(work.stage_dir("tables") / "samples.parquet").num_rows
    # Many small parts, so that both workers end together.
    parts = partition.cut(columns, max(1, num_samples // 64))
    settings = {"columns": str(columns), "vectors_path": str(vectors), "num_retrieved": 30}
    connect()
    try:
        actors = [ray.remote(num_cpus=1)(Searcher).remote(settings) for _ in range(2)]
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for round_ in range(SCALING_ROUNDS + 1):
            for workers in (1, 2) if round_ else (2,):
                begin = time.perf_counter()
                found = ActorPool(actors[:workers]).map_unordered(
                    lambda actor, part: actor.run.remote(part, str(work.root)), parts
                )
                done = sum(found)
                report.check(done == num_samples, f"{workers} workers searched {done} samples")
                if round_:
                    seconds[workers].append(time.perf_counter() - begin)
    finally:
        disconnect()
    one, two = (float(np.median(seconds[workers])) for workers in (1, 2))
    report.figures["subr_ray_scaling_2"] = one / two
    report.body.append(
        f"SUBR on Ray, {size} events, {len(parts)} partitions, warm workers, median of "
        f"{SCALING_ROUNDS}: {one:.2f} s with one, {two:.2f} s with two."
    )


def measure_heterogeneity(report: Report, folder: Path) -> None:
    """Distinct genres in the K events of MovieLens-100K's test samples, by the real stages."""
    try:
        assets.resolve_dataset("movielens-100k")
        assets.resolve_model("all-minilm-l6-v2")
    except AssetError as error:
        report.body.append(f"MovieLens-100K is left out: {error}")
        return
    path = folder / "ml100k.yaml"
    path.write_text("description: MovieLens-100K as published\n", "utf-8")
    work = WorkDir(folder / "ml100k")
    for stage in STAGES[:3]:
        command = ["-m", "rellax_ds.cli", stage, "--recipe", str(path)]
        run([sys.executable, *command, "--work-dir", str(work.root)])
    found = work.require("retrieval").counts["heterogeneity"]
    at = sorted(int(k) for k in found["recent"])
    values = {kind: [float(by_k[str(k)]) for k in at] for kind, by_k in found.items()}
    report.table(["MovieLens-100K, K", *map(str, at)], [[k, *v] for k, v in values.items()])
    below = all(ours < theirs for ours, theirs in zip(*reversed(values.values()), strict=True))
    report.check(below, "a retrieved history of MovieLens-100K is as mixed as the recent one")
    growth = {kind: row[-1] - row[0] for kind, row in values.items()}
    report.check(growth["retrieved"] < growth["recent"], "retrieved histories grow mixed faster")
    for kind, value in growth.items():
        report.figures[f"heterogeneity_growth_{kind}"] = value
    shutil.rmtree(work.root)


if __name__ == "__main__":
    raise SystemExit(main())
