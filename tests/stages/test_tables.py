"""Stage 1 as a stage: when it runs, when it is skipped, and that it writes the same bytes again."""

import shutil

import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.config import parse_recipe
from rellax_ds.errors import AssetError
from rellax_ds.stages.tables import STAGE
from rellax_ds.tables import read_tables
from rellax_ds.testing import made_tables, write_movielens_100k


@pytest.fixture
def raw(tmp_path):
    return write_movielens_100k(tmp_path / "raw", num_users=10, num_items=20, num_events=150)


def recipe(raw, **data):
    return parse_recipe({"name": "t", "data": {"path": str(raw), **data}}, "t")


def test_tables_stage_writes_the_four_tables_and_counts(raw, tmp_path):
    manifest = STAGE.run(recipe(raw), WorkDir(tmp_path / "work"))
    tables = read_tables(tmp_path / "work" / "1_tables")
    expected = made_tables(tmp_path / "again", num_users=10, num_items=20, num_events=150)
    assert tables.samples.equals(expected.samples)
    assert manifest.counts["samples"] == 100
    assert [manifest.counts[name] for name in ("train", "valid", "test")] == [80, 10, 10]
    assert manifest.counts["train_likes"] == sum(expected.samples["label"].to_pylist()[:80])


def test_tables_stage_fresh_run_gives_equal_content(raw, tmp_path):
    first, second = (STAGE.run(recipe(raw), WorkDir(tmp_path / name)) for name in "ab")
    assert first.content == second.content


def test_tables_stage_moved_raw_folder_is_skipped(raw, tmp_path):
    work = WorkDir(tmp_path / "work")
    first = STAGE.run(recipe(raw), work)
    moved = shutil.move(raw, tmp_path / "moved")
    assert STAGE.run(recipe(moved), work) == first


@pytest.mark.parametrize("data", [{"label_threshold": 4.0}, {"strict_time": True}])
def test_tables_stage_changed_setting_runs_again(raw, tmp_path, data):
    work = WorkDir(tmp_path / "work")
    first = STAGE.run(recipe(raw), work)
    assert STAGE.run(recipe(raw, **data), work).content != first.content


def test_tables_stage_changed_raw_file_runs_again(raw, tmp_path):
    work = WorkDir(tmp_path / "work")
    first = STAGE.run(recipe(raw), work)
    path = raw / "ml-100k.item"
    path.write_text(path.read_text().replace("Harbour", "Haven"))
    assert STAGE.run(recipe(raw), work).content != first.content


def test_tables_stage_missing_folder_is_refused(tmp_path):
    with pytest.raises(AssetError, match="neither an existing path"):
        STAGE.run(recipe(tmp_path / "absent"), WorkDir(tmp_path / "work"))
