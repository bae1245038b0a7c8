"""The generator's promises: exact counts, the tables' order, planted interests, one seed."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from rellax_ds.config import DataConfig
from rellax_ds.errors import ConfigError
from rellax_ds.tables import synthetic
from rellax_ds.tables.split import build_tables
from rellax_ds.tables.synthetic import Spec

SMALL = Spec(num_users=150, num_items=900, num_events=20_000, max_events=800)
# One user rates three quarters of the catalogue.
DENSE = Spec(num_users=4, num_items=60, num_events=120, max_events=45, min_events=20)
# Far more events than items: ratings must repeat.
LIFELONG = Spec(num_users=1, num_items=40, num_events=3_000, max_events=3_000)


def columns(spec, seed=0):
    return synthetic.event_columns(spec, seed)


@pytest.mark.parametrize("name", ["ml1m", "1e5"])
def test_event_columns_of_a_named_shape_have_its_counts_and_a_heavy_tail(name):
    spec = synthetic.shape(name)
    made = columns(spec)
    lengths = np.diff(made["user_start"])
    assert made["item"].size == made["rating"].size == made["time"].size == spec.num_events
    assert lengths.size == spec.num_users
    assert lengths.sum() == spec.num_events
    assert spec.min_events <= lengths.min()
    assert lengths.max() <= spec.max_events
    # ML-1M: median 96, maximum 2,314.
    assert 85 < np.median(lengths) < 105
    assert lengths.max() > 10 * np.median(lengths)
    popularity = np.sort(np.bincount(made["item"], minlength=spec.num_items))[::-1]
    assert popularity[: spec.num_items // 10].sum() > 0.25 * spec.num_events


@pytest.mark.parametrize("spec", [SMALL, DENSE, LIFELONG])
def test_event_columns_are_in_the_tables_order_and_no_event_occurs_twice(spec):
    made = columns(spec)
    order = np.lexsort((made["item"], made["time"], made["user"]))
    assert (order == np.arange(spec.num_events)).all()
    keys = np.stack([made["user"].astype(np.int64), made["item"], made["time"]])
    assert np.unique(keys, axis=1).shape[1] == spec.num_events
    assert (made["user"] == np.repeat(np.arange(spec.num_users), np.diff(made["user_start"]))).all()
    tied = (np.diff(made["time"]) == 0) & (np.diff(made["user"]) == 0)
    assert tied.mean() > (0.2 if spec is not LIFELONG else -1)
    assert set(np.unique(made["rating"])) <= {1.0, 2.0, 3.0, 4.0, 5.0}


@pytest.mark.parametrize(("spec", "repeats"), [(SMALL, 0), (DENSE, 0), (LIFELONG, 2_960)])
def test_event_columns_repeat_an_item_only_when_none_is_left(spec, repeats):
    made = columns(spec)
    pairs = np.unique(made["user"].astype(np.int64) * spec.num_items + made["item"])
    assert spec.num_events - pairs.size == repeats


def test_event_columns_follow_the_seed_alone():
    first, again, other = columns(SMALL, 3), columns(SMALL, 3), columns(SMALL, 4)
    for name, values in first.items():
        assert (values == again[name]).all()
    assert (first["item"] != other["item"]).mean() > 0.9


def test_ratings_follow_the_topics_a_user_likes():
    made, topics = columns(SMALL), synthetic.item_topics(SMALL, 0)
    counts = np.zeros((SMALL.num_users, SMALL.num_topics))
    likes = np.zeros_like(counts)
    np.add.at(counts, (made["user"], topics[made["item"]]), 1)
    np.add.at(likes, (made["user"], topics[made["item"]]), made["rating"] > 3)
    rank = np.argsort(-counts, axis=1)
    share = np.take_along_axis(likes, rank, 1).sum(0) / np.take_along_axis(counts, rank, 1).sum(0)
    assert share[0] > 0.6
    assert share[0] > share[-4:].mean() + 0.2


@pytest.mark.parametrize("seed", range(3))
def test_interests_drift_so_that_the_ends_of_a_history_differ_more_than_without(seed):
    spec = Spec(num_users=20, num_items=20_000, num_events=20_000, min_events=500)
    topics = synthetic.item_topics(spec, seed)
    apart = []
    for drift in (spec.drift, 0.0):
        made = columns(dataclasses.replace(spec, drift=drift), seed)
        found = []
        for start, end in zip(made["user_start"][:-1], made["user_start"][1:], strict=True):
            topic = topics[made["item"][start:end]]
            part = len(topic) // 4
            counts = [np.bincount(rows, minlength=18) for rows in (topic[:part], topic[-part:])]
            found.append(np.abs(counts[0] - counts[1]).sum() / part)
        apart.append(np.mean(found))
    assert apart[0] > apart[1] + 0.25


def test_item_vectors_are_distinct_unit_rows_close_within_a_topic():
    vectors, topics = synthetic.item_vectors(SMALL, 0, 48), synthetic.item_topics(SMALL, 0)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.unique(vectors, axis=0).shape == vectors.shape
    cosine = vectors @ vectors.T
    same = topics[:, None] == topics[None, :]
    off = ~np.eye(SMALL.num_items, dtype=bool)
    assert cosine[same & off].mean() == pytest.approx(1 / (1 + 0.8**2), abs=0.05)
    assert np.abs(cosine[~same].mean()) < 0.05
    # Distinct also as whole numbers of 2^-26, as retrieval sees them.
    assert np.unique(np.rint(vectors * 2.0**26), axis=0).shape == vectors.shape


def test_events_most_similar_to_a_target_share_its_topic_more_often_than_recent_ones():
    made, topics = columns(SMALL), synthetic.item_topics(SMALL, 0)
    vectors = synthetic.item_vectors(SMALL, 0, 48)
    recent, retrieved = [], []
    for start, end in zip(made["user_start"][:-1], made["user_start"][1:], strict=True):
        history, target = made["item"][start : end - 1], made["item"][end - 1]
        most = np.argsort(-(vectors[history] @ vectors[target]))[:10]
        recent.append((topics[history[-10:]] == topics[target]).mean())
        retrieved.append((topics[history[most]] == topics[target]).mean())
    assert np.mean(retrieved) > np.mean(recent) + 0.2


def test_raw_log_becomes_tables_with_the_same_rows():
    tables = build_tables(synthetic.raw_log(SMALL, 0), DataConfig())
    made, topics = columns(SMALL), synthetic.item_topics(SMALL, 0)
    for name in ("user", "item", "rating", "time"):
        assert (tables.events[name].to_numpy() == made[name]).all()
    assert (tables.users["event_start"].to_numpy() == made["user_start"][:-1]).all()
    items = pl.from_arrow(tables.items)
    assert items["title"].n_unique() == SMALL.num_items
    assert items.with_columns(topic=topics).group_by("topic", "genre").len().height == 18
    assert tables.samples.num_rows == SMALL.num_events - 5 * SMALL.num_users


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 10, "num_items": 50, "num_events": 100}, "num_events is 100"),
        ({"num_users": 1, "num_items": 9, "num_events": 30}, "give every topic an item"),
    ],
)
def test_spec_of_contradicting_counts_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Spec(**arguments)


def test_shape_of_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="'ml2m'; choose from ml1m, ml25m"):
        synthetic.shape("ml2m")
