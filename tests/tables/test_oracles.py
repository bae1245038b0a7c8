"""Published counts: they agree with the rules they come from, a release that differs is refused,
and what is no release, or has other rules, is said not to be compared.
"""

import dataclasses

import pytest

from rellax_ds import assets
from rellax_ds.config import DataConfig
from rellax_ds.errors import AssetError, TableError
from rellax_ds.tables import movielens, oracles
from rellax_ds.tables.split import build_tables
from rellax_ds.testing import made_tables

MOVIELENS = [
    release
    for name, releases in oracles.RELEASES.items()
    for release in releases
    if name != "bookcrossing"
]


@pytest.fixture
def tables(tmp_path):
    return made_tables(tmp_path)


@pytest.fixture
def release(tables, monkeypatch):
    """The made log as an official release."""
    found = oracles.count(tables)
    made = oracles.Release("Made", {"events": 1500, "users": 40}, found)
    monkeypatch.setitem(oracles.RELEASES, "movielens-100k", (made,))
    return made


@pytest.mark.parametrize("release", MOVIELENS, ids=lambda release: release.title)
def test_releases_movielens_counts_follow_from_the_published_rules(release):
    counts = release.counts
    samples = release.known_by["events"] - 5 * release.known_by["users"]
    assert counts["samples"] == samples
    assert (counts["train"], counts["valid"]) == (int(0.8 * samples), int(0.1 * samples))
    assert counts["test"] == samples - counts["train"] - counts["valid"]


def test_releases_bookcrossing_counts_follow_from_the_published_rules():
    (release,) = oracles.RELEASES["bookcrossing"]
    samples = release.counts["samples"]
    assert release.counts["train_and_valid"] == int(0.9 * samples)
    assert release.counts["test"] == samples - int(0.9 * samples)


def test_check_release_with_its_counts_is_met(tables, release):
    assert oracles.check(DataConfig(), tables) == "met, Made"


@pytest.mark.parametrize("name", ["rated_items", "samples", "test", "valid_likes"])
def test_check_release_with_another_count_is_refused_naming_both(
    tables, release, name, monkeypatch
):
    found = release.counts[name]
    other = dataclasses.replace(release, counts={**release.counts, name: found + 1})
    monkeypatch.setitem(oracles.RELEASES, "movielens-100k", (other,))
    text = rf"Made \(known by its 1500 events and 40 users\): {found} .*published are {found + 1}"
    with pytest.raises(TableError, match=text):
        oracles.check(DataConfig(), tables)


@pytest.mark.parametrize(
    "changes",
    [
        {"label_threshold": 4},
        {"label_inclusive": True},
        {"min_history": 4},
        {"split": (0.7, 0.2, 0.1)},
        {"split_by": "user"},
        {"strict_time": True},
    ],
)
def test_check_other_rules_are_not_compared(tables, release, changes):
    config = DataConfig.model_validate(changes)
    assert oracles.check(config, tables).startswith("not compared, the recipe's rules")


@pytest.mark.parametrize(
    ("changes", "follows"),
    [
        ({}, True),
        ({"split": (0.7, 0.2, 0.1)}, True),
        ({"split": (0.8, 0.05, 0.15)}, False),
        ({"drop_implicit": True}, False),
        ({"samples_per_user": "all"}, False),
        ({"min_history": 4}, False),
    ],
)
def test_follows_published_rules_of_bookcrossing(changes, follows):
    published = {"split_by": "user", "samples_per_user": "last", "path": "bx"}
    config = DataConfig.model_validate({"dataset": "bookcrossing"} | published | changes)
    assert oracles.follows_published_rules(config) == follows


def test_check_frozen_history_is_compared(tables, release):
    assert oracles.check(DataConfig(freeze_history=True), tables) == "met, Made"


def test_check_another_log_is_not_compared(tables):
    assert "1500 events, 40 users" in oracles.check(DataConfig(), tables)


@pytest.mark.assets
def test_check_movielens_100k_is_met():
    try:
        folder = assets.resolve_dataset("movielens-100k").path
    except AssetError as error:
        pytest.skip(str(error))
    config = DataConfig()
    tables = build_tables(movielens.read(folder), config)
    assert oracles.check(config, tables) == "met, MovieLens-100K"
