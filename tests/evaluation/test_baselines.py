"""The baselines are causal, streaming where they say so, and fitted on train only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rellax_ds import metrics
from rellax_ds.errors import TableError
from rellax_ds.evaluation.baselines import (
    LogisticBaseline,
    causal_features,
    last_labels,
    similar_labels,
)
from rellax_ds.schema import RETRIEVED

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.evaluation.baselines import Log

TRAIN, VALID, TEST = range(3)


def flipped(log: Log, *events: int) -> Log:
    """The log with some events' labels changed, wherever they are targets too."""
    label = log.event_label.copy()
    label[list(events)] = 1 - label[list(events)]
    return replace(log, event_label=label, label=label[log.event])


def test_features_of_a_sample_do_not_change_with_the_present_or_future(log: Log) -> None:
    features, time = causal_features(log), log.event_time[log.event]
    rng = np.random.default_rng(0)
    targets = rng.permutation(log.event[log.split == TRAIN])
    likes, dislikes = (targets[log.event_label[targets] == label] for label in (1, 0))
    # One like and one dislike change places, so the training base rate, a constant, stays.
    for pair in zip(likes[:15], dislikes[:15], strict=True):
        changed = causal_features(flipped(log, *pair))
        before = time <= min(log.event_time[list(pair)])
        own = np.isin(log.event, pair) & before
        moved = ~np.isclose(features, changed, rtol=0, atol=1e-9).all(axis=1)
        assert moved.any()
        # Within one second the history runs in item order: only a same-second user may see it.
        visible = np.zeros_like(moved)
        for event in pair:
            visible |= (log.history_start <= event) & (event < log.history_end)
        assert not (moved & before & ~visible).any()
        assert not (moved & own).any()


def test_logits_of_earlier_samples_ignore_later_valid_and_test_labels(log: Log) -> None:
    ids = np.flatnonzero(log.split != TRAIN)
    later = ids[len(ids) // 2]
    changed = flipped(log, int(log.event[later]))
    before = ids <= later
    for score in (
        lambda log: LogisticBaseline.fit(log).logits(ids),
        lambda log: last_labels(log, ids),
    ):
        first, second = score(log), score(changed)
        assert second[before] == pytest.approx(first[before], abs=1e-9)
        assert not np.allclose(first, second, rtol=0, atol=1e-9)


def test_user_statistics_stream_and_item_statistics_end_with_train(log: Log) -> None:
    features, moved_rows = causal_features(log), 0
    for target in np.flatnonzero(log.split == VALID)[::10]:
        event = int(log.event[target])
        gap = np.abs(causal_features(flipped(log, event)) - features) > 1e-9
        held = (log.history_start <= event) & (event < log.history_end)
        assert not gap[:, [0, 2]].any()  # item mean and popularity
        assert gap[:, 1].tolist() == held.tolist()  # user mean
        assert gap[:, 3].tolist() == held.tolist()  # user residual
        moved_rows += int(held.sum())
    assert moved_rows > 0


def test_item_statistics_count_training_events_strictly_before(log: Log) -> None:
    features = causal_features(log)
    known = log.training_events()
    for sample in np.random.default_rng(1).choice(log.event.size, 40, replace=False):
        event = log.event[sample]
        before = (
            known
            & (log.event_item == log.event_item[event])
            & (log.event_time < log.event_time[event])
        )
        likes, rows = log.event_label[before].sum(), before.sum()
        assert features[sample, 2] == pytest.approx(np.log1p(rows))
        mean = (likes + 10 * log.base_rate) / (rows + 10)
        assert metrics.sigmoid(features[sample, 0]) == pytest.approx(mean)


def test_last_labels_average_ten_and_fall_back_to_the_base_rate(log: Log) -> None:
    ids = np.arange(log.event.size)
    found = metrics.sigmoid(last_labels(log, ids))
    for sample in (0, 50, int(ids[-1])):
        stop = log.history_end[sample]
        labels = log.event_label[max(log.history_start[sample], stop - 10) : stop]
        expected = (labels.sum() + log.base_rate) / (labels.size + 1)
        assert found[sample] == pytest.approx(expected)
    empty = replace(log, history_end=log.history_start)
    assert metrics.sigmoid(last_labels(empty, [3])) == pytest.approx(log.base_rate)


def test_similar_labels_average_the_most_similar_of_the_retrieved(log: Log, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = np.flatnonzero(log.split == TEST)
    kept = [
        np.arange(log.history_start[n], log.history_end[n])[-12:] for n in range(log.event.size)
    ]
    similarity = [rng.integers(0, 4, events.size) / 4 for events in kept]  # with ties
    columns = {"sample": np.arange(log.event.size), "events": kept, "similarity": similarity}
    table = pa.table({n: pa.array(list(columns[n]), kind) for n, kind in RETRIEVED.items()})
    pq.write_table(table, tmp_path / "retrieved.parquet")
    found = metrics.sigmoid(similar_labels(log, tmp_path, ids, 5))
    for place, sample in enumerate(ids):
        ranked = sorted(zip(similarity[sample], kept[sample], strict=True), reverse=True)[:5]
        labels = [log.event_label[event] for _, event in ranked]
        expected = (sum(labels) + log.base_rate) / (len(labels) + 1)
        assert found[place] == pytest.approx(expected)
    short = ids[log.history_end[ids] - log.history_start[ids] <= 5]
    whole = similar_labels(log, tmp_path, short, 5)
    assert whole == pytest.approx(last_labels(log, short, 5))
    pq.write_table(table.slice(1), tmp_path / "retrieved.parquet")
    with pytest.raises(TableError, match="missing or twice"):
        similar_labels(log, tmp_path, [0, 1], 5)


def test_logistic_beats_the_base_rate_on_planted_taste(log: Log) -> None:
    test = np.flatnonzero(log.split == TEST)
    logits = LogisticBaseline.fit(log).logits(test)
    assert metrics.auc(log.label[test], logits) > 0.55
