from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.config import Recipe, parse_recipe
from rellax_ds.partitions import process
from rellax_ds.shards.read import ShardReader
from rellax_ds.shards.write import ShardWorker
from rellax_ds.stages.shards import STAGE, partitions, settings
from rellax_ds.stages.stage import StageContext
from rellax_ds.tables import write_tables
from rellax_ds.testing import made_recommender, made_tables, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    shards = {"train_rows": 40, "valid_rows": 5, "test_rows": 9, "samples_per_shard": 16}
    backbone = tiny_tokenizer(tmp_path / "backbone")
    (backbone / "config.json").write_text("{}")
    document = {
        "name": "t",
        "shards": {**shards, "chat": False, "history_length": 4},
        "model": {"backbone": str(backbone)},
    }
    return parse_recipe(document, "test")


@pytest.fixture
def work(tmp_path: Path, recipe: Recipe) -> WorkDir:
    """A run with committed tables and made-up recommender outputs."""
    work = WorkDir(tmp_path / "run")
    tables = made_tables(tmp_path / "raw", num_users=12, num_items=20, num_events=200)
    write_tables(tables, work.open("tables", {"t": "1"}, {}).begin())
    work.open("tables", {"t": "1"}, {}).commit({})
    made_recommender(work.open("crm", {"c": "1"}, {}).begin(), tables)
    work.open("crm", {"c": "1"}, {}).commit({})
    return work


def change(recipe: Recipe, **sections: dict[str, object]) -> Recipe:
    document = recipe.model_dump(mode="json")
    for name, values in sections.items():
        document[name] |= values
    return parse_recipe(document, "test")


def test_inputs_hold_retrieval_only_when_a_prompt_shows_it(recipe: Recipe) -> None:
    assert STAGE.inputs(recipe) == ("tables", "crm")
    assert "retrieval" in STAGE.inputs(change(recipe, shards={"history": "mixed"}))


def test_key_follows_what_a_prompt_is_made_of_and_nothing_else(
    recipe: Recipe, work: WorkDir, tmp_path: Path
) -> None:
    before = STAGE.parts(recipe, work)
    assert STAGE.parts(change(recipe, train={"epochs": 9}, model={"rank": 4}), work) == before
    for changed in (
        change(recipe, model={"spa": False}),
        change(recipe, shards={"max_tokens": 100}),
        change(recipe, data={"label_threshold": 2.0}),
        change(recipe, data={"label_inclusive": True}),
    ):
        assert STAGE.parts(changed, work) != before
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        'history: "{title}{soft}\\n"\ntarget: "{soft}?"\nanswers: {"yes": " Yes", "no": " No"}'
    )
    own = change(recipe, shards={"template": str(mine)})
    first = STAGE.parts(own, work)
    mine.write_text(mine.read_text().replace("?", "!"))
    assert STAGE.parts(own, work) != first


@pytest.mark.ray
@pytest.mark.slow
def test_stage_on_ray_equals_its_partitions_done_one_by_one(
    recipe: Recipe, work: WorkDir, tmp_path: Path
) -> None:
    manifest = STAGE.run(recipe, work)
    folder = work.stage_dir("shards")
    assert manifest.counts["train"]["rows"] == 40
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.endswith(".tar")} == {
        "crm.safetensors",
        "index.json",
        "manifest.json",
        "samples.parquet",
    }
    reader = ShardReader.open(folder, "train")
    assert len(reader) == 40
    assert STAGE.run(recipe, work) == manifest

    rows = [[int(key), "recent"] for key in reader.keys]
    context = StageContext(recipe, work, folder, "k")
    worker = ShardWorker(**settings(context))
    for part in partitions({"train": rows, "valid": [], "test": []}, 16):
        process(worker, part, tmp_path / "alone", "k")
        name = f"{part.name}.tar"
        digests = [
            hashlib.sha256((where / name).read_bytes()).hexdigest()
            for where in (folder, tmp_path / "alone")
        ]
        assert digests[0] == digests[1]
