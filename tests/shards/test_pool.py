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


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_retrieved_history_is_the_most_similar_in_order_of_time(
    scores: list[float], length: int, start: int
) -> None:
    events = np.arange(start, start + 2 * len(scores), 2)
    found = pool.retrieved_history(events, np.array(scores, np.float32), length)
    best = sorted(zip(scores, events.tolist(), strict=True), reverse=True)[:length]
    assert found.events.tolist() == sorted(event for _, event in best)
    given_up = found.events[found.drop_order].tolist()
    assert given_up == [event for _, event in reversed(best)]


@pytest.mark.parametrize("events", [[4, 5], [5, 9], [7, 6], [6, 6]])
def test_history_outside_its_range_or_out_of_order_is_refused(events: list[int]) -> None:
    behaviour = pool.Behaviour(np.array(events), np.arange(2))
    with pytest.raises(TableError, match=r"sample 3.*history 5:9.*run `rellax retrieval` again"):
        pool.check_history(behaviour, 5, 9, 3)


def test_take_rows_across_row_groups_keeps_the_asked_order(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": range(50), "b": range(50)}), path, row_group_size=7)
    rows = np.array([49, 3, 3, 20, 0])
    taken = pool.take_rows(path, ["b"], rows)
    assert taken.column_names == ["b"]
    assert taken["b"].to_pylist() == rows.tolist()
    with pytest.raises(TableError, match="has 50 rows, row 50 is asked for"):
        pool.take_rows(path, ["b"], np.array([50]))
