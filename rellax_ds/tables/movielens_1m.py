"""MovieLens-1M: ratings.dat, movies.dat and users.dat, with `::` between columns.

Ages and occupations are codes in the files; they leave this module as the words of the data set's
README, because prompts and the recommender read words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from rellax_ds.tables import RawLog, columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.movielens import (
    AGE_BINS,
    AGE_BOUNDS,
    GENDERS,
    GENRES,
    check_ids,
    require_files,
)
from rellax_ds.tables.ratings import read_ratings

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("ratings.dat", "movies.dat", "users.dat")

OCCUPATIONS = (
    "other or not specified",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
"""Names of the occupation codes 0 to 20."""

AGE_CODES = ("1", *(str(bound) for bound in AGE_BOUNDS))
"""Codes of the seven age groups: the first age of each, 1 for the youngest."""

_RATINGS = Form("::", "latin-1", ("user_id", "item_id", "rating", "timestamp"))
_MOVIES = Form("::", "latin-1", ("item_id", "title", "genres"))
_USERS = Form("::", "latin-1", ("user_id", "gender", "age", "occupation", "zip"))


def read(folder: Path) -> RawLog:
    """Read MovieLens-1M.

    Args:
        folder: Holds ratings.dat, movies.dat and users.dat.

    Returns:
        The log; users and items sorted by id, events in file order.

    Raises:
        TableError: A file is absent, empty, wrongly encoded or has a bad row; names file, line and
            value.
    """
    require_files(folder, FILES)
    items = _read_movies(folder / "movies.dat")
    users = _read_users(folder / "users.dat")
    names = ("user_id", "item_id", "rating", "timestamp")
    return RawLog(users, items, read_ratings(folder / "ratings.dat", _RATINGS, names, users, items))


def first_genre(raw: pl.DataFrame) -> pl.DataFrame:
    """Items with `genres` such as `Action|War` get their first as `genre`; none is "unknown"."""
    genres = pl.col("genres").str.strip_chars()
    genres = pl.when(genres.is_in(["", "(no genres listed)"])).then(pl.lit(GENRES[0]))
    genres = genres.otherwise(pl.col("genres").str.strip_chars())
    return raw.select(
        columns.integer("item_id"),
        pl.col("title").str.strip_chars(),
        genres.str.split("|").list.first().alias("genre"),
        genres.alias("genres"),
    ).sort("item_id")


def _read_movies(path: Path) -> pl.DataFrame:
    raw = columns.table(path, _MOVIES, ("item_id", "title", "genres"))
    check_ids(path, raw, "item_id")
    return first_genre(raw)


def _read_users(path: Path) -> pl.DataFrame:
    raw = columns.table(path, _USERS, ("user_id", "gender", "age", "occupation", "zip"))
    check_ids(path, raw, "user_id")
    words = {
        "gender": GENDERS,
        "age": dict(zip(AGE_CODES, AGE_BINS, strict=True)),
        "occupation": {str(code): name for code, name in enumerate(OCCUPATIONS)},
    }
    for name, codes in words.items():
        known = pl.col(name).is_in(list(codes))
        columns.reject(path, raw, name, ~known, f"is none of {', '.join(codes)}")
    return raw.select(
        columns.integer("user_id"),
        *(pl.col(name).replace_strict(codes) for name, codes in words.items()),
        pl.col("zip"),
    ).sort("user_id")
