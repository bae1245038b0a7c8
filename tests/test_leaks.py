"""No stage before training sees the future: random logs, altered from the target on.

The rule for equal timestamps: a user's events are ordered by (time, item id), and the history of an
event is everything before it in that order. So inside one second the events of smaller item ids
come first, whatever the order of the raw rows. With `data.strict_time` the whole second of the
target is left out. With `data.freeze_history` nothing after the last training event is history.

An altered log keeps a target and its past, and changes the rest: later events of the user get other
items and ratings, come, go or move, other users' logs are drawn anew, and the target's own label
flips. Everything the models would read of that target must stay the same to the last bit: its
recent and its retrieved history, the behaviours of its prompts, and the recommender's features.
Item vectors and the axes of their PCA are fitted on the item table alone, which stage 2 is shown to
need nothing besides.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rellax_ds import schema
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import CRMConfig, DataConfig, load_recipe
from rellax_ds.crm.features import Features, Interactions, RecentHistory, RetrievedHistory
from rellax_ds.crm.features import build_vocabulary as build
from rellax_ds.errors import TableError
from rellax_ds.partitions import disconnect
from rellax_ds.retrieval import partition
from rellax_ds.shards import pool
from rellax_ds.stages import embeddings
from rellax_ds.stages import tables as tables_stage
from rellax_ds.stages.stage import StageContext
from rellax_ds.tables import RawLog, read_parquet, write_tables
from rellax_ds.tables.split import build_tables
from rellax_ds.testing import tiny_recipe

# Ids whose order as text differs from their order as numbers.
USERS, ITEMS = (2, 9, 31), (1, 4, 12, 20, 100, 7, 8)
RATINGS = (1.0, 3.0, 4.0, 5.0)
LATEST = 8
LENGTH = 3
ROW = st.tuples(
    st.sampled_from(USERS), st.sampled_from(ITEMS), st.sampled_from(RATINGS), st.integers(0, LATEST)
)
CRM = CRMConfig(identifier_share=1.0, user_id_field=True)
SETTINGS = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def key(row):
    """A user's order of events: the stated rule."""
    return row[3], row[1]


def identity(row):
    return row[0], row[1], row[3]


def raw_log(rows):
    columns = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Float32, "time": pl.Int64}
    names = [str(item) for item in ITEMS]
    return RawLog(
        pl.DataFrame({"user_id": USERS, "age": ["1", "2", "1"]}),
        pl.DataFrame({"item_id": ITEMS, "title": names, "genre": ["a", "b"] * 3 + ["a"]}),
        pl.DataFrame(rows, schema=columns, orient="row"),
    )


