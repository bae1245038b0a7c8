"""MovieLens-100K: three text files in one of two layouts become a checked `RawLog`.

`atomic` is the tab-separated form with typed headers in which the data set travels on PyPI,
`official` the published u.data, u.item and u.user; both give the same log. A file is cut into
columns as whole columns, each row keeping its line number, so a check is one expression over a
column and its message can name the line without a second, slow pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from rellax_ds.errors import TableError
from rellax_ds.tables import RawLog

if TYPE_CHECKING:
    from pathlib import Path

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""The flags of u.item in file order; an item's first genre is its first set flag."""

_AGE_BOUNDS = (18, 25, 35, 45, 50, 56)
_AGE_BINS = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
_GENDERS = {"M": "male", "F": "female"}
_MAX_TIME = 2**40
_LINE = "line"


@dataclass(frozen=True)
class _Source:
    """How one file is written: its columns in order, or None when a header names them."""

    name: str
    separator: str
    encoding: str
    columns: tuple[str, ...] | None


_LAYOUTS = {
    "atomic": {
        "events": _Source("ml-100k.inter", "\t", "utf-8", None),
        "items": _Source("ml-100k.item", "\t", "utf-8", None),
        "users": _Source("ml-100k.user", "\t", "utf-8", None),
    },
    "official": {
        "events": _Source("u.data", "\t", "ascii", ("user_id", "item_id", "rating", "timestamp")),
        "items": _Source(
            "u.item",
            "|",
            "latin-1",
            ("item_id", "movie_title", "release_date", "video_date", "url", *GENRES),
        ),
        "users": _Source(
            "u.user", "|", "latin-1", ("user_id", "age", "gender", "occupation", "zip_code")
        ),
    },
}


def read(folder: Path) -> RawLog:
    """Read MovieLens-100K from a folder in either layout.

    Titles are `title (year)`; ages fall into the seven MovieLens-1M bins; genders are spelled out.
    A (user, item) pair may occur again at another second, not at the same one: the order of two
    such rows would be undefined.

    Args:
        folder: Holds `ml-100k.inter/.item/.user` or `u.data/u.item/u.user`.

    Returns:
        The log; users and items sorted by id, events in file order.

    Raises:
        TableError: A file is absent, empty, wrongly encoded or has a bad row; names file, line and
            value.
    """
    layout = _layout(folder)
    sources = _LAYOUTS[layout]
    items = _read_items(folder, sources["items"], official=layout == "official")
    users = _read_users(folder, sources["users"])
    return RawLog(users, items, _read_events(folder, sources["events"], users, items))


def _layout(folder: Path) -> str:
    found = {
        layout: [source.name for source in sources.values() if (folder / source.name).is_file()]
        for layout, sources in _LAYOUTS.items()
    }
    best = max(found, key=lambda layout: len(found[layout]))
    names = [source.name for source in _LAYOUTS[best].values()]
    if not found[best]:
        ways = " or ".join(", ".join(s.name for s in way.values()) for way in _LAYOUTS.values())
        raise TableError(f"{folder}: no MovieLens-100K files here; expected {ways}")
    missing = [name for name in names if name not in found[best]]
    if missing:
        raise TableError(
            f"{folder / missing[0]}: no such file; the folder must hold {', '.join(names)}"
        )
    return best


def _read_events(
    folder: Path, source: _Source, users: pl.DataFrame, items: pl.DataFrame
) -> pl.DataFrame:
    path = folder / source.name
    raw = _read_columns(path, source, ("user_id", "item_id", "rating", "timestamp"))
    rating = _number("rating")
    time = _number("timestamp")
    _reject(path, raw, "user_id", _integer("user_id").is_null(), "is no integer user id")
    _reject(path, raw, "item_id", _integer("item_id").is_null(), "is no integer item id")
    _reject(path, raw, "rating", rating.is_null(), "is no finite number")
    _reject(
        path,
        raw,
        "timestamp",
        time.is_null() | (time != time.floor()) | ~time.is_between(0, _MAX_TIME),
        "is no time in whole seconds since 1970",
    )
    events = raw.select(
        _LINE,
        _integer("user_id"),
        _integer("item_id"),
        rating.cast(pl.Float32),
        time.cast(pl.Int64).alias("time"),
    )
    for name, table in (("user_id", users), ("item_id", items)):
        known = pl.col(name).is_in(table[name].implode())
        what = name.removesuffix("_id")
        _reject(path, events, name, ~known, f"is no {what} of the {what} file; add it there")
    key = ["user_id", "item_id", "time"]
    repeated = ~pl.struct(key).is_first_distinct()
    _reject(
        path,
        events.with_columns(event=pl.format("{} {} {}", *key)),
        "event",
        repeated,
        "(user, item, time) occurs on an earlier line too; remove one of the rows",
    )
    return events.drop(_LINE)


