"""Stage 2 as a stage: `backbone` names the recipe's model, its content is part of the key, and a
second run encodes new texts only, with the bytes of a run from scratch.
"""

import numpy as np
import pyarrow as pa
import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.config import parse_recipe
from rellax_ds.stages.embeddings import STAGE
from rellax_ds.tables import write_parquet
from rellax_ds.testing import made_tables, tiny_causal_lm


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def recipe(encoder, backbone):
    document = {"embeddings": {"encoder": str(encoder)}, "model": {"backbone": str(backbone)}}
    return parse_recipe({"name": "t", **document}, "t")


def test_identities_backbone_means_the_model_of_the_recipe(model, tmp_path):
    absent = tmp_path / "absent"
    assert STAGE.identities(recipe("backbone", model)) == STAGE.identities(recipe(model, absent))


def test_identities_changed_model_file_changes_the_key(model):
    before = STAGE.identities(recipe(model, model))
    (model / "config.json").write_text("{ }")
    assert STAGE.identities(recipe(model, model)) != before


def commit_items(work, items):
    attempt = work.open("tables", {"rows": str(items.num_rows), "first": str(items[1][0])}, {})
    write_parquet(items, attempt.begin() / "items.parquet")
    attempt.commit({})


@pytest.mark.ray
@pytest.mark.slow_soak
def test_second_run_encodes_only_new_texts_and_gives_the_bytes_of_a_fresh_one(tmp_path):
    backbone = tiny_causal_lm(tmp_path / "llm")
    settings = {"encoder": "backbone", "dimensions": 8}
    document = {"name": "t", "embeddings": settings, "model": {"backbone": str(backbone)}}
    made = parse_recipe(document, "t")
    items = made_tables(tmp_path / "raw").items
    work, fresh = WorkDir(tmp_path / "work"), WorkDir(tmp_path / "fresh")

    commit_items(work, items.slice(3))
    first = STAGE.run(made, work)
    assert first.counts["encoded"] == first.counts["texts"] == 57
    commit_items(work, items)
    second = STAGE.run(made, work)
    assert second.counts["encoded"] == 3
    commit_items(fresh, items)
    whole = STAGE.run(made, fresh)
    assert whole.counts["encoded"] == 60
    assert second.files == whole.files
    assert not (work.root / ".running").exists()

    document["embeddings"]["dimensions"] = None
    third = STAGE.run(parse_recipe(document, "t"), work)
    assert third.counts["encoded"] == 0
    vectors = np.load(work.stage_dir("embeddings") / "item_vectors.npy")
    assert vectors.shape == (60, 32)


@pytest.mark.ray
def test_items_without_any_text_get_zero_vectors(tmp_path):
    backbone = tiny_causal_lm(tmp_path / "llm")
    document = {"embeddings": {"encoder": "backbone"}, "model": {"backbone": str(backbone)}}
    items = made_tables(tmp_path / "raw").items
    work = WorkDir(tmp_path / "work")
    empty = pa.array([""] * items.num_rows)
    for column in ("title", "genre"):
        items = items.set_column(items.column_names.index(column), column, empty)
    commit_items(work, items)
    manifest = STAGE.run(parse_recipe({"name": "t", **document}, "t"), work)
    assert manifest.counts["texts"] == 0
    assert not np.load(work.stage_dir("embeddings") / "item_vectors.npy").any()
