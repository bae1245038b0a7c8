"""Column names and types of the canonical tables: the one vocabulary of the data path.

Stage 1 writes four Parquet tables and every later stage reads them through `check_table`, so a
wrong table stops at the boundary with the column's name instead of three stages later with a stack
trace. Behaviour is stored once, as a column sorted by (user, time, item); a history is a range of
row numbers, never a list per row.

    users    one row a user, row number = `user`; `event_start:event_end` is the user's range of
    `events` items    one row an item, row number = `item` events   one row an event, sorted by
    (user, time, item); row number = the event's id samples  one row a (user, target) pair, in
    global time order, or user by user when users are split; row number = the sample's id
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Mapping

SPLITS = ("train", "valid", "test")
"""Names of the splits; `samples.split` holds the position in this tuple."""

USERS = {
    "user": pa.int32(),
    "user_id": pa.string(),
    "event_start": pa.int64(),
    "event_end": pa.int64(),
}
"""Required columns of `users`; profile fields (gender, age, occupation, zip, ...) follow as string
columns.
"""

ITEMS = {
    "item": pa.int32(),
    "item_id": pa.string(),
    "title": pa.string(),
    "genre": pa.string(),
}
"""Required columns of `items`; `genre` is the first genre; further text fields follow as string
columns.
"""

EVENTS = {
    "user": pa.int32(),
    "item": pa.int32(),
    "rating": pa.float32(),
    "label": pa.int8(),
    "time": pa.int64(),
}
"""Columns of `events`; `time` is in seconds (in a log without times a position in the user's own
order), `label` is 1 for a like.
"""

SAMPLES = {
    "event": pa.int64(),
    "user": pa.int32(),
    "item": pa.int32(),
    "label": pa.int8(),
    "split": pa.int8(),
    "history_start": pa.int64(),
    "history_end": pa.int64(),
}
"""Columns of `samples`; the history is rows `history_start:history_end` of `events`, all before
`event`.
"""

RETRIEVED = {
    "sample": pa.int64(),
    "events": pa.large_list(pa.int64()),
    "similarity": pa.large_list(pa.float32()),
}
"""Columns of stage 3's table: event rows retrieved for a sample, in chronological order, with
cosine similarity.
"""

PREDICTIONS = {
    "sample": pa.int64(),
    "user": pa.int32(),
    "item": pa.int32(),
    "split": pa.int8(),
    "label": pa.int8(),
    "logit": pa.float32(),
}
"""Columns of stage 7's table; `logit` is the yes logit minus the no logit at the answer
position.
"""


def check_table(table: pa.Table, columns: Mapping[str, pa.DataType], where: str) -> pa.Table:
    """Check that `table` has every column of `columns`, of that type and without nulls.

    Args:
        table: The table to check; further columns are allowed.
        columns: Name to Arrow type, one of the mappings of this module.
        where: What the message names, usually the file's path.

    Returns:
        `table` itself, so that a read can be wrapped.

    Raises:
        TableError: A column is absent, has another type or holds a null.
    """
    for name, kind in columns.items():
        if name not in table.column_names:
            found = ", ".join(table.column_names)
            raise TableError(
                f"{where}: column '{name}' is missing (found: {found}); rerun its stage"
            )
        column = table.column(name)
        if column.type != kind:
            raise TableError(
                f"{where}: column '{name}' is {column.type}, expected {kind}; rerun its stage"
            )
        if column.null_count:
            raise TableError(
                f"{where}: column '{name}' holds {column.null_count} empty values; mend the data"
            )
    return table
