from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.config import Recipe, parse_recipe
from rellax_ds.errors import ArtifactError
from rellax_ds.schema import RETRIEVED
from rellax_ds.stages.crm import STAGE
from rellax_ds.tables import Tables, write_parquet, write_tables
from rellax_ds.testing import made_tables

SETTINGS = {"embedding_dim": 8, "hidden_dim": 16, "max_epochs": 1, "history_length": 8}


def recipe(**changes: object) -> Recipe:
    return parse_recipe({"name": "made", "crm": {**SETTINGS, **changes}}, "test")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return made_tables(tmp_path / "raw")


@pytest.fixture
def work(tmp_path: Path, tables: Tables) -> WorkDir:
    work = WorkDir(tmp_path / "run")
    run = work.open("tables", {"code": "1"}, {})
    write_tables(tables, run.begin())
    run.commit({})
    return work


def commit_retrieved(work: WorkDir, tables: Tables) -> None:
    start, end = (tables.samples[name].to_numpy() for name in ("history_start", "history_end"))
    events = [np.arange(a, b)[::2] for a, b in zip(start, end, strict=True)]
    columns = [
        pa.array(np.arange(len(events)), RETRIEVED["sample"]),
        pa.array(events, RETRIEVED["events"]),
        pa.array([np.full(len(row), 0.5) for row in events], RETRIEVED["similarity"]),
    ]
    run = work.open("retrieval", {"code": "1"}, {})
    path = run.begin() / "retrieved.parquet"
    write_parquet(pa.table(columns, names=list(RETRIEVED)), path)
    run.commit({})


def test_crm_stage_commits_its_files_and_is_skipped_until_it_matters(
    work: WorkDir, tables: Tables
) -> None:
    manifest = STAGE.run(recipe(), work)
    assert set(manifest.files) == {
        "model.safetensors",
        "model.json",
        "item_table.npy",
        "instances.npy",
        "logits.npy",
        "metrics.json",
    }
    metrics = json.loads((work.stage_dir("crm") / "metrics.json").read_text())
    assert manifest.counts["test_auc"] == metrics["test"]["auc"]
    assert manifest.counts["samples"] == tables.samples.num_rows
    assert STAGE.run(recipe(), work) == manifest
    assert STAGE.run(recipe(dropout=0.2), work).key != manifest.key


def test_crm_stage_same_recipe_twice_gives_the_same_bytes(work: WorkDir) -> None:
    first = STAGE.run(recipe(), work)
    (work.stage_dir("crm") / "logits.npy").unlink()
    assert STAGE.run(recipe(), work).content == first.content


def test_crm_stage_sim_needs_retrieval_and_reads_it(work: WorkDir, tables: Tables) -> None:
    with pytest.raises(ArtifactError, match="rellax retrieval"):
        STAGE.run(recipe(kind="sim"), work)
    commit_retrieved(work, tables)
    recent = STAGE.run(recipe(), work)
    sim = STAGE.run(recipe(kind="sim"), work)
    assert sim.parts["input retrieval"] == work.require("retrieval").content
    assert sim.files["logits.npy"] != recent.files["logits.npy"]
