"""Stage 1 as a stage: when it runs, when it is skipped, and that it writes the same bytes again."""

import shutil

import pytest

from rellax_ds import made_logs
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import parse_recipe
from rellax_ds.errors import AssetError
from rellax_ds.stages.tables import STAGE
from rellax_ds.tables import movielens, read_tables
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


@pytest.mark.parametrize(
    "data",
    [
        {"label_threshold": 4.0},
        {"strict_time": True},
        {"split_by": "user"},
    ],
)
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


@pytest.fixture
def shop(tmp_path):
    """A generic log in a folder: the events of the made log, called otherwise."""
    log = movielens.read(write_movielens_100k(tmp_path / "raw"))
    (tmp_path / "shop").mkdir()
    log.events.write_csv(tmp_path / "shop" / "events.csv")
    log.items.write_parquet(tmp_path / "shop" / "items.parquet")
    return tmp_path / "shop"


def shop_recipe(shop, **data):
    columns = {"time": "time", "rating": "rating", "item_text": {"title": "title"}}
    files = {"dataset": "generic", "events": "events.csv", "items": "items.parquet"}
    return recipe(shop, columns=columns, **files, **data)


def test_tables_stage_generic_log_gives_the_samples_of_the_movielens_reader(shop, tmp_path):
    manifest = STAGE.run(shop_recipe(shop), WorkDir(tmp_path / "work"))
    tables = read_tables(tmp_path / "work" / "1_tables")
    assert tables.samples.equals(made_tables(tmp_path / "again").samples)
    assert manifest.counts["published_counts"] == "none for this data set"


def test_tables_stage_generic_moved_files_are_skipped_and_changed_ones_are_not(shop, tmp_path):
    work = WorkDir(tmp_path / "work")
    first = STAGE.run(shop_recipe(shop), work)
    moved = shutil.move(shop, tmp_path / "moved")
    assert STAGE.run(shop_recipe(moved), work) == first
    path = moved / "events.csv"
    path.write_text(path.read_text() + "1,1,5.0,990000000\n")
    assert STAGE.run(shop_recipe(moved), work).counts["events"] == first.counts["events"] + 1


def test_tables_stage_generic_missing_file_is_refused(shop, tmp_path):
    (shop / "items.parquet").unlink()
    with pytest.raises(AssetError, match=r"items\.parquet' is neither an existing path"):
        STAGE.run(shop_recipe(shop), WorkDir(tmp_path / "work"))


@pytest.mark.parametrize(
    ("dataset", "write", "data"),
    [
        ("movielens-1m", made_logs.write_movielens_1m, {}),
        ("movielens-25m", made_logs.write_movielens_25m, {}),
        ("movielens-latest", made_logs.write_movielens_25m, {}),
        ("bookcrossing", made_logs.write_bookcrossing, {"split_by": "user"}),
    ],
)
def test_tables_stage_reads_every_data_set_and_compares_no_made_one(tmp_path, dataset, write, data):
    write(tmp_path / "raw")
    given = recipe(tmp_path / "raw", dataset=dataset, **data)
    manifest = STAGE.run(given, WorkDir(tmp_path / "work"))
    assert manifest.counts["events"] == 1500
    assert manifest.counts["samples"] == 1500 - 5 * 40
    assert manifest.counts["published_counts"].startswith("not compared, 1500 events, 4")


def test_tables_stage_missing_folder_is_refused(tmp_path):
    with pytest.raises(AssetError, match="neither an existing path"):
        STAGE.run(recipe(tmp_path / "absent"), WorkDir(tmp_path / "work"))
