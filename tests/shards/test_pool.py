from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.config import ShardsConfig
from rellax_ds.errors import ConfigError, TableError
from rellax_ds.shards import pool

if TYPE_CHECKING:
    from pathlib import Path

SPLIT_OF = np.repeat(np.array([0, 1, 2], np.int8), [80, 10, 10])


def choose(holdout_start: int | None = None, **changes: Any) -> dict[str, list[pool.Row]]:
    values = {"train_rows": 20, "valid_rows": 5, "test_rows": None}
    return pool.choose_rows(SPLIT_OF, ShardsConfig(**(values | changes)), 42, holdout_start)


def test_pool_order_is_pinned_for_ever() -> None:
    first = pool.pool_order(np.arange(1000), 42, "train")[:6]
    assert first.tolist() == [350, 379, 57, 555, 616, 880]


def test_fewer_shots_are_a_prefix_of_more() -> None:
    many, few = choose(train_rows=60)["train"], choose()["train"]
    assert many[:20] == few
    assert len(set(many)) == 60


def test_rows_come_from_their_split_and_valid_and_test_are_sorted() -> None:
    rows = choose()
    samples = {split: [sample for sample, _ in rows[split]] for split in rows}
    assert set(samples["train"]) <= set(range(80))
    assert samples["train"] != sorted(samples["train"])
    assert len(samples["valid"]) == 5
    assert samples["valid"] == sorted(set(samples["valid"]) & set(range(80, 90)))
    assert samples["test"] == list(range(90, 100))


def test_mixed_history_interleaves_in_train_and_is_retrieved_elsewhere() -> None:
    rows = choose(history="mixed")
    assert [kind for _, kind in rows["train"]] == ["recent", "retrieved"] * 20
    assert [sample for sample, _ in rows["train"]][::2] == [s for s, _ in choose()["train"]]
    assert {kind for split in ("valid", "test") for _, kind in rows[split]} == {"retrieved"}


def test_holdout_draws_from_the_tail_of_train_only() -> None:
    drawn = {sample for sample, _ in choose(60, train_from="holdout")["train"]}
    assert drawn == set(range(60, 80))
    with pytest.raises(ConfigError, match=r"set crm\.holdout above 0"):
        choose(None, train_from="holdout")
    with pytest.raises(ConfigError, match=r"shards\.train_rows is 20, but only 19"):
        choose(61, train_from="holdout")


def test_half_mixed_history_writes_half_the_shots_twice() -> None:
    rows = choose(history="half_mixed")
    assert [kind for _, kind in rows["train"]] == ["recent", "retrieved"] * 10
    assert [sample for sample, _ in rows["train"]][::2] == [s for s, _ in choose()["train"]][:10]
    assert {kind for _, kind in rows["test"]} == {"retrieved"}
    with pytest.raises(ConfigError, match=r"shards\.train_rows is 21.*an even number"):
        choose(history="half_mixed", train_rows=21)


@pytest.mark.parametrize("history", ["recent", "retrieved", "high", "low"])
def test_one_pattern_is_shown_in_every_split(history: str) -> None:
    rows = choose(history=history)
    assert {kind for split in rows for _, kind in rows[split]} == {history}
    assert [s for s, _ in rows["train"]] == [s for s, _ in choose()["train"]]


def test_recent_histories_are_the_last_events_oldest_given_up_first() -> None:
    found = pool.recent_histories(np.array([0, 7, 9]), np.array([5, 9, 9]), 3)
    assert found.offsets.tolist() == [0, 3, 5, 5]
    assert found.events.tolist() == [2, 3, 4, 7, 8]
    assert found.drop_rank.tolist() == [0, 1, 2, 0, 1]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5]), max_size=12), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 1000),
    st.sampled_from(["retrieved", "high", "low"]),
)
def test_retrieved_histories_are_the_most_similar_in_the_order_asked_for(
    scores: list[list[float]], length: int, start: int, order: pool.Variant
) -> None:
    offsets = np.cumsum([0, *map(len, scores)])
    events = [np.arange(start + n, start + n + 2 * len(row), 2) for n, row in enumerate(scores)]
    similarity = np.array([score for row in scores for score in row], np.float32)
    found = pool.retrieved_histories(offsets, np.concatenate(events), similarity, length, order)
    for n, row in enumerate(scores):
        place = slice(found.offsets[n], found.offsets[n + 1])
        best = sorted(zip(row, events[n].tolist(), strict=True), reverse=True)[:length]
        falling = [event for _, event in best]
        expected = {"retrieved": sorted(falling), "high": falling, "low": falling[::-1]}[order]
        assert found.events[place].tolist() == expected
        given_up = found.events[place][np.argsort(found.drop_rank[place])].tolist()
        assert given_up == falling[::-1]
        assert sorted(found.drop_rank[place].tolist()) == list(range(len(falling)))


def test_interleaved_histories_keep_the_places_of_their_prompts() -> None:
    recent = pool.recent_histories(np.array([0, 0]), np.array([1, 3]), 2)
    other = pool.recent_histories(np.array([50]), np.array([53]), 3)
    found = pool.interleave([(np.array([2, 0]), recent), (np.array([1]), other)])
    assert found.offsets.tolist() == [0, 2, 5, 6]
    assert found.events.tolist() == [1, 2, 50, 51, 52, 0]
    assert found.drop_rank.tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("events", [[4, 5], [5, 9], [7, 6], [6, 6]])
def test_history_outside_its_range_or_out_of_order_is_refused(events: list[int]) -> None:
    offsets, rows = np.array([0, 2, 2, 4]), np.array([0, 1, *events])
    starts, stops = np.array([0, 3, 5]), np.array([2, 4, 9])
    samples = np.array([1, 2, 3])
    with pytest.raises(TableError, match=r"sample 3.*history 5:9.*run `rellax retrieval` again"):
        pool.check_histories(offsets, rows, starts, stops, samples)
    pool.check_histories(offsets, np.array([0, 1, 5, 8]), starts, stops, samples)


def test_take_rows_across_row_groups_keeps_the_asked_order(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": range(50), "b": range(50)}), path, row_group_size=7)
    rows = np.array([49, 3, 3, 20, 0])
    taken = pool.take_rows(path, ["b"], rows)
    assert taken.column_names == ["b"]
    assert taken["b"].to_pylist() == rows.tolist()
    with pytest.raises(TableError, match="has 50 rows, row 50 is asked for"):
        pool.take_rows(path, ["b"], np.array([50]))
