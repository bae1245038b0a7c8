"""The ML-100K reader: both layouts, the traps of the real files, and one refusal per way a file is
wrong.
"""

import pytest

from rellax_ds.errors import TableError
from rellax_ds.tables import movielens
from rellax_ds.testing import write_movielens_100k


@pytest.fixture
def folder(tmp_path):
    return write_movielens_100k(tmp_path, num_users=6, num_items=20, num_events=60)


@pytest.fixture
def official(tmp_path):
    return write_movielens_100k(
        tmp_path, num_users=6, num_items=20, num_events=60, layout="official"
    )


def edit(path, line, change, encoding="utf-8"):
    """Replace line `line` (from 1) by what `change` makes of it."""
    rows = path.read_text(encoding=encoding).split("\n")
    rows[line - 1] = change(rows[line - 1])
    path.write_text("\n".join(rows), encoding=encoding)


def field(position, value, separator="\t"):
    def change(row):
        cells = row.split(separator)
        cells[position] = value
        return separator.join(cells)

    return change


def test_read_both_layouts_give_the_same_log(tmp_path):
    logs = [
        movielens.read(write_movielens_100k(tmp_path / layout, layout=layout))
        for layout in ("atomic", "official")
    ]
    for name in ("users", "items", "events"):
        assert getattr(logs[0], name).equals(getattr(logs[1], name)), name


def test_read_titles_with_quotes_commas_brackets_and_accents_survive(folder):
    titles = movielens.read(folder).items["title"].to_list()
    assert titles[:4] == [
        'The "Quoted" Night (1990)',
        "Comma, the Return, The (1991)",
        "Rated (3 stars) (1992)",
        "Amélie à Nîmes (1993)",
    ]


def test_read_the_misspelt_item_gets_its_published_title(folder):
    edit(folder / "ml-100k.item", 5, lambda row: row.split("\t")[0] + "\tunkonwn\tunkonwn\tunknown")
    row = movielens.read(folder).items.row(3, named=True)
    assert (row["title"], row["genre"]) == ("unknown", "unknown")


def test_read_item_without_a_genre_is_unknown(folder):
    edit(folder / "ml-100k.item", 5, field(3, ""))
    assert movielens.read(folder).items["genre"][3] == "unknown"


def test_read_first_genre_is_the_first_flag(official):
    flags = ["0"] * 19
    flags[5] = flags[8] = "1"
    edit(
        official / "u.item",
        1,
        lambda row: "|".join(row.split("|")[:5] + flags),
        encoding="latin-1",
    )
    row = movielens.read(official).items.row(0, named=True)
    assert (row["genre"], row["genres"]) == ("Comedy", "Comedy|Drama")


@pytest.mark.parametrize(
    ("years", "bucket"),
    [
        ("17", "under 18"),
        ("18", "18-24"),
        ("24", "18-24"),
        ("25", "25-34"),
        ("44", "35-44"),
        ("45", "45-49"),
        ("50", "50-55"),
        ("55", "50-55"),
        ("56", "56 and over"),
    ],
)
def test_read_age_falls_into_its_bin(folder, years, bucket):
    edit(folder / "ml-100k.user", 2, field(1, years))
    assert movielens.read(folder).users["age"][0] == bucket


