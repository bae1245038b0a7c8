"""From a log to samples: order, labels, histories and the split by time.

The walk of the published preprocessing (sort once, every event's history is what its user did
before it) is a property of sorted columns: with events in (user, time, item) order a history is a
range of rows. So the whole stage is a few sorts and cumulative counts, and no list per row exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    Events are ordered by (user, time, item), samples by (time, user, item), ids as integers. The
    history of an event is all that its user did before it in this order; an event with a history
    shorter than `config.min_history` is no sample. The first int(s0 n) samples are train, the next
    int(s1 n) valid, the rest test. Histories run on into valid and test (streaming protocol)
    unless `config.freeze_history` ends them at the last training event; `config.strict_time` leaves
    out events of the target's own second. A frozen history may be empty.

    Args:
        log: A checked log.
        config: The recipe's data section.

    Raises:
        TableError: Too few samples remain to fill every split.
    """
    users = log.users.sort("user_id").with_row_index("user")
    items = log.items.sort("item_id").with_row_index("item")
    events = (
        log.events.join(users.select("user", "user_id"), on="user_id")
        .join(items.select("item", "item_id"), on="item_id")
        .sort("user", "time", "item")
    )
    user = events["user"].cast(pl.Int64).to_numpy()
    item = events["item"].cast(pl.Int64).to_numpy()
    time = events["time"].to_numpy()
    label = (events["rating"].cast(pl.Float64) > config.label_threshold).cast(pl.Int8).to_numpy()
    user_start = np.searchsorted(user, np.arange(users.height + 1))

    samples = _samples(user, item, time, label, user_start, config)
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
        events=_typed(
            {**_columns(events.select("user", "item", "rating", "time")), "label": label},
            schema.EVENTS,
        ),
        samples=_typed(samples, schema.SAMPLES),
    )


def _samples(
    user: Ints, item: Ints, time: Ints, label: Ints, user_start: Ints, config: DataConfig
) -> dict[str, Ints]:
    """Columns of the sample table, from events in (user, time, item) order."""
    start = user_start[user]
    end = _group_start(user, time) if config.strict_time else np.arange(user.size)
    target = np.flatnonzero(end - start >= config.min_history)
    # Rows are in (user, time, item) order already, so a stable sort by time completes the order.
    target = target[np.argsort(time[target], kind="stable")]
    sizes = _split_sizes(target.size, config)
    split = np.repeat(np.arange(len(sizes)), sizes)
    history_end = end[target]
    if config.freeze_history:
        last = target[sizes[0] - 1]
        frozen = start + _count_until(user_start, user, (time, user, item), last)
        history_end = np.minimum(history_end, frozen[target])

    return {
        "event": target,
        "user": user[target],
        "item": item[target],
        "label": label[target],
        "split": split,
        "history_start": start[target],
        "history_end": history_end,
    }


def _group_start(user: Ints, time: Ints) -> Ints:
    """Row of the first event of the same user and second, for every row."""
    fresh = np.ones(user.size, bool)
    fresh[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    rows = np.where(fresh, np.arange(user.size), 0)
    return np.maximum.accumulate(rows) if rows.size else rows


def _count_until(user_start: Ints, user: Ints, key: tuple[Ints, ...], last: int) -> Ints:
    """How many of a user's events are not after row `last` in the order of `key`, for every row."""
    before = np.zeros(user.size, bool)
    equal = np.ones(user.size, bool)
    for column in key:
        before |= equal & (column < column[last])
        equal &= column == column[last]
    counts = np.bincount(user[before | equal], minlength=user_start.size - 1)
    per_row: Ints = counts[user]
    return per_row


def _split_sizes(num_samples: int, config: DataConfig) -> tuple[int, int, int]:
    train, valid = (int(share * num_samples) for share in config.split[:2])
    sizes = train, valid, num_samples - train - valid
    if min(sizes) < 1:
        shown = ", ".join(f"{n} {name}" for n, name in zip(sizes, schema.SPLITS, strict=True))
        raise TableError(
            f"the log gives {num_samples} samples ({shown}) and a split is empty; use more events "
            f"or a data.min_history below {config.min_history}"
        )
    return sizes


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
