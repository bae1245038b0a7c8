"""BookCrossing: the published rules walked in plain Python, and the traps of its three files."""

import csv
import random

import polars as pl
import pytest

from rellax_ds.config import DataConfig
from rellax_ds.errors import TableError
from rellax_ds.made_logs import isbn, write_bookcrossing
from rellax_ds.tables import bookcrossing
from rellax_ds.tables.split import build_tables


@pytest.fixture
def folder(tmp_path):
    return write_bookcrossing(tmp_path)


def config(folder, **changes):
    data = {
        "dataset": "bookcrossing",
        "path": folder,
        "label_threshold": 5,
        "label_inclusive": True,
        "split_by": "user",
        "samples_per_user": "last",
        "split": (0.81, 0.09, 0.1),
    }
    return DataConfig.model_validate(data | changes)


def values(path, num_columns):
    """Rows as tuples, by the csv module."""
    with path.open(encoding="cp1252", newline="") as file:
        rows = csv.reader(file, delimiter=";", escapechar="\\", doublequote=False)
        return [tuple(row[:num_columns]) for row in rows][1:]


def walk(folder, *, drop_implicit=False):
    """The published preprocessing: (user, history, target) in the order of its samples."""
    known_users = {row[0] for row in values(folder / "BX-Users.csv", 1)}
    known_books = {row[0] for row in values(folder / "BX-Books.csv", 1) if row[0].isalnum()}
    behaviour = {}
    for user, book, rating in values(folder / "BX-Book-Ratings.csv", 3):
        if user in known_users and book in known_books and not (drop_implicit and rating == "0"):
            behaviour.setdefault(user, []).append((book, float(rating)))
    samples = []
    for user, events in behaviour.items():
        if len(events) > 5:
            random.seed(42)
            random.shuffle(events)
            samples.append((user, events[:-1], events[-1]))
    random.seed(42)
    random.shuffle(samples)
    return samples


def samples_of(tables):
    user_id = tables.users["user_id"].to_pylist()
    item_id = tables.items["item_id"].to_pylist()
    events = tables.events.to_pylist()
    pairs = [(item_id[event["item"]], event["rating"]) for event in events]
    return [
        (
            user_id[sample["user"]],
            pairs[sample["history_start"] : sample["history_end"]],
            pairs[sample["event"]],
        )
        for sample in tables.samples.to_pylist()
    ]


@pytest.mark.parametrize("drop_implicit", [False, True])
def test_tables_equal_the_published_walk(folder, drop_implicit):
    log = bookcrossing.read(folder, drop_implicit=drop_implicit)
    tables = build_tables(log, config(folder, drop_implicit=drop_implicit))
    expected = walk(folder, drop_implicit=drop_implicit)
    assert len(expected) == 40
    assert samples_of(tables) == expected
    # The published split is 9:1; a tenth of its training part is our valid.
    assert tables.samples["split"].to_pylist() == [0] * 33 + [1] * 3 + [2] * 4
    assert tables.samples["label"].to_pylist() == [int(target[1] >= 5) for _, _, target in expected]


def test_read_leaves_out_unknown_users_and_books_and_users_with_five_ratings(folder):
    log = bookcrossing.read(folder)
    assert log.events.height == 1500
    assert not log.events["user_id"].is_in([81, 83, 999_999]).any()
    assert "B0000NONE" not in log.items["item_id"].to_list()


def test_read_implicit_zeros_are_ratings_unless_dropped(folder):
    assert (bookcrossing.read(folder).events["rating"] == 0).sum() == 375
    explicit = bookcrossing.read(folder, drop_implicit=True).events
    assert (explicit.height, explicit["rating"].min()) == (1125, 2.0)


def test_read_time_numbers_the_events_of_every_user(folder):
    events = bookcrossing.read(folder).events
    for (user,), group in events.group_by("user_id"):
        assert sorted(group["time"].to_list()) == list(range(group.height)), user


