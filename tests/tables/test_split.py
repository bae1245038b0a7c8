"""Order, labels, histories and the split, against a plain walk over the sorted log and against the
published figures of the real data.
"""

import hashlib
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds import assets
from rellax_ds.config import DataConfig
from rellax_ds.errors import AssetError, TableError
from rellax_ds.tables import RawLog, movielens
from rellax_ds.tables.split import build_tables

# Two-digit ids beside one-digit ones: sorting them as text would show.
USER_IDS = (2, 9, 10, 31)
ITEM_IDS = (1, 4, 12, 20, 100, 7, 8, 33)


def make_log(rows):
    events = pl.DataFrame(
        rows,
        schema={
            "user_id": pl.Int64,
            "item_id": pl.Int64,
            "rating": pl.Float32,
            "time": pl.Int64,
        },
        orient="row",
    )
    users = pl.DataFrame({"user_id": USER_IDS})
    items = pl.DataFrame(
        {"item_id": ITEM_IDS, "title": [f"T{i}" for i in ITEM_IDS], "genre": ["g"] * len(ITEM_IDS)}
    )
    return RawLog(users, items, events)


@st.composite
def logs(draw):
    row = st.tuples(
        st.sampled_from(USER_IDS),
        st.sampled_from(ITEM_IDS),
        st.sampled_from([1.0, 3.0, 3.5, 5.0]),
        st.integers(0, 6),
    )
    return draw(
        st.lists(row, min_size=30, max_size=80, unique_by=lambda row: (row[0], row[1], row[3]))
    )


def walk(rows, config):
    """The published preprocessing, one event at a time."""
    order = sorted(rows, key=lambda row: (row[3], row[0], row[1]))
    seen, samples = {}, []
    for row in order:
        past = seen.setdefault(row[0], [])
        history = [e for e in past if e[3] < row[3]] if config.strict_time else list(past)
        if len(history) >= config.min_history:
            samples.append((row, history))
        past.append(row)
    num_train = int(config.split[0] * len(samples))
    if config.freeze_history and num_train:
        last = order.index(samples[num_train - 1][0])
        known = {id(row) for row in order[: last + 1]}
        samples = [(row, [e for e in past if id(e) in known]) for row, past in samples]
    return samples


def rows_of(tables, numbers):
    user_id = tables.users["user_id"].cast("int64").to_numpy()
    item_id = tables.items["item_id"].cast("int64").to_numpy()
    events = tables.events.take(numbers)
    return list(
        zip(
            user_id[events["user"].to_numpy()].tolist(),
            item_id[events["item"].to_numpy()].tolist(),
            events["rating"].to_pylist(),
            events["time"].to_pylist(),
            strict=True,
        )
    )


@settings(max_examples=60, deadline=None)
@given(logs(), st.booleans(), st.booleans(), st.integers(1, 4))
def test_build_tables_random_log_equals_the_walk(rows, strict_time, freeze_history, min_history):
    config = DataConfig(
        strict_time=strict_time, freeze_history=freeze_history, min_history=min_history
    )
    expected = walk(rows, config)
    if len(expected) < 10:
        with pytest.raises(TableError, match="a split is empty"):
            build_tables(make_log(rows), config)
        return
    tables = build_tables(make_log(rows), config)
    samples = tables.samples
    assert rows_of(tables, samples["event"].to_numpy()) == [row for row, _ in expected]
    assert samples["label"].to_pylist() == [int(row[2] > 3) for row, _ in expected]
    starts, ends = samples["history_start"].to_pylist(), samples["history_end"].to_pylist()
    for sample, (start, end) in enumerate(zip(starts, ends, strict=True)):
        found = rows_of(tables, np.arange(start, end))
        assert found == expected[sample][1], sample


@settings(max_examples=40, deadline=None)
@given(logs(), st.booleans())
def test_build_tables_random_log_no_history_reaches_its_target(rows, strict_time):
    config = DataConfig(strict_time=strict_time, min_history=1)
    if len(walk(rows, config)) < 10:
        return
    tables = build_tables(make_log(rows), config)
    samples = tables.samples
    event, end = samples["event"].to_numpy(), samples["history_end"].to_numpy()
    time = tables.events["time"].to_numpy()
    user = tables.events["user"].to_numpy()
    assert (end <= event).all()
    gap = time[event] - time[end - 1]
    assert (gap >= int(strict_time)).all()
    assert (user[samples["history_start"].to_numpy()] == samples["user"].to_numpy()).all()