def test_read_windows_line_ends_give_the_same_log(folder):
    before = movielens.read(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after = movielens.read(folder)
    assert after.users.equals(before.users)
    assert after.items.equals(before.items)
    assert after.events.equals(before.events)


def test_read_pair_rated_again_at_another_second_is_kept(folder):
    path = folder / "ml-100k.inter"
    user, item, rating, time = path.read_text().split("\n")[1].split("\t")
    with path.open("a") as file:
        file.write(f"{user}\t{item}\t{rating}\t{int(time) + 1}\n")
    assert movielens.read(folder).events.height == 61


EVENTS, ITEMS, USERS = "ml-100k.inter", "ml-100k.item", "ml-100k.user"


@pytest.mark.parametrize(
    ("name", "line", "change", "message"),
    [
        (EVENTS, 7, lambda row: row + "\t1", r"line 7: 5 columns separated by tab, expected 4"),
        (EVENTS, 7, lambda row: row.rsplit("\t", 1)[0], r"line 7: 3 columns.*mend"),
        (EVENTS, 7, lambda row: "", r"line 7: 1 columns"),
        (EVENTS, 9, field(2, "good"), r"line 9: rating 'good' is no finite number"),
        (EVENTS, 9, field(2, "nan"), r"line 9: rating 'nan' is no finite number"),
        (EVENTS, 9, field(3, "soon"), r"line 9: timestamp 'soon' is no time"),
        (EVENTS, 9, field(3, "1.5"), r"line 9: timestamp '1.5' is no time in whole seconds"),
        (EVENTS, 9, field(3, "-4"), r"line 9: timestamp '-4' is no time"),
        (EVENTS, 9, field(0, "u1"), r"line 9: user_id 'u1' is no integer"),
        (EVENTS, 9, field(1, ""), r"line 9: item_id '' is no integer"),
        (EVENTS, 9, field(1, "5000"), r"line 9: item_id '5000' is no item of the item file"),
        (EVENTS, 9, field(0, "4000"), r"line 9: user_id '4000' is no user of the user file"),
        (
            EVENTS,
            1,
            lambda row: row.replace("rating", "stars"),
            r"line 1: the header lacks 'rating'",
        ),
        (ITEMS, 4, field(0, "1"), r"line 4: item_id '1' occurs on an earlier line"),
        (ITEMS, 4, field(0, "x"), r"line 4: item_id 'x' is no integer"),
        (USERS, 3, field(0, "1"), r"line 3: user_id '1' occurs on an earlier line"),
        (USERS, 3, field(1, "old"), r"line 3: age 'old' is no age"),
        (USERS, 3, field(1, "900"), r"line 3: age '900' is no age"),
        (USERS, 3, field(2, "X"), r"line 3: gender 'X' is none of M, F"),
    ],
)
def test_read_bad_row_is_refused_with_file_line_and_value(folder, name, line, change, message):
    edit(folder / name, line, change)
    with pytest.raises(TableError, match=f"{name}, {message}"):
        movielens.read(folder)


def test_read_same_event_twice_is_refused(folder):
    path = folder / EVENTS
    row = path.read_text().split("\n")[1]
    with path.open("a") as file:
        file.write(row + "\n")
    with pytest.raises(TableError, match=r"line 62: event .* occurs on an earlier line"):
        movielens.read(folder)


def test_read_flag_other_than_0_and_1_is_refused(official):
    edit(official / "u.item", 3, lambda row: row[:-1] + "2", encoding="latin-1")
    with pytest.raises(TableError, match=r"u\.item, line 3: Western '2' is no flag"):
        movielens.read(official)


def test_read_empty_folder_is_refused_naming_both_layouts(tmp_path):
    with pytest.raises(TableError, match=r"ml-100k\.inter.*or u\.data"):
        movielens.read(tmp_path)


@pytest.mark.parametrize("name", [EVENTS, ITEMS, USERS])
def test_read_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(TableError, match=f"{name}: no such file"):
        movielens.read(folder)


@pytest.mark.parametrize("name", [EVENTS, ITEMS, USERS])
def test_read_empty_file_is_refused(folder, name):
    (folder / name).write_bytes(b"\n")
    with pytest.raises(TableError, match=f"{name}: the file is empty"):
        movielens.read(folder)


def test_read_header_without_rows_is_refused(folder):
    path = folder / EVENTS
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(TableError, match="holds a header and no rows"):
        movielens.read(folder)


def test_read_latin_1_where_utf_8_is_due_is_refused(folder):
    path = folder / ITEMS
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(TableError, match=r"line 5: byte 0xe9 is not UTF-8"):
        movielens.read(folder)


def test_read_utf_8_where_latin_1_is_due_is_refused(official):
    path = official / "u.item"
    path.write_bytes(path.read_text(encoding="latin-1").encode("utf-8"))
    with pytest.raises(TableError, match=r"line 4: the text is UTF-8"):
        movielens.read(official)
