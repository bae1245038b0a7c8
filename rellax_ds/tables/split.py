"""From a log to samples: order, labels, histories and the split, by time or by user.

The walk of the published preprocessing (sort once, every event's history is what its user did
before it) is a property of sorted columns: with events in (user, time, item) order a history is a
range of rows. So the whole stage is a few sorts and cumulative counts, and no list per row exists.
A log without times is the same walk: its reader numbers a user's events and the number is the time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from rellax_ds import schema
from rellax_ds.errors import TableError
from rellax_ds.tables import RawLog, Tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rellax_ds.config import DataConfig

    Ints = NDArray[np.int64]


def build_tables(log: RawLog, config: DataConfig) -> Tables:
    """Build the four canonical tables.

    Events are ordered by (user, time, item), ids as integers if they are integers and bytewise if
    they are text. The history of an event is all that its user did before it in this order; an
    event with a history shorter than `config.min_history` is no sample. `config.strict_time` leaves
    events of the target's own second out of the history.

    Split by time, samples are ordered by (time, user, item); the first int(s0 n) are train, the
    next int(s1 n) valid, the rest test. Histories run on into valid and test (streaming protocol)
    unless `config.freeze_history` ends them at the last training event; a frozen history may be
    empty.

    Split by user, users with a sample are taken in the order in which the log first names them and
    shuffled by Python's generator from `config.split_seed`. The first int((s0 + s1) n) are for
    training; the last int(s1 / (s0 + s1) ...) of those are held out as valid; the rest are test.
    So the test users do not depend on how many are valid. Samples are ordered by (user in that
    order, time, item). `config.samples_per_user` last keeps only the last event of each user.

    Args:
        log: A checked log.
        config: The recipe's data section.

    Raises:
        TableError: Too few samples remain to fill every split.
    """
    users = log.users.sort("user_id").with_row_index("user")
    items = log.items.sort("item_id").with_row_index("item")
    rows = log.events.select(
        _rows_of(log.events, users, "user"), _rows_of(log.events, items, "item"), "rating", "time"
    )
    first_named = rows["user"].unique(maintain_order=True) if config.split_by == "user" else None
    events = rows.sort("user", "time", "item")
    del rows
    user = events["user"].cast(pl.Int64).to_numpy()
    user_start = np.searchsorted(user, np.arange(users.height + 1))
    label = config.likes(events["rating"].cast(pl.Float64).to_numpy()).astype(np.int8)
    sorted_log = _SortedLog(
        user=user,
        item=events["item"].cast(pl.Int64).to_numpy(),
        time=events["time"].to_numpy(),
        user_start=user_start,
    )
    samples = _samples(sorted_log, label, config, first_named)
    ranges = {"event_start": user_start[:-1], "event_end": user_start[1:]}
    return Tables(
        users=_typed(
            {
                **_columns(users.select("user", "user_id")),
                **ranges,
                **_columns(users.drop("user", "user_id")),
            },
            schema.USERS,
        ),
        items=_typed(_columns(items.select("item", pl.exclude("item"))), schema.ITEMS),
        events=_typed({**_columns(events), "label": label}, schema.EVENTS),
        samples=_typed(samples, schema.SAMPLES),
    )


@dataclass(frozen=True)
class _SortedLog:
    """Columns of the events in (user, time, item) order; `user_start` [num_users + 1]."""

    user: Ints
    item: Ints
    time: Ints
    user_start: Ints


def _rows_of(events: pl.DataFrame, table: pl.DataFrame, name: str) -> pl.Series:
    """Row number in `table` of every event's user or item."""
    key = f"{name}_id"
    found = events.select(key).join(
        table.select(key, name), on=key, how="left", maintain_order="left"
    )
    return found[name]