def test_build_tables_same_second_is_ordered_by_integer_item_id():
    rows = [(2, item, 5.0, 7) for item in (100, 20, 4, 12, 1, 33, 8, 7)]
    rows += [(9, item, 5.0, 7) for item in ITEM_IDS]
    tables = build_tables(make_log(rows), DataConfig(min_history=1))
    assert [row[1] for row in rows_of(tables, np.arange(8))] == sorted(ITEM_IDS)


def test_build_tables_half_star_above_the_threshold_is_a_like():
    rows = [(2, item, 3.5, n) for n, item in enumerate(ITEM_IDS)]
    rows += [(9, item, 3.0, n) for n, item in enumerate(ITEM_IDS)]
    events = build_tables(make_log(rows), DataConfig(min_history=1)).events
    assert events["label"].to_pylist() == [1] * 8 + [0] * 8


def test_build_tables_users_without_events_have_an_empty_range():
    rows = [(9, item, 3.5, n) for n, item in enumerate(ITEM_IDS)]
    rows += [(31, item, 3.0, n) for n, item in enumerate(ITEM_IDS)]
    users = build_tables(make_log(rows), DataConfig(min_history=2)).users
    ranges = zip(users["event_start"].to_pylist(), users["event_end"].to_pylist(), strict=True)
    assert list(ranges) == [(0, 0), (0, 8), (8, 8), (8, 16)]


def test_build_tables_split_sizes_round_down_and_the_rest_is_test():
    rows = [(u, item, 3.5, n) for u in (2, 9) for n, item in enumerate(ITEM_IDS)]
    rows += [(10, item, 3.5, n) for n, item in enumerate(ITEM_IDS[:4])]
    tables = build_tables(make_log(rows), DataConfig(min_history=1))  # 7 + 7 + 3 samples
    assert np.bincount(tables.samples["split"].to_numpy()).tolist() == [13, 1, 3]


def users_in_order(tables):
    user_id = tables.users["user_id"].to_pylist()
    split = tables.samples["split"].to_pylist()
    users = [user_id[user] for user in tables.samples["user"].to_pylist()]
    return users, split


def many_users(num_users, num_events=4):
    """User n has `num_events` events; the log names users from the last to the first."""
    user = np.repeat(np.arange(num_users)[::-1], num_events)
    events = pl.DataFrame(
        {
            "user_id": user,
            "item_id": np.tile(np.arange(num_events), num_users),
            "rating": np.full(user.size, 5.0, np.float32),
            "time": np.tile(np.arange(num_events)[::-1], num_users),
        }
    )
    items = pl.DataFrame({"item_id": np.arange(num_events)}).with_columns(
        title=pl.lit("t"), genre=pl.lit("g")
    )
    return RawLog(pl.DataFrame({"user_id": np.arange(num_users)}), items, events)


@settings(max_examples=40, deadline=None)
@given(logs(), st.sampled_from(["all", "last"]), st.integers(1, 3), st.integers(0, 5))
def test_build_tables_by_user_gives_whole_users_to_one_split(rows, which, min_history, seed):
    config = DataConfig(
        split_by="user",
        samples_per_user=which,
        min_history=min_history,
        split_seed=seed,
        split=(0.25, 0.25, 0.5),
    )
    count = {user: sum(row[0] == user for row in rows) for user in USER_IDS}
    enough = [user for user in dict.fromkeys(row[0] for row in rows) if count[user] > min_history]
    if len(enough) < 4:
        return
    random.Random(seed).shuffle(enough)
    tables = build_tables(make_log(rows), config)
    users, split = users_in_order(tables)
    per_user = [1 if which == "last" else count[int(u)] - min_history for u in enough]
    assert users == [str(u) for u, n in zip(enough, per_user, strict=True) for _ in range(n)]
    # Two of four are known, one of them for valid.
    assert split == [0] * per_user[0] + [1] * per_user[1] + [2] * sum(per_user[2:])
    if which == "last":
        ends = tables.users["event_end"].to_numpy()[tables.samples["user"].to_numpy()]
        assert (tables.samples["event"].to_numpy() == ends - 1).all()


