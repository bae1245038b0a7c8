"""BookCrossing: three semicolon files in cp1252, with escapes, implicit zeros and no times.

The rules are those of the published preprocessing (ReLLa): a rating counts when its user and its
book are known, users with five ratings or fewer are left out, and since nothing says when a book
was rated, a user's ratings are shuffled with one seed and numbered; the number stands for the time.
Two things are ours: `\\"` and `&amp;` become the characters they stand for, and places become
countries by a small map of our own.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rellax_ds import runtime
from rellax_ds.errors import TableError
from rellax_ds.tables import RawLog, columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.movielens import check_ids, require_files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FILES = ("BX-Book-Ratings.csv", "BX-Books.csv", "BX-Users.csv")

UNKNOWN = "unknown"

_FORM = Form(";", "cp1252", quoted=True, escape="\\")
_MIN_RATINGS = 6
_SHUFFLE_SEED = 42
_MAX_RATING = 10
_AGE_BOUNDS = (18, 25, 30, 35, 40, 45, 50, 55, 60)
_AGE_BINS = (
    *("under 18", "18-24", "25-29", "30-34", "35-39", "40-44", "45-49", "50-54", "55-59"),
    "60 and over",
)
_CREDIBLE_AGES = (5, 100)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'"}
_COUNTRIES = {
    "USA": ("usa", "us", "u s", "u s a", "u.s", "u.s.a", "america", "united states"),
    "United Kingdom": (
        *("uk", "u k", "u.k", "england", "scotland", "wales", "great britain"),
        "northern ireland",
    ),
    "Austria": ("österreich", "oberösterreich"),
    "Belgium": ("belgique", "belgië"),
    "Brazil": ("brasil",),
    "China": ("p.r. china", "p.r.china", "pr china", "people`s republic of china"),
    "France": ("rhône-alpes", "rhône alpes"),
    "Germany": ("deutschland", "baden-württemberg"),
    "Italy": ("italia", "l`italia"),
    "Ivory Coast": ("côte d`ivoire", "cote d`ivoire", "côte d"),
    "Mexico": ("méxico",),
    "Netherlands": ("nederland", "holland", "the netherlands"),
    "Peru": ("perú",),
    "Spain": ("españa", "cataluña", "catalunya", "castilla-león", "a coruña"),
    "Switzerland": ("schweiz", "suisse", "svizzera"),
    "Turkey": ("türkiye",),
}
"""Other spellings of a country, in lower case, without full stops at the ends."""


def read(folder: Path, *, drop_implicit: bool = False) -> RawLog:
    """Read BookCrossing.

    Books whose ISBN has other characters than letters and digits are left out; of two books with
    one ISBN the first is kept. Ages below 5 and above 100 are unknown, as is a year that has not
    four characters.

    Args:
        folder: Holds BX-Book-Ratings.csv, BX-Books.csv and BX-Users.csv.
        drop_implicit: Leave out ratings of 0, which mean that no rating was given; otherwise they
            are ratings like any other and lie below every threshold.

    Returns:
        The log; `user_id` is an integer, `item_id` the ISBN, `time` a position in the user's
        shuffled order from 0. Users and books without events are kept. Events are in file order.

    Raises:
        TableError: A file is absent, empty, wrongly encoded or has a bad row; names file, row and
            value. Or no user has enough ratings.
    """
    require_files(folder, FILES)
    users = _read_users(folder / "BX-Users.csv")
    books = _read_books(folder / "BX-Books.csv")
    events = _read_ratings(folder / "BX-Book-Ratings.csv", users, books)
    num_known = events.height
    if drop_implicit:
        events = events.filter(pl.col("rating") > 0)
    ratings_of_user = pl.len().over("user_id")
    events = events.filter(ratings_of_user >= _MIN_RATINGS)
    runtime.logger.info(
        "tables: %d of %d ratings of known users and books left out (users with fewer than %d%s)",
        num_known - events.height,
        num_known,
        _MIN_RATINGS,
        ", implicit ratings" if drop_implicit else "",
    )
    if events.is_empty():
        raise TableError(
            f"{folder}: no user has {_MIN_RATINGS} ratings of known books; check that the three "
            "files belong together"
        )
    return RawLog(users, books, events.with_columns(time=_shuffled_positions(events["user_id"])))


def _read_ratings(path: Path, users: pl.DataFrame, books: pl.DataFrame) -> pl.DataFrame:
    """Explicit and implicit ratings of known users and books, in file order."""
    parts = []
    num_rows = 0
    for raw in columns.stream(path, _FORM, ("User-ID", "ISBN", "Book-Rating")):
        rating = columns.integer("Book-Rating")
        credible = rating.is_between(0, _MAX_RATING).fill_null(False)
        columns.reject(path, raw, "User-ID", columns.integer("User-ID").is_null(), "is no integer")
        columns.reject(
            path, raw, "Book-Rating", ~credible, f"is no integer from 0 to {_MAX_RATING}"
        )
        num_rows += raw.height
        part = raw.select(
            columns.integer("User-ID").alias("user_id"),
            pl.col("ISBN").alias("item_id"),
            rating.cast(pl.Float32).alias("rating"),
        )
        known = [
            pl.col(table.columns[0]).is_in(table.to_series(0).implode()) for table in (users, books)
        ]
        parts.append(part.filter(*known))
    events = pl.concat(parts)
    runtime.logger.info(
        "tables: %d of %d ratings are of an unknown user or book and left out",
        num_rows - events.height,
        num_rows,
    )
    return events


def _read_books(path: Path) -> pl.DataFrame:
    names = {
        "ISBN": "item_id",
        "Book-Title": "title",
        "Book-Author": "author",
        "Year-Of-Publication": "year",
        "Publisher": "publisher",
    }
    raw = columns.table(path, _FORM, tuple(names)).rename(names)
    proper = raw.filter(pl.col("item_id").str.contains("^[A-Za-z0-9]+$"))
    books = proper.unique("item_id", keep="first", maintain_order=True)
    runtime.logger.info(
        "tables: %d of %d books left out (ISBN not of letters and digits), %d repeat an ISBN",
        raw.height - proper.height,
        raw.height,
        proper.height - books.height,
    )
    text = {name: _unescaped(pl.col(name)) for name in ("title", "author", "year", "publisher")}
    year = text["year"]
    return books.select(
        "item_id",
        title=pl.when(text["title"] == "").then(pl.col("item_id")).otherwise(text["title"]),
        genre=pl.lit(""),
        author=_known(text["author"]),
        year=pl.when(year.str.len_chars() == 4).then(year).otherwise(pl.lit(UNKNOWN)),
        publisher=_known(text["publisher"]),
    ).sort("item_id")


def _read_users(path: Path) -> pl.DataFrame:
    raw = columns.table(path, _FORM, ("User-ID", "Location", "Age"))
    check_ids(path, raw, "User-ID")
    age = columns.number("Age")
    given = ~pl.col("Age").is_in(["NULL", ""])
    columns.reject(path, raw, "Age", given & age.is_null(), "is no age in years and not NULL")
    return raw.select(
        columns.integer("User-ID").alias("user_id"),
        country(pl.col("Location")).alias("location"),
        _age_group(age).alias("age"),
    ).sort("user_id")


def country(location: pl.Expr) -> pl.Expr:
    """The country at the end of "city, region, country"; "unknown" when it is no name."""
    name = location.str.split(",").list.last().str.replace_all("!", "").str.strip_chars(" .\t\r\n")
    lower = name.str.to_lowercase()
    spellings = {other: known for known, others in _COUNTRIES.items() for other in others}
    no_name = (name.str.len_chars() < 2) | name.str.contains(r"(?i)n/a|&#|[?@*\\]")
    return (
        pl.when(no_name)
        .then(pl.lit(UNKNOWN))
        .otherwise(lower.replace_strict(spellings, default=name.str.to_titlecase()))
    )


def _age_group(age: pl.Expr) -> pl.Expr:
    group = pl.lit(_AGE_BINS[-1])
    for bound, name in reversed(tuple(zip(_AGE_BOUNDS, _AGE_BINS, strict=False))):
        group = pl.when(age < bound).then(pl.lit(name)).otherwise(group)
    credible = age.is_between(*_CREDIBLE_AGES).fill_null(False)
    return pl.when(credible).then(group).otherwise(pl.lit(UNKNOWN))


def _unescaped(text: pl.Expr) -> pl.Expr:
    return text.str.replace_many(_ENTITIES).str.strip_chars()


def _known(text: pl.Expr) -> pl.Expr:
    return pl.when(text.str.to_lowercase().is_in(["", "n/a"])).then(pl.lit(UNKNOWN)).otherwise(text)


def _shuffled_positions(user: pl.Series) -> NDArray[np.int64]:
    """Position of every event after its user's events were shuffled from a fresh seed.

    The published loop seeds again for every user, so the permutation depends on the number of
    events alone and is drawn once per number.
    """
    frame = user.to_frame().select(
        position=pl.int_range(pl.len()).over("user_id"), count=pl.len().over("user_id")
    )
    count = frame["count"].to_numpy().astype(np.int64)
    counts = np.unique(count)
    starts = np.cumsum(counts) - counts
    positions = np.concatenate([_shuffled(int(number)) for number in counts])
    moved: NDArray[np.int64] = positions[
        starts[np.searchsorted(counts, count)] + frame["position"].to_numpy()
    ]
    return moved


def _shuffled(count: int) -> NDArray[np.int64]:
    """Where each of `count` events goes."""
    order = list(range(count))
    random.Random(_SHUFFLE_SEED).shuffle(order)
    position = np.empty(count, np.int64)
    position[order] = np.arange(count)
    return position