def _samples(
    log: _SortedLog, label: NDArray[np.int8], config: DataConfig, first_named: pl.Series | None
) -> dict[str, NDArray[Any]]:
    """Columns of the sample table."""
    start = log.user_start[log.user]
    end = _group_start(log.user, log.time) if config.strict_time else np.arange(log.user.size)
    target = np.flatnonzero(end - start >= config.min_history)
    if first_named is None:
        # Rows are in (user, time, item) order, so a stable sort by time completes the order.
        target = target[np.argsort(log.time[target], kind="stable")]
        sizes = _split_sizes(target.size, config)
    else:
        target, sizes = _by_user(log, target, config, first_named.to_numpy())
    split = np.repeat(np.arange(len(sizes), dtype=np.int8), sizes)
    history_end = end[target]
    if config.freeze_history:
        last = target[sizes[0] - 1]
        frozen = start + _count_until(log, last)
        history_end = np.minimum(history_end, frozen[target])

    return {
        "event": target,
        "user": log.user[target],
        "item": log.item[target],
        "label": label[target],
        "split": split,
        "history_start": start[target],
        "history_end": history_end,
    }


def _by_user(
    log: _SortedLog, target: Ints, config: DataConfig, first_named: NDArray[Any]
) -> tuple[Ints, tuple[int, int, int]]:
    """Targets in the shuffled order of their users, and how many each split takes."""
    if config.samples_per_user == "last":
        target = target[target == log.user_start[log.user[target] + 1] - 1]
    samples_of = np.bincount(log.user[target], minlength=log.user_start.size - 1)
    order = first_named[samples_of[first_named] > 0].tolist()
    random.Random(config.split_seed).shuffle(order)
    users = np.array(order, np.int64)
    train, valid, _ = config.split
    # The sum of two shares may lie a rounding error below a whole number of users.
    num_known = int((train + valid) * users.size + 1e-9)
    num_valid = int(valid / (train + valid) * num_known + 1e-9)
    ends = np.cumsum(samples_of[users])
    cuts = [0, *(int(ends[n - 1]) if n else 0 for n in (num_known - num_valid, num_known))]
    sizes = cuts[1], cuts[2] - cuts[1], target.size - cuts[2]
    _check_filled(sizes, config)
    rank = np.empty(samples_of.size, np.int64)
    rank[users] = np.arange(users.size)
    return target[np.argsort(rank[log.user[target]], kind="stable")], sizes


def _group_start(user: Ints, time: Ints) -> Ints:
    """Row of the first event of the same user and second, for every row."""
    fresh = np.ones(user.size, bool)
    fresh[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    rows = np.where(fresh, np.arange(user.size), 0)
    return np.maximum.accumulate(rows) if rows.size else rows


def _count_until(log: _SortedLog, last: int) -> Ints:
    """How many of a user's events are not after row `last` in the order (time, user, item), for
    every row.
    """
    before = np.zeros(log.user.size, bool)
    equal = np.ones(log.user.size, bool)
    for column in (log.time, log.user, log.item):
        before |= equal & (column < column[last])
        equal &= column == column[last]
    counts = np.bincount(log.user[before | equal], minlength=log.user_start.size - 1)
    per_row: Ints = counts[log.user]
    return per_row


def _split_sizes(num_samples: int, config: DataConfig) -> tuple[int, int, int]:
    train, valid = (int(share * num_samples) for share in config.split[:2])
    sizes = train, valid, num_samples - train - valid
    _check_filled(sizes, config)
    return sizes


def _check_filled(sizes: tuple[int, int, int], config: DataConfig) -> None:
    if min(sizes) < 1:
        shown = ", ".join(f"{n} {name}" for n, name in zip(sizes, schema.SPLITS, strict=True))
        raise TableError(
            f"the log gives {sum(sizes)} samples ({shown}) and a split is empty; use more events "
            f"or a data.min_history below {config.min_history}"
        )


def _columns(frame: pl.DataFrame) -> dict[str, pa.Array]:
    return dict(zip(frame.columns, frame.to_arrow().columns, strict=True))


def _typed(columns: Mapping[str, object], kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """A table with the schema's columns first, in its order and types; all others are strings."""
    order = [*kinds, *(name for name in columns if name not in kinds)]
    fields = [(name, kinds.get(name, pa.string())) for name in order]
    arrays = []
    for name, kind in fields:
        column = columns[name]
        array = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
        arrays.append(array.cast(kind))
    return pa.table(arrays, schema=pa.schema(fields)).combine_chunks()