def test_build_tables_by_user_starts_from_the_order_in_which_the_log_names_users():
    config = DataConfig(split_by="user", samples_per_user="last", min_history=1)
    users, _ = users_in_order(build_tables(many_users(50), config))
    expected = [str(n) for n in range(50)[::-1]]
    random.Random(42).shuffle(expected)
    assert users == expected


@pytest.mark.parametrize("valid", [0.05, 0.2, 0.3])
def test_build_tables_by_user_test_users_do_not_depend_on_the_share_of_valid(valid):
    found = []
    for share in (0.1, valid):
        config = DataConfig(split_by="user", min_history=1, split=(0.9 - share, share, 0.1))
        users, split = users_in_order(build_tables(many_users(70), config))
        found.append({user for user, part in zip(users, split, strict=True) if part == 2})
    assert len(found[0]) == 7
    assert found[0] == found[1]


def test_build_tables_by_user_shares_are_of_users_with_a_sample():
    log = many_users(20)
    few = pl.col("user_id") >= 10  # these keep one event, which is history
    events = log.events.filter(~few | (pl.col("item_id") == 0))
    config = DataConfig(split_by="user", samples_per_user="last", min_history=1)
    tables = build_tables(RawLog(log.users, log.items, events), config)
    assert tables.samples["split"].to_pylist() == [0] * 8 + [1] + [2]


def test_build_tables_by_user_share_a_rounding_error_below_a_whole_number_is_that_number():
    config = DataConfig(split_by="user", min_history=3, split=(0.15, 0.6, 0.25))
    _, split = users_in_order(build_tables(many_users(7), config))
    assert split == [0] + [1] * 4 + [2] * 2  # 0.6 / 0.75 of 5 users


def test_build_tables_by_user_too_few_users_are_refused():
    config = DataConfig(split_by="user", min_history=1)
    with pytest.raises(TableError, match="a split is empty"):
        build_tables(many_users(5), config)


def test_build_tables_text_ids_are_ordered_bytewise():
    log = make_log([(u, item, 5.0, n) for u in USER_IDS for n, item in enumerate(ITEM_IDS)])
    as_text = RawLog(
        log.users.with_columns(pl.col("user_id").cast(pl.String)),
        log.items.with_columns(pl.format("é{}", "item_id").alias("item_id")),
        log.events.with_columns(
            pl.col("user_id").cast(pl.String), pl.format("é{}", "item_id").alias("item_id")
        ),
    )
    tables = build_tables(as_text, DataConfig(min_history=1))
    assert tables.users["user_id"].to_pylist() == ["10", "2", "31", "9"]
    item_id = tables.items["item_id"].to_pylist()
    assert item_id == sorted(item_id, key=str.encode)
    user, item = tables.events["user"].to_pylist(), tables.events["item"].to_pylist()
    assert user == sorted(user)
    assert [item_id[n] for n in item[:8]] == [f"é{n}" for n in ITEM_IDS]


@pytest.mark.assets
def test_build_tables_movielens_100k_meets_the_published_figures():
    try:
        folder = assets.resolve_dataset("movielens-100k").path
    except AssetError as error:
        pytest.skip(str(error))
    tables = build_tables(movielens.read(folder), DataConfig())
    assert (tables.events.num_rows, tables.users.num_rows, tables.items.num_rows) == (
        100_000,
        943,
        1_682,
    )
    split, label = (tables.samples[name].to_numpy() for name in ("split", "label"))
    assert np.bincount(split).tolist() == [76_228, 9_528, 9_529]
    assert np.bincount(split, label).tolist() == [41_817, 5_389, 5_354]
    rows = np.array(rows_of(tables, tables.samples["event"].to_numpy())).astype("<i8")
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest == "2bbbc58e0a9b41d0696a8a032aa8fefe2b505d742243fae5f204143c6a882eaf"
    columns = [tables.items[name] for name in ("title", "genre")]
    columns += [tables.users[name] for name in ("gender", "age", "occupation", "zip")]
    sizes = [len(set(column.to_pylist())) for column in columns]
    assert sizes == [1_664, 19, 2, 7, 21, 795]