def vectors():
    """One vector per item row, two of them equal and one zero, so that ties are common."""
    rows = np.random.default_rng(5).normal(size=(len(ITEMS), 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[3] = rows[1]
    rows[6] = 0
    return rows.astype(np.float32)


def past_of(target, rows, config):
    """The target's history in a plain walk over the log; freezing apart."""
    mine = sorted((row for row in rows if row[0] == target[0]), key=key)
    if config.strict_time:
        return [row for row in mine if row[3] < target[3]]
    return [row for row in mine if key(row) < key(target)]


class Run:
    """The stages of one log, by the code that the pipeline runs, without Ray."""

    def __init__(self, rows, config, folder):
        folder.mkdir()
        self.tables = build_tables(raw_log(rows), config)
        write_tables(self.tables, folder)
        np.save(folder / "vectors.npy", vectors())
        partition.prepare(folder, folder / "vectors.npy", folder / "columns")
        worker = partition.Retriever(
            columns=str(folder / "columns"),
            vectors_path=str(folder / "vectors.npy"),
            num_retrieved=2 * LENGTH,
        )
        parts = partition.cut(folder / "columns", 7)
        for part in parts:
            worker(part, folder)
        paths = [folder / f"{part.name}.parquet" for part in parts]
        self.path = folder / "retrieved.parquet"
        partition.merge(paths, self.path, self.tables.samples.num_rows)
        self.retrieved = read_parquet(self.path, schema.RETRIEVED).to_pylist()
        self.samples = self.tables.samples.to_pylist()
        self.rows = self._rows()

    def _rows(self):
        """Every event as (user id, item id, rating, time)."""
        events = self.tables.events
        users, items = (
            getattr(self.tables, name)[f"{name[:-1]}_id"].cast("int64").to_numpy()
            for name in ("users", "items")
        )
        columns = (
            users[events["user"].to_numpy()],
            items[events["item"].to_numpy()],
            events["rating"].to_numpy(),
            events["time"].to_numpy(),
        )
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def number(self, target):
        """Sample id of an event, None if it is no sample."""
        found = [
            n
            for n, sample in enumerate(self.samples)
            if identity(self.rows[sample["event"]]) == identity(target)
        ]
        return found[0] if found else None

    def behaviours(self, number):
        """Events of every history the models may read of a sample, by kind."""
        sample, kept = self.samples[number], self.retrieved[number]
        start, end = sample["history_start"], sample["history_end"]
        prompts = {"recent": pool.recent_histories(np.array([start]), np.array([end]), LENGTH)}
        found = np.array(kept["events"], np.int64), np.array(kept["similarity"], np.float32)
        for order in ("retrieved", "high", "low"):
            prompts[order] = pool.retrieved_histories(
                np.array([0, len(found[0])]), *found, LENGTH, order
            )
        crm = {}
        for kind, history in self.histories().items():
            rows, mask = history.event_rows(np.array([number]))
            crm[kind] = rows[mask].tolist()
        return {
            "whole": list(range(start, end)),
            "retrieved": kept["events"],
            **{f"{order} prompt": shown.events.tolist() for order, shown in prompts.items()},
            **crm,
        }, (kept["similarity"], [shown.drop_rank.tolist() for shown in prompts.values()])

    def histories(self):
        log = Interactions.of(self.tables)
        return {
            "din": RecentHistory(log, LENGTH),
            "sim": RetrievedHistory(log, self.path, LENGTH),
        }

    def seen(self, number):
        """Contents of all behaviours of a sample, and what ranks them."""
        events, ranks = self.behaviours(number)
        return {kind: [self.rows[e] for e in found] for kind, found in events.items()}, ranks


@st.composite
def logs(draw):
    rows = draw(st.lists(ROW, min_size=24, max_size=60, unique_by=identity))
    return draw(st.permutations(rows))


@st.composite
def configs(draw, freeze=None):
    return DataConfig(
        min_history=draw(st.integers(1, 3)),
        strict_time=draw(st.booleans()),
        freeze_history=draw(st.booleans()) if freeze is None else freeze,
    )


@st.composite
def futures(draw, target, rows, config):
    """Another log in which the target and its past are as they were, in any order of rows."""
    kept = [
        *past_of(target, rows, config),
        (*target[:2], draw(st.sampled_from(RATINGS)), target[3]),
    ]
    later = st.integers(target[3], LATEST + 2)
    mine = st.tuples(
        st.just(target[0]), st.sampled_from(ITEMS), st.sampled_from(RATINGS), later
    ).filter(lambda row: config.strict_time or key(row) > key(target))
    other = ROW.filter(lambda row: row[0] != target[0])
    for strategy, size in ((mine, 8), (other, 30)):
        known = {identity(row) for row in kept}
        drawn = draw(st.lists(strategy, max_size=size, unique_by=identity))
        kept += [row for row in drawn if identity(row) not in known]
    return draw(st.permutations(kept))


def run(rows, config, folder):
    """A run, or a rejected example when the log is too small to be split."""
    try:
        return Run(rows, config, folder)
    except TableError as error:
        assume("a split is empty" not in str(error))
        raise


@SETTINGS
@given(logs(), configs())
def test_histories_random_logs_hold_earlier_events_of_the_user_only(rows, config):
    with tempfile.TemporaryDirectory() as folder:
        made = run(rows, config, Path(folder) / "run")
        train = [sample for sample in made.samples if sample["split"] == 0]
        last_train = made.rows[train[-1]["event"]]
        for number, sample in enumerate(made.samples):
            target = made.rows[sample["event"]]
            past = past_of(target, rows, config)
            if config.freeze_history:
                limit = (last_train[3], last_train[0], last_train[1])
                past = [row for row in past if (row[3], row[0], row[1]) <= limit]
            seen, _ = made.seen(number)
            assert seen["whole"] == past
            assert seen["din"] == seen["recent prompt"] == past[-LENGTH:]
            assert all(row in past for found in seen.values() for row in found)
            assert len(seen["retrieved"]) == min(2 * LENGTH, len(past))
            assert seen["sim"] == seen["retrieved prompt"]


@SETTINGS
@given(logs(), configs(freeze=False), st.data())
def test_inputs_of_a_target_when_the_future_is_rewritten_stay_bit_equal(rows, config, data):
    with tempfile.TemporaryDirectory() as folder:
        before = run(rows, config, Path(folder) / "before")
        number = data.draw(st.integers(0, len(before.samples) - 1))
        target = before.rows[before.samples[number]["event"]]
        after = run(data.draw(futures(target, rows, config)), config, Path(folder) / "after")
        again = after.number(target)
        assert again is not None
        assert before.seen(number) == after.seen(again)

        log = Interactions.of(before.tables)
        for kind, history in before.histories().items():
            vocabulary = build(log, history, np.arange(log.num_samples), CRM)
            other = after.histories()[kind]
            one = Features(log, history, vocabulary).gather(np.array([number]))
            two = Features(Interactions.of(after.tables), other, vocabulary)
            # Ratings that only the future holds have no id, in both.
            assert equal(one, two.gather(np.array([again])))


@SETTINGS
@given(logs(), configs(), st.data())
def test_inputs_of_a_target_when_later_ratings_change_stay_bit_equal(rows, config, data):
    with tempfile.TemporaryDirectory() as folder:
        before = run(rows, config, Path(folder) / "before")
        number = data.draw(st.integers(0, len(before.samples) - 1))
        target = before.rows[before.samples[number]["event"]]
        past = {identity(row) for row in past_of(target, rows, config)}
        altered = [r if identity(r) in past else (*r[:2], 6.0 - r[2], r[3]) for r in rows]
        after = run(altered, config, Path(folder) / "after")
        assert after.samples[number]["label"] == (6.0 - target[2] > config.label_threshold)
        assert before.seen(number) == after.seen(number)


@SETTINGS
@given(logs(), configs(), st.sampled_from(["din", "sim"]), st.permutations(ITEMS))
def test_vocabulary_and_features_of_train_when_later_events_change_stay_equal(
    rows, config, kind, other_items
):
    with tempfile.TemporaryDirectory() as folder:
        before = run(rows, config, Path(folder) / "before")
        log = Interactions.of(before.tables)
        train = log.split_rows("train")
        end = before.rows[before.samples[train[-1]]["event"]][3]
        swap = dict(zip(ITEMS, other_items, strict=True))
        altered = [r if r[3] <= end else (r[0], swap[r[1]], 6.0 - r[2], r[3]) for r in rows]
        after = run(altered, config, Path(folder) / "after")
        again = Interactions.of(after.tables)
        assert (again.split_rows("train") == train).all()
        histories = before.histories()[kind], after.histories()[kind]
        vocabulary = build(log, histories[0], train, CRM)
        assert build(again, histories[1], train, CRM) == vocabulary
        assert vocabulary.unseen_items == unseen(before, kind, train)
        batches = [
            Features(each, history, vocabulary).gather(train)
            for each, history in zip((log, again), histories, strict=True)
        ]
        assert equal(*batches)


def equal(one, two):
    """Whether two batches of features hold the same, to the bit."""
    assert one.gaps is not None
    pairs = [pair for pair in zip(one, two, strict=True) if pair != (None, None)]
    return all(torch.equal(left, right) for left, right in pairs)


def unseen(made, kind, train):
    """Items that no training target and no training history holds."""
    known = {made.rows[made.samples[n]["event"]][1] for n in train}
    for number in train:
        known |= {row[1] for row in made.seen(number)[0][kind]}
    return tuple(n for n, item in enumerate(sorted(ITEMS)) if item not in known)


def test_histories_of_one_second_follow_item_ids_unless_time_is_strict():
    times = {2: [(1, 0), (4, 0), (7, 1), (12, 1), (20, 1)], 9: [(1, n) for n in range(20)]}
    rows = [(user, item, 4.0, time) for user, pairs in times.items() for item, time in pairs][::-1]
    expected = {
        False: {(4, 0): [1], (7, 1): [1, 4], (12, 1): [1, 4, 7], (20, 1): [1, 4, 7, 12]},
        True: {(7, 1): [1, 4], (12, 1): [1, 4], (20, 1): [1, 4]},
    }
    for strict, wanted in expected.items():
        tables = build_tables(raw_log(rows), DataConfig(min_history=1, strict_time=strict))
        items = np.sort(ITEMS)[tables.events["item"].to_numpy()]
        time = tables.events["time"].to_numpy()
        found = {
            (int(items[s["event"]]), int(time[s["event"]])): items[
                s["history_start"] : s["history_end"]
            ].tolist()
            for s in tables.samples.to_pylist()
            if s["user"] == 0
        }
        assert found == wanted


def test_a_history_that_reaches_its_target_is_refused():
    rows = [(user, item, 4.0, n) for user in USERS for n, item in enumerate(ITEMS)]
    tables = build_tables(raw_log(rows), DataConfig(min_history=1))
    place = tables.samples.column_names.index("history_end")
    beyond = pa.array(tables.samples["event"].to_numpy() + 1)
    late = tables.samples.set_column(place, "history_end", beyond)
    with pytest.raises(TableError, match="reaches its own target"):
        Interactions.of(dataclasses.replace(tables, samples=late))


@pytest.mark.ray
def test_item_vectors_and_their_pca_need_the_item_table_alone(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path, embeddings={"encoder": "backbone", "dimensions": 8}))
    work = WorkDir(tmp_path / "run")
    tables_stage.STAGE.run(recipe, work)
    for name in ("users", "events", "samples"):
        (work.stage_dir("tables") / f"{name}.parquet").unlink()
    made = tmp_path / "vectors"
    made.mkdir()
    try:
        embeddings.build(StageContext(recipe, work, made, "key"))
    finally:
        disconnect()
    assert np.load(made / "item_vectors.npy").shape == (60, 8)
