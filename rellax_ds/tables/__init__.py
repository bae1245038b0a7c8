"""Stage 1's room: raw files become the four canonical tables.

A reader per data set turns its files into a `RawLog` with the data set's own ids; `split` turns any
`RawLog` into `Tables`. Nothing behind this boundary knows where the rows came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds import schema
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import polars as pl

_ROW_GROUP = 1 << 13  # a few hundred random rows decode a few hundred groups: keep them small


@dataclass(frozen=True)
class RawLog:
    """A checked event log, still with the data set's own ids, integers or strings.

    Attributes:
        users: `user_id` (int64 or string, unique) and profile fields as strings.
        items: `item_id` (int64 or string, unique), `title`, `genre` and further text fields as
            strings.
        events: `user_id`, `item_id`, `rating` (float32) and `time` (int64 seconds; without times, a
            position in the user's own order), in file order; every id is known to `users` and
            `items`, and no (user, item, time) occurs twice.
    """

    users: pl.DataFrame
    items: pl.DataFrame
    events: pl.DataFrame


@dataclass(frozen=True)
class Tables:
    """The four canonical tables, see `rellax_ds.schema`."""

    users: pa.Table
    items: pa.Table
    events: pa.Table
    samples: pa.Table


def write_tables(tables: Tables, folder: Path) -> None:
    """Write the four tables as Parquet files; equal tables give equal bytes."""
    for name in ("users", "items", "events", "samples"):
        write_parquet(getattr(tables, name), folder / f"{name}.parquet")


def read_tables(folder: Path) -> Tables:
    """Read and check the four tables of a `1_tables` folder.

    Raises:
        TableError: A file is absent, no Parquet, or not of the promised form.
    """
    return Tables(
        users=read_parquet(folder / "users.parquet", schema.USERS),
        items=read_parquet(folder / "items.parquet", schema.ITEMS),
        events=read_parquet(folder / "events.parquet", schema.EVENTS),
        samples=read_parquet(folder / "samples.parquet", schema.SAMPLES),
    )


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one table; the bytes depend on its rows only."""
    pq.write_table(table.combine_chunks(), path, compression="zstd", row_group_size=_ROW_GROUP)


def read_parquet(path: Path, columns: Mapping[str, pa.DataType], *, only: bool = False) -> pa.Table:
    """Read one table and check it against `columns`, one of the mappings of `rellax_ds.schema`.

    Args:
        path: Parquet file.
        columns: Name to type of the columns it must have.
        only: Read these columns and no others.

    Raises:
        TableError: The file is absent, no Parquet, or not of the promised form.
    """
    try:
        table = pq.read_table(path, columns=list(columns) if only else None)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; rerun the stage that writes it") from None
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise TableError(
            f"{path}: not a readable Parquet file ({reason}); rerun the stage that writes it"
        ) from None
    return schema.check_table(table, columns, str(path))
