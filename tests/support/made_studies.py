"""A study whose runs are made up: real tables, planted scores, everything its reading needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rellax_ds.artifacts import write_json
from rellax_ds.evaluation.baselines import Log
from rellax_ds.schema import PREDICTIONS, RETRIEVED
from rellax_ds.study import PLAN, Run, expand, load_study, write_plan
from rellax_ds.tables import write_tables
from rellax_ds.testing import made_tables

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"model": {"interaction": "identity", "spa": False}},
    "full": {"model": {"interaction": "full", "spa": True}},
}
SIM = {
    "crm.kind": ["sim"],
    "shards.history_length": [10],
    "shards.train_rows": [100],
    "seed": [1, 2],
}
QUALITY = {"plain": 0.8, "full": 1.6}
"""How far the planted logits of likes and dislikes lie apart."""


def write_study(folder: Path, **changes: Any) -> Path:
    """A study file of two methods, two K, two numbers of shots and three seeds."""
    for name, document in RECIPES.items():
        text = yaml.safe_dump({"description": name, **document})
        (folder / f"{name}.yaml").write_text(text)
    axes = {"shards.history_length": [5, 10], "shards.train_rows": [50, 100], "seed": [1, 2, 3]}
    grids = [
        {"methods": ["plain.yaml", "full.yaml"], "axes": axes},
        {"methods": ["full.yaml"], "axes": SIM},
    ]
    contrasts = [{"part": "all of it", "method": "full", "without": "plain"}]
    document = {"description": "made up", "reference": "plain", "grids": grids}
    document |= {"contrasts": contrasts, **changes}
    path = folder / "made.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML, and has no aliases
    return path


def make_study(folder: Path, **changes: Any) -> tuple[Path, list[Run]]:
    """Write a study and finish its runs with planted scores; returns its folder and runs."""
    root = folder / "study"
    study = load_study(str(write_study(folder, **changes)))
    runs = expand(study, root)
    write_plan(study, runs, root, [run.name for run in runs])
    tables = made_tables(folder / "raw", num_users=60, num_events=3000)
    first = runs[0].work(root)
    commit(first, "tables", lambda directory: write_tables(tables, directory))
    for run in runs:
        folder = run.work(root).stage_dir("tables")
        if not folder.exists():
            folder.parent.mkdir(parents=True)
            folder.symlink_to(first.stage_dir("tables"))
        finish(run, root)
    return root, runs


def finish(run: Run, root: Path) -> None:
    """Commit made-up artefacts of what a study reads."""
    work = run.work(root)
    log = Log.read(work.stage_dir("tables"))
    noise = np.random.default_rng(run.recipe.seed).normal(size=(3, log.label.size))
    crm = 1.2 * (log.label - 0.5) + noise[0] * (0.9 if run.recipe.crm.kind == "din" else 1.4)
    commit(
        work,
        "retrieval",
        lambda directory: pq.write_table(first_events(log), directory / "retrieved.parquet"),
        heterogeneity={"recent": {"5": 3.2}, "retrieved": {"5": 2.5}},
    )
    commit(
        work,
        "crm",
        lambda directory: np.save(directory / "logits.npy", crm.astype(np.float32)),
        metrics={"holdout_start": None},
    )
    steps = [{"event": "step", "step": n, "samples_per_second": 4.0} for n in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in steps)
    commit(work, "train", lambda directory: (directory / "log.jsonl").write_text(text), run=run)
    spread = QUALITY[run.method] * (1 + 0.02 * run.recipe.shards.history_length)
    logits = spread * (log.label - 0.5) + noise[1]
    chosen = np.sort(np.random.default_rng(run.recipe.seed).permutation(held_out(log))[:500])
    table = {
        "sample": chosen,
        "user": np.unique(log.history_start, return_inverse=True)[1][chosen],
        "item": log.event_item[log.event[chosen]],
        "split": log.split[chosen],
        "label": log.label[chosen],
        "logit": logits[chosen],
    }
    arrays = {
        name: pa.array(table[name].astype(kind.to_pandas_dtype()), kind)
        for name, kind in PREDICTIONS.items()
    }
    commit(
        work,
        "predict",
        lambda directory: pq.write_table(pa.table(arrays), directory / "predictions.parquet"),
    )


def first_events(log: Log) -> pa.Table:
    """Retrieved lists that hold the first events of every history, all equally similar."""
    stop = np.minimum(log.history_end, log.history_start + 30)
    events = [np.arange(*ends) for ends in zip(log.history_start, stop, strict=True)]
    columns = {
        "sample": np.arange(stop.size),
        "events": events,
        "similarity": [np.full(found.size, 0.5) for found in events],
    }
    return pa.table({name: pa.array(list(columns[name]), kind) for name, kind in RETRIEVED.items()})


def forget(root: Path, *names: str) -> None:
    """Let runs count as not finished."""
    path = root / PLAN
    plan = json.loads(path.read_text())
    plan["finished"] = sorted(set(plan["finished"]) - set(names))
    write_json(path, plan)


def held_out(log: Log) -> Any:
    """Sample ids of valid and test."""
    return np.flatnonzero(log.split > 0)


def commit(
    work: WorkDir, stage: str, write: object = None, run: Run | None = None, **documents: object
) -> None:
    """Commit JSON files, and what `write(directory)` writes, as a stage's artefact."""
    attempt = work.open(stage, {"code": "made"}, run.recipe.model_dump(mode="json") if run else {})
    directory = attempt.begin()
    for name, document in documents.items():
        write_json(directory / f"{name}.json", document)
    if callable(write):
        write(directory)
    attempt.commit({"trained_parameters": 1000, "steps": 2})
