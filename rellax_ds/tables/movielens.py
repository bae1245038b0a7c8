"""MovieLens-100K: three text files in one of two layouts become a checked `RawLog`.

`atomic` is the tab-separated form with typed headers in which the data set travels on PyPI,
`official` the published u.data, u.item and u.user; both give the same log. The words for ages and
genders are those of the later MovieLens-1M, so that a prompt reads alike on both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from rellax_ds.errors import TableError
from rellax_ds.tables import RawLog, columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.ratings import read_ratings

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

AGE_BOUNDS = (18, 25, 35, 45, 50, 56)
AGE_BINS = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
"""MovieLens-1M's age groups; the bounds are the first ages of all but the youngest."""

GENDERS = {"M": "male", "F": "female"}

_FILES = {
    "atomic": {"events": "ml-100k.inter", "items": "ml-100k.item", "users": "ml-100k.user"},
    "official": {"events": "u.data", "items": "u.item", "users": "u.user"},
}
_ATOMIC = Form()
_FORMS = {
    "atomic": {"events": _ATOMIC, "items": _ATOMIC, "users": _ATOMIC},
    "official": {
        "events": Form("\t", "ascii", ("user_id", "item_id", "rating", "timestamp")),
        "items": Form(
            "|",
            "latin-1",
            ("item_id", "movie_title", "release_date", "video_date", "url", *GENRES),
        ),
        "users": Form("|", "latin-1", ("user_id", "age", "gender", "occupation", "zip_code")),
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
    files, forms = _FILES[layout], _FORMS[layout]
    items = _read_items(folder / files["items"], forms["items"], official=layout == "official")
    users = _read_users(folder / files["users"], forms["users"])
    names = ("user_id", "item_id", "rating", "timestamp")
    events = read_ratings(folder / files["events"], forms["events"], names, users, items)
    return RawLog(users, items, events)


def _layout(folder: Path) -> str:
    found = {
        layout: [name for name in files.values() if (folder / name).is_file()]
        for layout, files in _FILES.items()
    }
    best = max(found, key=lambda layout: len(found[layout]))
    if not found[best]:
        ways = " or ".join(", ".join(files.values()) for files in _FILES.values())
        raise TableError(f"{folder}: no MovieLens-100K files here; expected {ways}")
    require_files(folder, tuple(_FILES[best].values()))
    return best


def require_files(folder: Path, names: tuple[str, ...]) -> None:
    """Check that a folder holds all files of a data set.

    Raises:
        TableError: One is absent.
    """
    for name in names:
        if not (folder / name).is_file():
            raise TableError(
                f"{folder / name}: no such file; the folder must hold {', '.join(names)}"
            )


def _read_items(path: Path, form: Form, *, official: bool) -> pl.DataFrame:
    wanted = ("movie_title", *GENRES) if official else ("movie_title", "release_year", "class")
    raw = columns.table(path, form, ("item_id", *wanted))
    check_ids(path, raw, "item_id")
    title = pl.col("movie_title").str.strip_chars()
    if official:
        for genre in GENRES:
            columns.reject(path, raw, genre, ~pl.col(genre).is_in(["0", "1"]), "is no flag, 0 or 1")
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
        columns.integer("item_id"),
        title.alias("title"),
        genres.str.split("|").list.first().alias("genre"),
        genres.alias("genres"),
    ).sort("item_id")


def _read_users(path: Path, form: Form) -> pl.DataFrame:
    raw = columns.table(path, form, ("user_id", "age", "gender", "occupation", "zip_code"))
    check_ids(path, raw, "user_id")
    age = columns.integer("age")
    columns.reject(path, raw, "age", ~age.is_between(0, 150).fill_null(False), "is no age in years")
    known = pl.col("gender").is_in(list(GENDERS))
    columns.reject(path, raw, "gender", ~known, f"is none of {', '.join(GENDERS)}")
    return raw.select(
        columns.integer("user_id"),
        pl.col("gender").replace_strict(GENDERS, default=None, return_dtype=pl.String),
        age_group(age).alias("age"),
        pl.col("occupation"),
        pl.col("zip_code").alias("zip"),
    ).sort("user_id")


def age_group(age: pl.Expr) -> pl.Expr:
    """The group of `AGE_BINS` that an age in years falls into."""
    group = pl.lit(AGE_BINS[-1])
    for bound, name in reversed(tuple(zip(AGE_BOUNDS, AGE_BINS, strict=False))):
        group = pl.when(age < bound).then(pl.lit(name)).otherwise(group)
    return group


def check_ids(path: Path, raw: pl.DataFrame, name: str) -> None:
    """Check that column `name` holds integers, each once.

    Raises:
        TableError: It does not; names file, line and value.
    """
    columns.reject(path, raw, name, columns.integer(name).is_null(), "is no integer")
    columns.reject_repeated_ids(path, raw.with_columns(columns.integer(name)), name)