def test_read_text_is_unescaped(folder):
    items = bookcrossing.read(folder).items
    assert items["title"].to_list()[:6] == [
        'The "Quoted" Night',
        "Cats & Dogs; a Novel",
        "The \u201cCurly\u201d Café",
        "Back \\ Slash",
        "Don't Look [Back]",
        "Ends with Yes",
    ]
    assert items["publisher"].unique().to_list() == ["Press & Sons"]
    assert items["author"].to_list()[3:6] == ["Author 3", "unknown", "Author 5"]
    assert items["year"].to_list()[:2] == ["unknown", "1991"]


def test_read_isbn_keeps_zeros_and_x_and_the_first_book_of_one_isbn_stays(folder):
    items = bookcrossing.read(folder).items
    assert items["item_id"].to_list() == [isbn(n) for n in range(60)]
    assert "Taken" not in items["title"].to_list()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("nyc, new york, usa", "USA"),
        ("x, y, U.S.A.", "USA"),
        ("leeds, england, united kingdom", "United Kingdom"),
        ("glasgow, , scotland", "United Kingdom"),
        ("barcelona, barcelona, españa", "Spain"),
        ("x, y, new zealand", "New Zealand"),
        ("x, y, germany.", "Germany"),
        ("lima", "Lima"),
        ("x, y, ", "unknown"),
        ("x, y, n/a", "unknown"),
        ("x, y, &#20013;&#22269;", "unknown"),
        ("x, y, ?", "unknown"),
        ("x, y, z", "unknown"),
    ],
)
def test_country_is_the_cleaned_end_of_the_place(place, expected):
    found = pl.select(bookcrossing.country(pl.lit(place))).item()
    assert found == expected


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        ("NULL", "unknown"),
        ('"4"', "unknown"),
        ('"5"', "under 18"),
        ('"17"', "under 18"),
        ('"18"', "18-24"),
        ('"29"', "25-29"),
        ('"55"', "55-59"),
        ('"60"', "60 and over"),
        ('"100"', "60 and over"),
        ('"101"', "unknown"),
        ('""', "unknown"),
    ],
)
def test_read_age_falls_into_its_bin(folder, age, expected):
    path = folder / "BX-Users.csv"
    rows = path.read_text(encoding="cp1252").split("\n")
    rows[1] = f'"1";"lyon, , france";{age}'
    path.write_text("\n".join(rows), encoding="cp1252")
    assert bookcrossing.read(folder).users["age"][0] == expected


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("BX-Book-Ratings.csv", '"1";"x";"11"', r"Book-Rating '11' is no integer from 0 to 10"),
        ("BX-Book-Ratings.csv", '"1";"x";""', r"Book-Rating '' is no integer"),
        ("BX-Book-Ratings.csv", '"u";"x";"1"', r"User-ID 'u' is no integer"),
        ("BX-Book-Ratings.csv", '"1";"x"', r"2 columns, expected 3"),
        ("BX-Users.csv", '"3";"a, b, c";"old"', r"Age 'old' is no age"),
        ("BX-Users.csv", '"5";"a, b, c";NULL', r"User-ID '5' occurs on an earlier row"),
    ],
)
def test_read_bad_row_is_refused_with_file_and_row(folder, name, row, message):
    path = folder / name
    rows = path.read_text(encoding="cp1252").split("\n")
    rows[5 if "occurs" in message else 2] = row
    path.write_text("\n".join(rows), encoding="cp1252")
    with pytest.raises(TableError, match=rf"{name}, row \d+: {message}"):
        bookcrossing.read(folder)


def test_read_users_of_another_copy_are_refused(folder):
    (folder / "BX-Users.csv").write_text('"User-ID";"Location";"Age"\n"7777";"a, b, c";NULL\n')
    with pytest.raises(TableError, match="no user has 6 ratings of known books"):
        bookcrossing.read(folder)