def _read_items(folder: Path, source: _Source, *, official: bool) -> pl.DataFrame:
    path = folder / source.name
    wanted = ("movie_title", *GENRES) if official else ("movie_title", "release_year", "class")
    raw = _read_columns(path, source, ("item_id", *wanted))
    _check_ids(path, raw, "item_id")
    title = pl.col("movie_title").str.strip_chars()
    if official:
        for genre in GENRES:
            _reject(path, raw, genre, ~pl.col(genre).is_in(["0", "1"]), "is no flag, 0 or 1")
        flags = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES]
        genres = pl.concat_str(flags, separator="|", ignore_nulls=True)
    else:
        # The one row that differs from the published file: its title is misspelt, its year a word.
        title = title.replace("unkonwn", "unknown")
        year = pl.col("release_year").str.strip_chars().replace("unkonwn", "")
        title = pl.when(year == "").then(title).otherwise(pl.format("{} ({})", title, year))
        genres = pl.col("class").str.strip_chars().str.replace_all(" +", "|")
    genres = pl.when(genres == "").then(pl.lit(GENRES[0])).otherwise(genres)
    return raw.select(
        _integer("item_id"),
        title.alias("title"),
        genres.str.split("|").list.first().alias("genre"),
        genres.alias("genres"),
    ).sort("item_id")


def _read_users(folder: Path, source: _Source) -> pl.DataFrame:
    path = folder / source.name
    raw = _read_columns(path, source, ("user_id", "age", "gender", "occupation", "zip_code"))
    _check_ids(path, raw, "user_id")
    age = _integer("age")
    _reject(path, raw, "age", ~age.is_between(0, 150).fill_null(False), "is no age in years")
    known = pl.col("gender").is_in(list(_GENDERS))
    _reject(path, raw, "gender", ~known, f"is none of {', '.join(_GENDERS)}")
    bins = pl.lit(_AGE_BINS[-1])
    for bound, name in reversed(tuple(zip(_AGE_BOUNDS, _AGE_BINS, strict=False))):
        bins = pl.when(age < bound).then(pl.lit(name)).otherwise(bins)
    return raw.select(
        _integer("user_id"),
        pl.col("gender").replace_strict(_GENDERS, default=None, return_dtype=pl.String),
        bins.alias("age"),
        pl.col("occupation"),
        pl.col("zip_code").alias("zip"),
    ).sort("user_id")


def _read_columns(path: Path, source: _Source, wanted: tuple[str, ...]) -> pl.DataFrame:
    """The file as string columns plus its line numbers, counted from 1."""
    text = _read_text(path, source.encoding)
    lines = pl.DataFrame({"text": [text]}).select(
        pl.col("text").str.split("\n").explode().str.strip_suffix("\r")
    )
    lines = lines.with_row_index(_LINE, offset=1)
    columns = source.columns
    if columns is None:
        columns = tuple(name.split(":")[0] for name in lines["text"][0].split(source.separator))
        lines = lines.slice(1)
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise TableError(
            f"{path}, line 1: the header lacks '{missing[0]}' (found: {', '.join(columns)}); "
            "it must name every column as name:type, separated by tabs"
        )
    if lines.is_empty():
        raise TableError(f"{path}: holds a header and no rows; check that the copy is complete")
    separators = pl.col("text").str.count_matches(source.separator, literal=True)
    bad = lines.filter(separators != len(columns) - 1).head(1)
    if bad.height:
        line, row = bad.row(0)
        mark = "tab" if source.separator == "\t" else f"'{source.separator}'"
        raise TableError(
            f"{path}, line {line}: {row.count(source.separator) + 1} columns separated by {mark}, "
            f"expected {len(columns)}: {_shown(row)}; mend or remove the row"
        )
    fields = pl.col("text").str.split_exact(source.separator, len(columns) - 1)
    return lines.select(
        _LINE, fields.struct.rename_fields([f"_{n}" for n in range(len(columns))]).alias("row")
    ).select(_LINE, *(pl.col("row").struct.field(f"_{columns.index(n)}").alias(n) for n in wanted))


def _read_text(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise TableError(f"{path}: the file is empty; copy it again")
    if encoding == "latin-1" and not data.isascii() and _is_utf8(data):
        raise TableError(
            f"{path}, line {_first_non_ascii_line(data)}: the text is UTF-8, the published file is "
            "ISO-8859-1; convert it with `iconv -f utf-8 -t iso-8859-1`"
        )
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TableError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; "
            f"save the file as {encoding.upper()}"
        ) from None
    return text.rstrip("\r\n")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _first_non_ascii_line(data: bytes) -> int:
    lines = enumerate(data.split(b"\n"), start=1)
    return next(number for number, line in lines if not line.isascii())


def _integer(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64, strict=False)


def _number(name: str) -> pl.Expr:
    value = pl.col(name).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def _check_ids(path: Path, raw: pl.DataFrame, name: str) -> None:
    value = _integer(name)
    _reject(path, raw, name, value.is_null(), "is no integer")
    _reject(
        path, raw, name, ~value.is_first_distinct(), "occurs on an earlier line too; ids are unique"
    )


def _reject(path: Path, raw: pl.DataFrame, name: str, bad: pl.Expr, reason: str) -> None:
    """Raise for the first row that `bad` marks."""
    rows = raw.filter(bad).head(1)
    if rows.height:
        line, value = rows.select(_LINE, name).row(0)
        raise TableError(f"{path}, line {line}: {name} {_shown(str(value))} {reason}")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
