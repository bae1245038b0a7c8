"""MovieLens-25M and the `latest` releases: ratings.csv and movies.csv, half stars, no user file.

The two files are all these releases share with the model's input (tags and links are not read), so
one reader serves them all. Users are whoever rated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rellax_ds.tables import RawLog, columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.movielens import check_ids, require_files
from rellax_ds.tables.movielens_1m import first_genre
from rellax_ds.tables.ratings import read_ratings

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("ratings.csv", "movies.csv")

# No value of ratings.csv is quoted, and lines without quotes are the faster to cut.
_RATINGS = Form(",")
_MOVIES = Form(",", quoted=True)


def read(folder: Path) -> RawLog:
    """Read MovieLens-25M, MovieLens-latest or MovieLens-latest-small.

    Args:
        folder: Holds ratings.csv and movies.csv.

    Returns:
        The log; users and items sorted by id, users without further fields, events in file order.

    Raises:
        TableError: A file is absent, empty, wrongly encoded or has a bad row; names file, place and
            value.
    """
    require_files(folder, FILES)
    path = folder / "movies.csv"
    raw = columns.table(path, _MOVIES, ("movieId", "title", "genres")).rename(
        {"movieId": "item_id"}
    )
    check_ids(path, raw, "item_id")
    items = first_genre(raw)
    names = ("userId", "movieId", "rating", "timestamp")
    events = read_ratings(folder / "ratings.csv", _RATINGS, names, None, items)
    return RawLog(events.select("user_id").unique().sort("user_id"), items, events)
