from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.config import CRMConfig
from rellax_ds.crm.features import (
    NUM_GAPS,
    Features,
    Interactions,
    RecentHistory,
    RetrievedHistory,
    build_history,
    build_vocabulary,
)
from rellax_ds.errors import ConfigError, TableError
from rellax_ds.schema import RETRIEVED
from rellax_ds.tables import write_parquet

if TYPE_CHECKING:
    from pathlib import Path


def write_retrieved(
    path: Path, events: list[list[int]], similarity: list[list[float]] | None = None
) -> Path:
    columns = {
        "sample": np.arange(len(events)),
        "events": events,
        "similarity": similarity or [[0.5] * len(row) for row in events],
    }
    arrays = [pa.array(columns[name], kind) for name, kind in RETRIEVED.items()]
    write_parquet(pa.table(arrays, names=list(RETRIEVED)), path)
    return path


@st.composite
def random_log(draw: st.DrawFn) -> Interactions:
    """Any log whose histories end at or before their target, as strict or frozen ones may."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.integers(2, 9, draw(st.integers(1, 4)))
    user = np.repeat(np.arange(len(counts)), counts)
    start = np.repeat(np.cumsum(counts) - counts, counts)
    event = rng.permutation(len(user))
    num_items = draw(st.integers(1, 8))
    time = np.sort(rng.integers(0, 1 << 30, len(user)))
    names = [str(i) for i in range(num_items)]
    return Interactions(
        users=pa.table({"user_id": [str(u) for u in range(len(counts))]}),
        items=pa.table({"item_id": names, "title": names, "genre": [n[-1:] for n in names]}),
        event_item=rng.integers(0, num_items, len(user), np.int32),
        event_rating=rng.integers(1, 11, len(user)),
        sample_user=user[event].astype(np.int32),
        sample_item=rng.integers(0, num_items, len(user), np.int32),
        label=rng.integers(0, 2, len(user), np.int8),
        split=np.zeros(len(user), np.int8),
        history_start=start[event],
        history_end=rng.integers(start[event], event + 1),
        event_time=time,
        sample_time=time[event],
    )


@settings(max_examples=40, deadline=None)
@given(log=random_log(), length=st.integers(1, 6), retrieved=st.booleans(), data=st.data())
def test_gather_events_from_the_target_on_altered_features_unchanged(
    log: Interactions,
    length: int,
    retrieved: bool,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    spans = list(zip(log.history_start, log.history_end, strict=True))
    history: RecentHistory | RetrievedHistory = RecentHistory(log, length)
    if retrieved:
        kept = [[e for e in range(a, b) if (e * 7 + 1) % 3] for a, b in spans]
        path = tmp_path_factory.mktemp("r") / "retrieved.parquet"
        history = RetrievedHistory(log, write_retrieved(path, kept), length)
    everything = np.arange(log.num_samples)
    config = CRMConfig(kind="sim_full", identifier_share=1.0)
    vocabulary = build_vocabulary(log, history, everything, config)
    sample = data.draw(st.integers(0, log.num_samples - 1))
    before = Features(log, history, vocabulary).gather(np.array([sample]))

    outside = np.ones(len(log.event_item), bool)
    outside[slice(*spans[sample])] = False
    altered = replace(
        log,
        event_item=np.where(outside, 0, log.event_item),
        event_rating=np.where(outside, 0, log.event_rating),
        event_time=np.where(outside, 0, log.event_time),
        label=1 - log.label,
    )
    after = Features(altered, history, vocabulary).gather(np.array([sample]))

    assert before.categories is not None
    assert before.gaps is not None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@settings(max_examples=25, deadline=None)
@given(log=random_log(), length=st.integers(1, 6))
def test_recent_history_any_window_is_the_last_events_in_order(
    log: Interactions, length: int
) -> None:
    rows, mask = RecentHistory(log, length).event_rows(np.arange(log.num_samples))
    for sample in range(log.num_samples):
        expected = range(log.history_start[sample], log.history_end[sample])[-length:]
        assert rows[sample, mask[sample]].tolist() == list(expected)
        assert not mask[sample, len(expected) :].any()


def test_retrieved_history_more_events_than_length_keeps_most_similar_and_later_ties(
    log: Interactions, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    spans = list(zip(log.history_start, log.history_end, strict=True))
    events = [list(range(a, b))[-int(rng.integers(0, 9)) :] for a, b in spans]
    similarity = [rng.integers(0, 3, len(row)).tolist() for row in events]
    path = write_retrieved(tmp_path / "retrieved.parquet", events, similarity)

    samples = rng.permutation(log.num_samples)
    rows, mask = RetrievedHistory(log, path, 4).event_rows(samples)

    for row, kept, sample in zip(rows, mask, samples, strict=True):
        ranked = sorted(zip(similarity[sample], events[sample], strict=True))[-4:]
        assert row[kept].tolist() == sorted(event for _, event in ranked)


def test_retrieved_history_event_of_the_target_raises(log: Interactions, tmp_path: Path) -> None:
    events: list[list[int]] = [[] for _ in range(log.num_samples)]
    events[7] = [int(log.history_end[7])]
    path = write_retrieved(tmp_path / "retrieved.parquet", events)
    with pytest.raises(TableError, match=r"sample 7 has event .* not in its history"):
        RetrievedHistory(log, path, 4)


def test_retrieved_history_other_samples_raises(log: Interactions, tmp_path: Path) -> None:
    path = write_retrieved(tmp_path / "retrieved.parquet", [[]])
    with pytest.raises(TableError, match="rerun `rellax retrieval`"):
        RetrievedHistory(log, path, 4)


def test_vocabulary_from_training_rows_leaves_identifiers_and_unseen_values_out(
    sparse_log: Interactions,
) -> None:
    log = sparse_log
    config = CRMConfig()
    history = build_history(log, config, None)
    rows = log.split_rows("train")
    vocabulary = build_vocabulary(log, history, rows, config)
    batch = Features(log, history, vocabulary).gather(np.arange(log.num_samples))

    assert list(vocabulary.user_fields) == ["gender", "age", "occupation"]
    assert "title" not in vocabulary.item_fields
    trained = set(log.sample_item[rows].tolist())
    for start, end in zip(log.history_start[rows], log.history_end[rows], strict=True):
        trained.update(log.event_item[start:end][-config.history_length :].tolist())
    unseen = set(vocabulary.unseen_items)
    assert unseen == set(range(log.items.num_rows)) - trained
    assert unseen
    target = batch.fields[:, vocabulary.item_field]
    expected = [0 if i in unseen else i + 1 for i in log.sample_item.tolist()]
    assert target.tolist() == expected
    assert batch.fields.max() < batch.ratings.max() == vocabulary.num_features - 1


def test_vocabulary_user_id_field_gives_unseen_users_id_zero(log: Interactions) -> None:
    config = CRMConfig(user_id_field=True)
    history = build_history(log, config, None)
    rows = log.split_rows("train")
    vocabulary = build_vocabulary(log, history, rows, config)
    column = list(vocabulary.user_fields).index("user_id")
    ids = Features(log, history, vocabulary).gather(np.arange(log.num_samples)).fields[:, column]
    known = np.isin(log.sample_user, log.sample_user[rows])
    assert np.array_equal(ids.numpy() > 0, known)
    assert len(np.unique(ids[known])) == len(np.unique(log.sample_user[rows]))


def test_features_other_catalogue_raises(log: Interactions) -> None:
    history = RecentHistory(log, 4)
    vocabulary = build_vocabulary(log, history, log.split_rows("train"), CRMConfig())
    with pytest.raises(TableError, match="rerun `rellax crm`"):
        Features(log, history, replace(vocabulary, num_items=7))


def test_gather_ages_of_behaviours_are_powers_of_two(log: Interactions) -> None:
    history = RecentHistory(log, 5)
    vocabulary = build_vocabulary(log, history, log.split_rows("train"), CRMConfig())
    assert log.event_time is not None
    assert log.sample_time is not None
    samples = np.arange(0, log.num_samples, 7)
    batch = Features(log, history, vocabulary).gather(samples)
    assert batch.gaps is not None
    rows, mask = history.event_rows(samples)
    for row, kept, found, sample in zip(rows, mask, batch.gaps, samples, strict=True):
        ages = log.sample_time[sample] - log.event_time[row[kept]]
        assert found[kept].tolist() == [int(age + 1).bit_length() for age in ages]
        assert not found[~kept].any()
    assert len(np.unique(batch.gaps)) > 3
    old = replace(log, sample_time=log.sample_time + (1 << 45))
    assert Features(old, history, vocabulary).gather(samples).gaps.max() == NUM_GAPS - 1


def test_gather_categories_are_the_ids_of_the_targets_own_field(log: Interactions) -> None:
    config = CRMConfig(kind="sim_full", history_length=12)
    history = RecentHistory(log, 12)
    vocabulary = build_vocabulary(log, history, log.split_rows("train"), config)
    batch = Features(log, history, vocabulary).gather(np.arange(log.num_samples))
    assert batch.categories is not None
    assert vocabulary.category_field is not None
    genres = log.items["genre"].to_pylist()
    values = vocabulary.item_fields["genre"]
    first = 1 + vocabulary.num_items + sum(map(len, vocabulary.user_fields.values()))
    first += sum(
        len(vocabulary.item_fields[name])
        for name in list(vocabulary.item_fields)[: list(vocabulary.item_fields).index("genre")]
    )
    rows, mask = history.event_rows(np.arange(log.num_samples))
    expected = [first + values.index(genres[item]) for item in log.event_item[rows[mask]]]
    assert batch.categories[mask].tolist() == expected
    wanted = [first + values.index(genres[item]) for item in log.sample_item]
    assert batch.fields[:, vocabulary.category_field].tolist() == wanted


def test_vocabulary_search_field_that_is_no_field_raises(log: Interactions) -> None:
    config = CRMConfig(kind="sim_full", search_field="title")
    with pytest.raises(ConfigError, match=r"crm\.search_field 'title'.* choose .*genre"):
        build_vocabulary(log, RecentHistory(log, 4), log.split_rows("train"), config)
