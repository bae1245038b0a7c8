"""Stage 1 as a stage: when it runs, when it is skipped, and that it writes the same bytes again."""

import re
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from rellax_ds import made_logs
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import DataConfig, load_recipe, parse_recipe
from rellax_ds.errors import AssetError
from rellax_ds.stages.tables import STAGE
from rellax_ds.tables import movielens, oracles, read_tables
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


def test_tables_stage_key_holds_every_setting_but_the_places_of_files():
    settings = {f"data.{name}" for name in DataConfig.model_fields}
    places = {"data.path", "data.events", "data.items", "data.users"}
    assert set(STAGE.sections) == settings - places


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


def quickstart_recipes():
    """The recipes of docs/quickstart.md that name a data set."""
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    return {block["data"]["dataset"]: block for block in blocks}


def test_quickstart_recipe_of_a_shop_runs_on_files_with_its_columns(tmp_path):
    document = quickstart_recipes()["generic"]
    log = movielens.read(write_movielens_100k(tmp_path / "raw"))
    events = log.events.select(
        pl.col("user_id").alias("customer"),
        pl.col("item_id").alias("sku"),
        pl.from_epoch("time").dt.strftime("%Y-%m-%d %H:%M:%S").alias("bought_at"),
        pl.col("rating").alias("stars"),
    )
    items = log.items.rename({"item_id": "sku", "title": "name", "genre": "category"})
    events.write_csv(tmp_path / "orders.csv")
    items.with_columns(brand=pl.lit("ours")).write_parquet(tmp_path / "catalogue.parquet")
    users = log.users.rename({"user_id": "customer", "age": "age_group"})
    users.write_csv(tmp_path / "customers.tsv", separator="\t")
    document["data"]["path"] = str(tmp_path)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(document))
    STAGE.run(load_recipe(tmp_path / "shop.yaml"), WorkDir(tmp_path / "work"))
    tables = read_tables(tmp_path / "work" / "1_tables")
    assert tables.samples.equals(made_tables(tmp_path / "again").samples)
    assert tables.items.column_names == ["item", "item_id", "title", "genre", "brand"]
    assert tables.users.column_names[4:] == ["age"]


def test_quickstart_recipe_of_bookcrossing_follows_the_published_rules(tmp_path):
    document = quickstart_recipes()["bookcrossing"]
    document["data"]["path"] = str(made_logs.write_bookcrossing(tmp_path / "raw"))
    given = parse_recipe({"name": "bx", **document}, "quickstart")
    assert oracles.follows_published_rules(given.data)
    assert given.data.like_rule == "of 5 or more"
    manifest = STAGE.run(given, WorkDir(tmp_path / "work"))
    assert [manifest.counts[name] for name in ("train_and_valid", "test")] == [36, 4]


def test_tables_stage_missing_folder_is_refused(tmp_path):
    with pytest.raises(AssetError, match="neither an existing path"):
        STAGE.run(recipe(tmp_path / "absent"), WorkDir(tmp_path / "work"))
