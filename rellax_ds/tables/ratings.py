"""Rating files with integer ids, as every MovieLens release has them: checked, compact columns.

The releases differ in separators and names only, so they share one reader: batch after batch is
checked as text and kept as numbers, 28 bytes an event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rellax_ds.errors import TableError
from rellax_ds.tables import columns

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.tables.columns import Form

MAX_TIME = 2**40
"""Times lie below this many seconds since 1970."""

KEY = ("user_id", "item_id", "time")

_SLICE = 1 << 20
# Odd, so that the product with any of them is a bijection of 64-bit numbers.
_MIXERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def read_ratings(
    path: Path,
    form: Form,
    names: tuple[str, str, str, str],
    users: pl.DataFrame | None,
    items: pl.DataFrame,
) -> pl.DataFrame:
    """Read a rating file.

    Args:
        path: The file.
        form: How it is written.
        names: Its columns for user, item, rating and time.
        users: Known users, column `user_id`; None accepts every one.
        items: Known items, column `item_id`.

    Returns:
        `user_id`, `item_id` (int64), `rating` (float32), `time` (int64), in file order.

    Raises:
        TableError: A value is no integer id, no finite rating or no time in whole seconds, an id
            is unknown, or the same (user, item, time) occurs twice.
    """
    parts = []
    for raw in columns.stream(path, form, names):
        part = _checked(path, raw, names)
        if users is not None:
            columns.reject_unknown_ids(path, part, "user_id", users["user_id"])
        columns.reject_unknown_ids(path, part, "item_id", items["item_id"])
        parts.append(part.drop(part.columns[0]))
    events = pl.concat(parts)
    repeated = repeated_events(events)
    if repeated.size:
        row = int(repeated[0])
        event = " ".join(str(value) for value in events.select(KEY).row(row))
        line = row + (1 if form.columns else 2)
        raise TableError(
            f"{path}, line {line}: event '{event}' (user, item, time) occurs on an earlier line "
            "too; remove one of the rows"
        )
    return events


def repeated_events(events: pl.DataFrame) -> NDArray[np.int64]:
    """Rows whose (user_id, item_id, time) an earlier row has too, ascending.

    The ids must be integers. A row is one 64-bit number first, so that the search costs one sort
    of 8 bytes an event; only rows that share a number are compared in full.
    """
    ordered = _mixed(events)
    ordered.sort()
    shared = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not shared.size:
        return np.zeros(0, np.int64)
    suspects = np.flatnonzero(np.isin(_mixed(events), shared))
    rows = events[suspects].select(again=~pl.struct(KEY).is_first_distinct())["again"].to_numpy()
    repeated: NDArray[np.int64] = suspects[rows]
    return repeated


def _mixed(events: pl.DataFrame) -> NDArray[np.uint64]:
    mixed = np.empty(events.height, np.uint64)
    for start in range(0, events.height, _SLICE):
        part = events.slice(start, _SLICE)
        mixed[start : start + _SLICE] = sum(
            part[name].cast(pl.Int64).to_numpy().view(np.uint64) * np.uint64(mixer)
            for name, mixer in zip(KEY, _MIXERS, strict=True)
        )
    return mixed


def _checked(path: Path, raw: pl.DataFrame, names: tuple[str, str, str, str]) -> pl.DataFrame:
    user, item, rating, time = names
    seconds = columns.number(time)
    whole = (seconds == seconds.floor()) & seconds.is_between(0, MAX_TIME)
    for name, bad, reason in (
        (user, columns.integer(user).is_null(), "is no integer user id"),
        (item, columns.integer(item).is_null(), "is no integer item id"),
        (rating, columns.number(rating).is_null(), "is no finite number"),
        (time, ~whole.fill_null(False), "is no time in whole seconds since 1970"),
    ):
        columns.reject(path, raw, name, bad, reason)
    return raw.select(
        pl.first(),
        columns.integer(user).alias("user_id"),
        columns.integer(item).alias("item_id"),
        columns.number(rating).cast(pl.Float32).alias("rating"),
        seconds.cast(pl.Int64).alias("time"),
    )
