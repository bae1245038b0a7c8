"""MovieLens-1M, 25M and latest: the same log reads the same in every format, codes become words,
and each way a file is wrong is refused.
"""

import pytest

from rellax_ds.errors import TableError
from rellax_ds.made_logs import write_movielens_1m, write_movielens_25m, write_movielens_100k
from rellax_ds.tables import movielens, movielens_1m, movielens_latest


def edit(path, old, new, encoding="utf-8"):
    text = path.read_text(encoding=encoding)
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding=encoding)


@pytest.fixture
def log(tmp_path):
    return movielens.read(write_movielens_100k(tmp_path / "100k"))


@pytest.fixture
def folder_1m(tmp_path):
    return write_movielens_1m(tmp_path / "1m")


@pytest.fixture
def folder_25m(tmp_path):
    return write_movielens_25m(tmp_path / "25m")


def test_read_1m_gives_the_log_of_the_100k_format(log, folder_1m):
    found = movielens_1m.read(folder_1m)
    assert found.items.equals(log.items)
    assert found.events.equals(log.events)
    assert found.users.drop("occupation").equals(log.users.drop("occupation"))


def test_read_1m_codes_become_the_words_of_the_readme(tmp_path):
    write_movielens_1m(tmp_path, num_users=4, num_items=20, num_events=40)
    users = ["1::F::1::10::48067", "3::M::56::16::70072", "5::M::50::0::1", "7::F::18::20::x"]
    (tmp_path / "users.dat").write_text("\n".join(users))
    assert movielens_1m.read(tmp_path).users.rows() == [
        (1, "female", "under 18", "K-12 student", "48067"),
        (3, "male", "56 and over", "self-employed", "70072"),
        (5, "male", "50-55", "other or not specified", "1"),
        (7, "female", "18-24", "writer", "x"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("users.dat", "1::X::1::10::48067\n", r"line 1: gender 'X' is none of M, F"),
        ("users.dat", "1::F::2::10::48067\n", r"line 1: age '2' is none of 1, 18"),
        ("users.dat", "1::F::1::21::48067\n", r"line 1: occupation '21' is none of 0, 1"),
        (
            "users.dat",
            "1::F::1::1::4\n1::F::1::1::4\n",
            r"line 2: user_id '1' occurs on an earlier",
        ),
        ("movies.dat", "1::A::B::C\n", r"line 1: 4 columns separated by '::', expected 3"),
        ("movies.dat", "x::A::B\n", r"line 1: item_id 'x' is no integer"),
        ("ratings.dat", "1::1::5\n", r"line 1: 3 columns separated by '::', expected 4"),
        ("ratings.dat", "1::9999::5::1\n", r"line 1: item_id '9999' is no item of the item file"),
        ("ratings.dat", "2::1::5::1\n", r"line 1: user_id '2' is no user of the user file"),
    ],
)
def test_read_1m_bad_row_is_refused_with_file_and_line(folder_1m, name, text, message):
    (folder_1m / name).write_text(text)
    with pytest.raises(TableError, match=f"{name}, {message}"):
        movielens_1m.read(folder_1m)


def test_read_1m_movies_in_utf_8_are_refused(folder_1m):
    path = folder_1m / "movies.dat"
    path.write_bytes(path.read_text(encoding="latin-1").encode("utf-8"))
    with pytest.raises(TableError, match=r"movies\.dat, line 4: the text is UTF-8"):
        movielens_1m.read(folder_1m)


@pytest.mark.parametrize("name", movielens_1m.FILES)
def test_read_1m_missing_file_is_refused(folder_1m, name):
    (folder_1m / name).unlink()
    with pytest.raises(TableError, match=f"{name}: no such file; the folder must hold"):
        movielens_1m.read(folder_1m)


def test_read_25m_quoted_titles_and_genres_read_as_in_the_100k_format(log, folder_25m):
    items = movielens_latest.read(folder_25m).items
    assert items.head(59).equals(log.items.head(59))
    assert items.row(60) == (181, '""", unseen', "Drama", "Drama|War")


def test_read_25m_movie_without_genres_is_unknown(folder_25m):
    row = movielens_latest.read(folder_25m).items.row(59, named=True)
    assert (row["genre"], row["genres"]) == ("unknown", "unknown")


def test_read_25m_half_stars_and_the_file_order_are_kept(log, folder_25m):
    events = movielens_latest.read(folder_25m).events
    expected = log.events.sort("user_id", "item_id")
    assert events.drop("rating").equals(expected.drop("rating"))
    lowered = (expected["rating"] - events["rating"]).to_list()
    assert set(lowered) == {0.0, 0.5}
    assert lowered.count(0.5) == 500


def test_read_25m_users_are_those_who_rated(log, folder_25m):
    users = movielens_latest.read(folder_25m).users
    assert users.equals(log.users.select("user_id"))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("ratings.csv", "\n1,", "\none,", r"line 2: userId 'one' is no integer user id"),
        ("ratings.csv", "rating", "stars", r"line 1: the header lacks 'rating'"),
        ("movies.csv", "\n4,", "\n1,", r"row 3: item_id '1' occurs on an earlier row"),
        ("movies.csv", "\n7,", "\nx,", r"row 4: item_id 'x' is no integer"),
        ("movies.csv", "\n7,", "\n7,a,", r"row 4: 4 columns, expected 3"),
    ],
)
def test_read_25m_bad_row_is_refused_with_file_and_place(folder_25m, name, old, new, message):
    edit(folder_25m / name, old, new)
    with pytest.raises(TableError, match=f"{name}, {message}"):
        movielens_latest.read(folder_25m)
