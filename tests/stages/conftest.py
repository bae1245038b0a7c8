"""A run committed up to stage 6 without training: made log, planted CRM, a random adapter."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from rellax_ds.artifacts import WorkDir, write_json
from rellax_ds.config import Recipe, load_recipe
from rellax_ds.model import adapter_io
from rellax_ds.model.rellax import build_rellax
from rellax_ds.partitions import drop_records, process
from rellax_ds.shards import pool
from rellax_ds.shards.index import write_index
from rellax_ds.shards.read import CRM, ShardIndex
from rellax_ds.shards.write import ShardWorker, write_scale
from rellax_ds.stages import shards, tables
from rellax_ds.stages.stage import StageContext
from rellax_ds.tables import read_tables
from rellax_ds.testing import made_recommender, tiny_recipe

if TYPE_CHECKING:
    from pathlib import Path

SCORED = [
    {"event": "prompt", "step": 0, "sample": 3, "prompt": "Seen it?", "label": 1},
    {"event": "valid", "step": 0, "sample": 3, "label": 1, "probability": 0.4},
    {"event": "valid", "step": 1, "sample": 3, "label": 1, "probability": 0.6},
]
LOG = [
    {"event": "valid", "step": 0, "auc": 0.51, "log_loss": 0.7, "accuracy": 0.5},
    {"event": "step", "step": 1, "loss": 0.7},
    {"event": "valid", "step": 1, "auc": 0.55, "log_loss": 0.69, "accuracy": 0.52},
]


def commit(work: WorkDir, stage: str, write: object = None, **documents: object) -> None:
    """Commit JSON files, and what `write(directory)` writes, as a stage's artefact."""
    run = work.open(stage, {"code": "made"}, {})
    directory = run.begin()
    for name, document in documents.items():
        write_json(directory / f"{name}.json", document)
    if callable(write):
        write(directory)
    run.commit({"made": True})


def save_adapter(recipe: Recipe, index: ShardIndex, folder: Path) -> None:
    """An adapter with random values in every tensor, so that h and the slots matter."""
    torch.manual_seed(7)
    yes, no = index.answer_ids
    model = build_rellax(
        recipe.model.backbone,
        recipe.model,
        {"yes": yes, "no": no},
        index.item_width,
        index.instance_width,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    adapter_io.save(model, folder / "adapter")
    for name, lines in (("log", LOG), ("scored", SCORED)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def write_shards(recipe: Recipe, work: WorkDir) -> None:
    """Commit stage 5 as the stage does, in this process instead of on Ray."""
    run = work.open("shards", shards.STAGE.parts(recipe, work), {})
    context = StageContext(recipe, work, run.begin(), run.key)
    split_of = pool.read_splits(work.stage_dir("tables"))
    candidates = pool.training_candidates(split_of, recipe.shards, None)
    scale = context.directory / CRM
    facts = write_scale(work.stage_dir("crm"), scale, candidates)
    worker = ShardWorker(**shards.settings(context))
    rows = pool.choose_rows(split_of, recipe.shards, recipe.seed, None)
    records = [
        process(worker, part, context.directory, run.key)
        for part in shards.partitions(rows, recipe.shards.samples_per_shard)
    ]
    write_index(context.directory, records, facts | shards._facts(recipe, worker.builder))
    drop_records(context.directory, records)
    run.commit({})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, WorkDir]:
    """Recipe and work folder with stages 1 to 6 committed; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(tiny_recipe(folder))
    work = WorkDir(folder / "run")
    tables.STAGE.run(recipe, work)
    made = read_tables(work.stage_dir("tables"))
    by_k = {"5": 3.25, "10": 4.5}
    heterogeneity = {"recent": by_k, "retrieved": {k: v - 0.5 for k, v in by_k.items()}}
    commit(work, "embeddings", made={})
    commit(work, "retrieval", heterogeneity=heterogeneity)
    commit(work, "crm", lambda directory: made_recommender(directory, made))
    write_shards(recipe, work)
    index = ShardIndex.open(work.stage_dir("shards"))
    commit(work, "train", lambda directory: save_adapter(recipe, index, directory))
    return recipe, work


@pytest.fixture
def run(trained: tuple[Recipe, WorkDir], tmp_path: Path) -> tuple[Recipe, WorkDir]:
    """A copy of the trained run that a test may change."""
    recipe, work = trained
    shutil.copytree(work.root, tmp_path / "run")
    return recipe, WorkDir(tmp_path / "run")
