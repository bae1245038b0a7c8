"""Small made-up logs in the raw formats of every data set: the formats are real, the rows planted.

MovieLens rows may not be shipped, and a test on noise proves little. So one log with a signal a
recommender can find (every user likes some genres) is written in each format, with the traps of the
real files: ids with gaps, same-second ties, quotes, commas and brackets in titles, escapes,
encodings, half stars, implicit zeros. What two formats can both say, they say alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rellax_ds.tables import movielens, movielens_1m

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

WORDS = ("Silent", "Crimson", "Lost", "Second", "Northern", "Paper", "Golden", "Last")
THINGS = ("Harbour", "Letter", "Garden", "Station", "Winter", "Orchard", "Mirror", "Bridge")

_ODD_TITLES = (
    'The "Quoted" Night',
    "Comma, the Return, The",
    "Rated (3 stars)",
    "Amélie à Nîmes",
    "Don't Look [Back]",
    "Ends with Yes",
)
_OCCUPATIONS = ("student", "engineer", "librarian", "other", "writer")
_EPOCH = 880_000_000
_GENRES = movielens.GENRES[1:9]


@dataclass(frozen=True)
class _Event:
    """Columns of the events in the order in which files have them; `user`, `item` are numbers."""

    user: Ints
    item: Ints
    rating: Ints
    time: Ints


@dataclass(frozen=True)
class _User:
    age: int
    gender: str
    occupation: int
    zip: str


@dataclass(frozen=True)
class _Item:
    title: str
    year: int
    genres: tuple[int, ...]

    @property
    def genre_names(self) -> list[str]:
        return [_GENRES[genre] for genre in self.genres]


@dataclass(frozen=True)
class _Log:
    users: list[_User]
    items: list[_Item]
    events: _Event


def write_movielens_100k(
    folder: Path,
    *,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
    layout: Literal["atomic", "official"] = "atomic",
) -> Path:
    """Write a made-up log in ML-100K's file formats.

    A user likes about half of eight genres: items whose first genre is liked get 4 or 5 stars most
    of the time, the others 1 to 3. Both layouts hold the same log.

    Args:
        folder: Where to write; created if absent.
        num_users: Users, with odd ids from 1.
        num_items: Items, with ids 1, 4, 7, ...
        num_events: Ratings; every (user, item) pair at most once, spread evenly over users.
        seed: Everything random follows from it.
        layout: `atomic` for `ml-100k.inter/.item/.user` with headers, `official` for
            `u.data/u.item/u.user`.

    Returns:
        `folder`.

    Raises:
        ValueError: There are fewer (user, item) pairs than events.
    """
    log = _planted(num_users, num_items, num_events, seed)
    folder.mkdir(parents=True, exist_ok=True)
    events = _rows(log, "\t")
    if layout == "atomic":
        _write(folder / "ml-100k.inter", [_HEADERS["inter"], *events])
        items = [
            f"{_item_id(n)}\t{item.title}\t{item.year}\t{' '.join(item.genre_names)}"
            for n, item in enumerate(log.items)
        ]
        _write(folder / "ml-100k.item", [_HEADERS["item"], *items])
        _write(folder / "ml-100k.user", [_HEADERS["user"], *_user_rows(log, "\t")])
    else:
        _write(folder / "u.data", events)
        items = [
            f"{_item_id(n)}|{item.title} ({item.year})|01-Jan-{item.year}||"
            f"http://example.invalid/{_item_id(n)}|{_flags(item.genres)}"
            for n, item in enumerate(log.items)
        ]
        _write(folder / "u.item", items, encoding="latin-1")
        _write(folder / "u.user", _user_rows(log, "|"))
    return folder


def write_movielens_1m(
    folder: Path,
    *,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
) -> Path:
    """Write the log of `write_movielens_100k` as ratings.dat, movies.dat and users.dat.

    Occupations are codes of MovieLens-1M, so their names differ.
    """
    log = _planted(num_users, num_items, num_events, seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "ratings.dat", _rows(log, "::"))
    items = [
        f"{_item_id(n)}::{item.title} ({item.year})::{'|'.join(item.genre_names)}"
        for n, item in enumerate(log.items)
    ]
    _write(folder / "movies.dat", items, encoding="latin-1")
    bounds = np.array(movielens.AGE_BOUNDS)
    users = [
        "::".join(
            (
                str(_user_id(n)),
                user.gender,
                movielens_1m.AGE_CODES[int(np.searchsorted(bounds, user.age, side="right"))],
                str(user.occupation),
                user.zip,
            )
        )
        for n, user in enumerate(log.users)
    ]
    _write(folder / "users.dat", users, encoding="latin-1")
    return folder


def write_movielens_25m(
    folder: Path,
    *,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
) -> Path:
    """Write the log of `write_movielens_100k` as ratings.csv and movies.csv.

    Every third rating is half a star lower; the rows are ordered by user and item; the last movie
    has no genre; one more movie, with a line of quotes for a title, has no rating.
    """
    log = _planted(num_users, num_items, num_events, seed)
    folder.mkdir(parents=True, exist_ok=True)
    events = log.events
    stars = events.rating - 0.5 * (np.arange(events.rating.size) % 3 == 0)
    order = np.lexsort((events.item, events.user))
    rows = [
        f"{_user_id(user)},{_item_id(item)},{rating},{time}"
        for user, item, rating, time in zip(
            *(column[order].tolist() for column in (events.user, events.item, stars, events.time)),
            strict=True,
        )
    ]
    _write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
    items = [
        f"{_item_id(n)},{_csv_value(f'{item.title} ({item.year})')},{'|'.join(item.genre_names)}"
        for n, item in enumerate(log.items)
    ]
    items[-1] = items[-1].rsplit(",", 1)[0] + ",(no genres listed)"
    items.append(f"{_item_id(num_items)},{_csv_value(chr(34) * 3 + ', unseen')},Drama|War")
    _write(folder / "movies.csv", ["movieId,title,genres", *items])
    return folder


def write_bookcrossing(
    folder: Path,
    *,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
) -> Path:
    """Write the log of `write_movielens_100k` as BookCrossing's three files.

    A rating is twice the stars, every fourth is an implicit 0. Besides these rows there are two
    users with five ratings, ratings of unknown books and users, a book whose ISBN has a hyphen and
    one whose ISBN is taken. Titles hold escaped quotes, entities, semicolons and cp1252 characters.
    """
    log = _planted(num_users, num_items, num_events, seed)
    folder.mkdir(parents=True, exist_ok=True)
    events = log.events
    points = np.where(np.arange(events.rating.size) % 4 == 3, 0, 2 * events.rating)
    ratings = [
        (str(_user_id(user)), isbn(item), str(rating))
        for user, item, rating in zip(
            events.user.tolist(), events.item.tolist(), points.tolist(), strict=True
        )
    ]
    few = [_user_id(num_users), _user_id(num_users + 1)]
    ratings += [(str(user), isbn(item), "7") for user in few for item in range(5)]
    ratings[3:3] = [("1", "0-00-000", "5"), ("1", "B0000NONE", "9"), ("999999", isbn(0), "8")]
    _write_quoted(folder / "BX-Book-Ratings.csv", ("User-ID", "ISBN", "Book-Rating"), ratings)
    cities = ("paris, , france", "nyc, new york, usa", "oslo, n/a, norway", "leeds, england, U.K.")
    people = [
        (str(_user_id(n)), cities[n % 4], None if n % 3 == 0 else str(user.age))
        for n, user in enumerate(log.users)
    ]
    people += [(str(user), "n/a, n/a, ", "239") for user in few]
    _write_quoted(folder / "BX-Users.csv", ("User-ID", "Location", "Age"), people)
    _write_books(folder / "BX-Books.csv", log.items)
    return folder


def isbn(item: int) -> str:
    """ISBN of a made-up book: nine digits with leading zeros and X."""
    return f"{item * 37:09d}X"


def _write_books(path: Path, items: list[_Item]) -> None:
    odd = {1: "Cats &amp; Dogs; a Novel", 2: "The \u201cCurly\u201d Café", 3: "Back \\ Slash"}
    books = [
        (
            isbn(n),
            odd.get(n, item.title),
            "n/a" if n == 4 else f"Author {n}",
            "0" if n % 5 == 0 else str(item.year),
            "Press &amp; Sons",
        )
        for n, item in enumerate(items)
    ]
    books.append(("0-00-000", "Hyphenated", "Nobody", "1999", "Press"))
    books.append((isbn(0), "Taken", "Nobody", "1999", "Press"))
    header = ("ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher")
    images = ("Image-URL-S", "Image-URL-M", "Image-URL-L")
    rows = [(*book, *("http://example.invalid/x.jpg",) * 3) for book in books]
    _write_quoted(path, (*header, *images), rows)


def _planted(num_users: int, num_items: int, num_events: int, seed: int) -> _Log:
    """The log behind every format; events in shuffled order."""
    if num_events > num_users * num_items:
        raise ValueError(
            f"num_events {num_events} is more than {num_users} users x {num_items} items"
        )
    rng = np.random.default_rng(seed)
    first_genre = rng.integers(len(_GENRES), size=num_items)
    second_genre = rng.integers(len(_GENRES), size=num_items)
    likes = rng.random((num_users, len(_GENRES))) < 0.5

    per_user = np.full(num_users, num_events // num_users)
    per_user[: num_events % num_users] += 1
    user = np.repeat(np.arange(num_users), per_user)
    item = np.concatenate([rng.permutation(num_items)[:count] for count in per_user])
    # The smaller flag is the first genre, as in the real file.
    leading = np.minimum(first_genre, second_genre)
    centre = np.where(likes[user, leading[item]], 4.4, 2.2)
    rating = np.clip(np.rint(rng.normal(centre, 0.7)), 1, 5).astype(np.int64)
    start = _EPOCH + rng.integers(0, 2_000_000, size=num_users)
    # Steps of 0 seconds make ties; the rare long pause makes sessions.
    steps = rng.choice([0, 0, 13, 41, 90_000], p=[0.25, 0.2, 0.3, 0.2, 0.05], size=user.size)
    elapsed = np.cumsum(steps)
    first_row = np.cumsum(per_user) - per_user
    time = start[user] + elapsed - elapsed[first_row][user]

    items = [
        _Item(_title(i), 1990 + i % 9, tuple(sorted({int(first_genre[i]), int(second_genre[i])})))
        for i in range(num_items)
    ]
    users = [
        _User(
            age=int(rng.integers(12, 70)),
            gender="MF"[int(rng.integers(2))],
            occupation=int(rng.integers(len(_OCCUPATIONS))),
            zip=f"{int(rng.integers(100_000)):05d}",
        )
        for _ in range(num_users)
    ]
    order = rng.permutation(user.size)
    return _Log(users, items, _Event(user[order], item[order], rating[order], time[order]))


def _user_id(number: int) -> int:
    return 2 * number + 1


def _item_id(number: int) -> int:
    return 3 * number + 1


def _title(i: int) -> str:
    if i < len(_ODD_TITLES):
        return _ODD_TITLES[i]
    return f"{WORDS[i % 8]} {THINGS[i // 8 % 8]}" + (f" {i // 64 + 1}" if i >= 64 else "")


_HEADERS = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
}


def _rows(log: _Log, separator: str) -> list[str]:
    events = log.events
    columns = (2 * events.user + 1, 3 * events.item + 1, events.rating, events.time)
    return [
        separator.join(map(str, row))
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _user_rows(log: _Log, separator: str) -> list[str]:
    return [
        separator.join(
            (str(_user_id(n)), str(user.age), user.gender, _OCCUPATIONS[user.occupation], user.zip)
        )
        for n, user in enumerate(log.users)
    ]


def _flags(positions: tuple[int, ...]) -> str:
    # Genre 0 of the file is `unknown`, which the makers never set.
    marked = {position + 1 for position in positions}
    return "|".join("1" if n in marked else "0" for n in range(len(movielens.GENRES)))


def _csv_value(text: str) -> str:
    """As CSV writers do: quoted only where the value needs it, quotes doubled."""
    if not set(text) & set(',"\n'):
        return text
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def _write_quoted(
    path: Path, header: tuple[str, ...], rows: Iterable[tuple[str | None, ...]]
) -> None:
    """BookCrossing's way: every value quoted, quotes and backslashes escaped, NULL bare."""

    def value(text: str | None) -> str:
        if text is None:
            return "NULL"
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'

    lines = [";".join(map(value, row)) for row in (header, *rows)]
    _write(path, lines, encoding="cp1252")


def _write(path: Path, rows: list[str], encoding: str = "utf-8") -> None:
    path.write_bytes(("\n".join(rows) + "\n").encode(encoding))
