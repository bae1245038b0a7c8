"""Any log in CSV, TSV, Parquet or RecBole files, by the column mapping of the recipe.

Ids are whatever the columns hold. They are numbered as they are met, so that memory grows with the
ids and 20 bytes an event, not with the text; only if all of them are plain integers do they sort as
integers. What cannot be known of a stranger's file is asked for, never guessed: the unit of time,
the meaning of a rating.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rellax_ds import runtime
from rellax_ds.errors import TableError
from rellax_ds.tables import RawLog, columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.ratings import repeated_events

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rellax_ds.data_config import ColumnsConfig, DataConfig

_PACKED = {".gz", ".bz2", ".zst"}
_ATOMIC = {".inter", ".item", ".user"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Seconds up to the year 4147; milliseconds of any date since 1972 lie above.
_MAX_TIME = 2**36
_INTEGER = r"^(?:0|-?[1-9][0-9]{0,17})$"
_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<hour>[01]\d|2[0-3]):(?<minute>[0-5]\d)(?::(?<second>[0-5]\d)(?:[.,]\d+)?)?)?"
    r"(?:Z| ?(?<offset>[+-]\d{2}):?(?<offset_minute>[0-5]\d)?)?$"
)


def files(config: DataConfig) -> dict[str, Path]:
    """Files of the recipe by role: events and, where given, items and users."""
    given = {"events": config.events, "items": config.items, "users": config.users}
    base = config.path or Path()
    return {role: base / path.expanduser() for role, path in given.items() if path is not None}


def read(config: DataConfig) -> RawLog:
    """Read a log by the recipe's column mapping.

    Without an item file items are the ids of the events, without a user file so are users. An item
    without a title is called by its id; a genre may be empty. Of several events with the same user,
    item and time the last one in the file is kept, and the log says how many were left out. Without
    a time column a user's events keep the order of the file.

    Args:
        config: The recipe's data section.

    Returns:
        The log; ids are integers if all ids of the kind are, strings otherwise; users and items
        sorted by id, events in file order.

    Raises:
        TableError: A file or column is absent, or a value is missing or not of its kind; names
            file, place and value.
    """
    if config.columns is None:
        raise TableError("data.columns is missing; map user, item, time and rating to columns")
    mapping = config.columns
    paths = files(config)
    item_ids, user_ids = _Ids(), _Ids()
    items = users = None
    if "items" in paths:
        items = _read_table(paths["items"], mapping, "item_id", mapping.item, mapping.item_text)
        item_ids = _Ids(items["item_id"])
    if "users" in paths:
        users = _read_table(paths["users"], mapping, "user_id", mapping.user, mapping.user_fields)
        user_ids = _Ids(users["user_id"])
    events = _read_events(paths["events"], mapping, user_ids, item_ids)
    if users is None:
        users = pl.DataFrame({"user_id": user_ids.texts})
    if items is None:
        items = pl.DataFrame({"item_id": item_ids.texts})
    events = _without_repeats(paths["events"], events)
    return RawLog(
        users=_with_ids(users, "user_id").sort("user_id"),
        items=_with_ids(_with_text(items), "item_id").sort("item_id"),
        events=events.select(
            user_ids.values().gather(events["user_id"]).alias("user_id"),
            item_ids.values().gather(events["item_id"]).alias("item_id"),
            "rating",
            "time",
        ),
    )


class _Ids:
    """Ids as text, numbered in the order they are met; closed once a file has listed them."""

    def __init__(self, known: pl.Series | None = None) -> None:
        self.closed = known is not None
        self.texts = pl.Series("id", [] if known is None else known, pl.String)

    def encode(self, texts: pl.Series) -> pl.Series:
        """Numbers of `texts`, uint32; null where a closed list lacks one."""
        if not self.closed:
            met = pl.DataFrame({"id": texts}).unique(maintain_order=True)
            fresh = met.join(self.texts.to_frame("id"), on="id", how="anti", maintain_order="left")
            self.texts = pl.concat([self.texts, fresh["id"]])
        numbered = self.texts.to_frame("id").with_row_index("number")
        found = pl.DataFrame({"id": texts}).join(
            numbered, on="id", how="left", maintain_order="left"
        )
        return found["number"]

    def values(self) -> pl.Series:
        """The ids by number, as integers if all of them are."""
        return _typed_ids(self.texts)


def _typed_ids(texts: pl.Series) -> pl.Series:
    return texts.cast(pl.Int64) if texts.str.contains(_INTEGER).all() else texts


def _with_ids(table: pl.DataFrame, key: str) -> pl.DataFrame:
    return table.with_columns(_typed_ids(table[key]).alias(key))


def _with_text(items: pl.DataFrame) -> pl.DataFrame:
    """Items with the two text columns that every item has."""
    given = items.columns
    title = pl.col("title") if "title" in given else pl.lit("")
    return items.with_columns(
        title=pl.when(title == "").then(pl.col("item_id")).otherwise(title),
        genre=pl.col("genre") if "genre" in given else pl.lit(""),
    )


def _form(path: Path, mapping: ColumnsConfig) -> Form:
    """How a file is written, by the ending of its name."""
    endings = [ending.lower() for ending in path.suffixes]
    while endings and endings[-1] in _PACKED:
        endings.pop()
    ending = endings[-1] if endings else ""
    if ending == ".parquet":
        return Form(parquet=True)
    if ending in _ATOMIC:
        return Form(mapping.separator or "\t")
    separator = mapping.separator or _SEPARATORS.get(ending)
    if separator is None:
        known = ", ".join((*_SEPARATORS, ".parquet", *sorted(_ATOMIC)))
        raise TableError(
            f"{path}: '{ending}' is no known ending ({known}); rename the file or set "
            "data.columns.separator"
        )
    return Form(separator, quoted=True)


def _read_table(
    path: Path, mapping: ColumnsConfig, key: str, key_column: str, fields: Mapping[str, str]
) -> pl.DataFrame:
    """Ids and text fields of an item or user file, as strings."""
    raw = columns.table(path, _form(path, mapping), (key_column, *fields.values()))
    raw = raw.with_columns(_id_text(path, raw, key_column))
    columns.reject_repeated_ids(path, raw, key_column)
    text = [
        pl.col(column).cast(pl.String).fill_null("").str.strip_chars().alias(name)
        for name, column in fields.items()
    ]
    return raw.select(pl.col(key_column).alias(key), *text)


def _read_events(path: Path, mapping: ColumnsConfig, users: _Ids, items: _Ids) -> pl.DataFrame:
    """Numbers of user and item (uint32), `rating` and `time`, in file order."""
    value = mapping.rating or mapping.label or ""
    wanted = [mapping.user, mapping.item, value, *([mapping.time] if mapping.time else [])]
    parts = []
    for raw in columns.stream(path, _form(path, mapping), wanted):
        part = {}
        for name, column, ids in (("user", mapping.user, users), ("item", mapping.item, items)):
            number = ids.encode(raw.select(_id_text(path, raw, column)).to_series())
            unknown = f"is no {name} of the {name} file; add it there"
            columns.reject(path, raw, column, pl.lit(number).is_null(), unknown)
            part[f"{name}_id"] = number
        part["rating"] = _rating(path, raw, value, is_label=mapping.rating is None)
        if mapping.time:
            part["time"] = _seconds(path, raw, mapping.time, mapping.time_unit)
        parts.append(pl.DataFrame(part))
    events = pl.concat(parts)
    if mapping.time is None:
        position = pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")
        events = events.with_columns(time=position)
    return events


def _without_repeats(path: Path, events: pl.DataFrame) -> pl.DataFrame:
    """Events without those that a later row repeats: same user, item and time."""
    later = repeated_events(events.reverse())
    if not later.size:
        return events
    runtime.logger.info(
        "tables: %s: %d events left out because a later row has the same user, item and time",
        path,
        later.size,
    )
    kept = np.ones(events.height, bool)
    kept[events.height - 1 - later] = False
    return events.filter(pl.Series(kept))


def _id_text(path: Path, raw: pl.DataFrame, column: str) -> pl.Expr:
    """Ids as text; none may be missing."""
    kind = raw.schema[column]
    if not (kind.is_integer() or kind.base_type() in {pl.String, pl.Categorical, pl.Enum}):
        raise TableError(
            f"{path}: column '{column}' is {kind}, an id is an integer or text; convert the column"
        )
    text = pl.col(column).cast(pl.String).str.strip_chars()
    columns.reject(path, raw, column, text.is_null() | (text == ""), "is no id; fill or remove it")
    return text


def _rating(path: Path, raw: pl.DataFrame, column: str, *, is_label: bool) -> pl.Series:
    value = columns.number(column)
    if is_label:
        columns.reject(
            path, raw, column, ~value.is_in([0.0, 1.0]).fill_null(False), "is no label, 0 or 1"
        )
    columns.reject(path, raw, column, value.is_null(), "is no finite number")
    return raw.select(value.cast(pl.Float32).alias("rating")).to_series()


def _seconds(path: Path, raw: pl.DataFrame, column: str, unit: str) -> pl.Series:
    """Whole seconds since 1970, rounded down."""
    kind = raw.schema[column]
    if kind.base_type() in {pl.Date, pl.Datetime}:
        moment = pl.col(column).cast(pl.Datetime("us"))
        seconds, form = moment.dt.epoch("us").floordiv(1_000_000), "no date"
    elif unit == "iso":
        seconds, form = _iso_seconds(column), "no date in ISO 8601 (2024-01-31T18:00:00Z)"
    else:
        per_second = 1000 if unit == "ms" else 1
        seconds = (columns.number(column) / per_second).floor().cast(pl.Int64, strict=False)
        form = f"no time in {'milliseconds' if unit == 'ms' else 'seconds'} since 1970"
    credible = seconds.is_between(0, _MAX_TIME).fill_null(False)
    reason = f"is {form}; data.columns.time_unit is {unit}"
    columns.reject(path, raw, column, ~credible, reason)
    return raw.select(seconds.cast(pl.Int64).alias("time")).to_series()


def _iso_seconds(column: str) -> pl.Expr:
    """Seconds since 1970 of ISO 8601 text; without an offset it is UTC."""
    parts = pl.col(column).cast(pl.String).str.strip_chars().str.extract_groups(_ISO).struct

    def part(name: str) -> pl.Expr:
        return parts.field(name).cast(pl.Int64, strict=False).fill_null(0)

    days = parts.field("date").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64)
    sign = pl.when(parts.field("offset").str.starts_with("-")).then(-1).otherwise(1)
    offset = part("offset") * 3600 + sign * part("offset_minute") * 60
    return days * 86_400 + part("hour") * 3600 + part("minute") * 60 + part("second") - offset
