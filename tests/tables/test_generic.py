"""Any log by column mapping: the same log gives the same tables in every form, and what is missing
or ambiguous is asked for.
"""

import datetime

import polars as pl
import pytest

from rellax_ds.config import DataConfig
from rellax_ds.errors import TableError
from rellax_ds.made_logs import write_movielens_100k
from rellax_ds.tables import columns, generic, movielens
from rellax_ds.tables.split import build_tables

TEXT = {"title": "name", "genre": "kind", "genres": "kinds"}
PROFILE = {"gender": "sex", "age": "group", "occupation": "job", "zip": "area"}


@pytest.fixture
def log(tmp_path):
    return movielens.read(write_movielens_100k(tmp_path / "raw"))


def config(folder, columns=None, **data):
    mapping = {"user": "customer", "item": "sku", "rating": "stars", "time": "at"}
    document = {"dataset": "generic", "path": folder, "events": "events.csv", "min_history": 5}
    document |= {"columns": mapping | (columns or {})} | data
    return DataConfig.model_validate(document)


def renamed(log):
    """The log's frames with the columns of somebody else's shop."""
    events = log.events.rename(
        {"user_id": "customer", "item_id": "sku", "rating": "stars", "time": "at"}
    )
    items = log.items.rename({"item_id": "sku"} | TEXT)
    users = log.users.rename({"user_id": "customer"} | PROFILE)
    return events, items, users


def write(frame, path):
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".tsv":
        frame.write_csv(path, separator="\t")
    else:
        frame.write_csv(path)


def assert_same_tables(found, expected):
    for name in ("users", "items", "events", "samples"):
        assert getattr(found, name).equals(getattr(expected, name)), name


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_read_renamed_columns_give_the_tables_of_the_movielens_reader(log, tmp_path, ending):
    names = [f"{role}.{ending}" for role in ("events", "items", "users")]
    for frame, name in zip(renamed(log), names, strict=True):
        write(frame, tmp_path / name)
    data = config(
        tmp_path,
        {"item_text": TEXT, "user_fields": PROFILE},
        **dict(zip(("events", "items", "users"), names, strict=True)),
    )
    expected = build_tables(log, DataConfig())
    assert_same_tables(build_tables(generic.read(data), data), expected)


def test_read_in_small_batches_gives_the_same_log(log, tmp_path, monkeypatch):
    events, _, _ = renamed(log)
    write(events, tmp_path / "events.csv")
    whole = generic.read(config(tmp_path))
    monkeypatch.setattr(columns, "_BLOCK", 512)
    batched = generic.read(config(tmp_path))
    for name in ("users", "items", "events"):
        assert getattr(whole, name).equals(getattr(batched, name)), name


def test_read_recbole_files_give_the_log_of_the_movielens_reader(log, tmp_path):
    data = config(
        tmp_path / "raw",
        {
            "user": "user_id",
            "item": "item_id",
            "rating": "rating",
            "time": "timestamp",
            "item_text": {"title": "movie_title"},
        },
        events="ml-100k.inter",
        items="ml-100k.item",
    )
    found = generic.read(data)
    assert found.events.equals(log.events)
    assert found.items["title"][0] == 'The "Quoted" Night'


@pytest.mark.parametrize(
    ("unit", "make"),
    [
        ("ms", lambda at: at * 1000 + 999),
        ("s", lambda at: at.cast(pl.Float64) + 0.5),
        ("iso", lambda at: pl.from_epoch(at).dt.strftime("%Y-%m-%dT%H:%M:%SZ")),
        ("iso", lambda at: pl.from_epoch(at).dt.strftime("%Y-%m-%d %H:%M:%S.123")),
        ("iso", lambda at: pl.from_epoch(at + 19_800).dt.strftime("%Y-%m-%d %H:%M:%S+05:30")),
        ("iso", lambda at: pl.from_epoch(at - 12_600).dt.strftime("%Y-%m-%dT%H:%M:%S-0330")),
    ],
)
def test_read_time_in_another_unit_gives_the_same_seconds(log, tmp_path, unit, make):
    events, _, _ = renamed(log)
    write(events.with_columns(make(pl.col("at"))), tmp_path / "events.csv")
    found = generic.read(config(tmp_path, {"time_unit": unit}))
    assert found.events.equals(log.events)


@pytest.mark.parametrize(
    "kind", [pl.Datetime("ms"), pl.Datetime("ns", "Asia/Kolkata"), pl.Datetime("us", "UTC")]
)
def test_read_time_as_a_parquet_timestamp_needs_no_unit(log, tmp_path, kind):
    events, _, _ = renamed(log)
    moment = pl.from_epoch("at").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    moment = moment.cast(pl.Datetime("us", kind.time_zone)) if kind.time_zone else moment
    write(events.with_columns(moment.cast(kind)), tmp_path / "events.parquet")
    found = generic.read(config(tmp_path, events="events.parquet"))
    assert found.events.equals(log.events)


def test_read_day_without_time_is_its_first_second(tmp_path):
    (tmp_path / "events.csv").write_text("customer,sku,stars,at\na,b,1,2024-02-29\n")
    events = generic.read(config(tmp_path, {"time_unit": "iso"})).events
    day = datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC)
    assert events["time"].to_list() == [int(day.timestamp())]


def test_read_one_id_with_a_letter_makes_all_ids_text_in_byte_order(tmp_path):
    rows = ["customer,sku,stars,at", "10,b,1,1", "9,B,1,2", "u,é,1,3", "9,007,1,4"]
    (tmp_path / "events.csv").write_text("\n".join(rows), encoding="utf-8")
    log = generic.read(config(tmp_path))
    assert log.users["user_id"].to_list() == ["10", "9", "u"]
    assert log.items["item_id"].to_list() == ["007", "B", "b", "é"]
    assert log.events["user_id"].to_list() == ["10", "9", "u", "9"]


@pytest.mark.parametrize("other", ["007", "+7", "1e3", "12345678901234567890"])
def test_read_ids_that_are_no_plain_integers_stay_text(tmp_path, other):
    (tmp_path / "events.csv").write_text(f"customer,sku,stars,at\n{other},1,1,1\n9,1,1,2\n")
    assert set(generic.read(config(tmp_path)).users["user_id"].to_list()) == {other, "9"}


def test_read_integer_ids_sort_as_integers(tmp_path):
    (tmp_path / "events.csv").write_text("customer,sku,stars,at\n10,1,1,1\n9,1,1,2\n100,1,1,3\n")
    assert generic.read(config(tmp_path)).users["user_id"].to_list() == [9, 10, 100]


def test_read_same_event_twice_keeps_the_last_row(tmp_path, caplog):
    rows = ["customer,sku,stars,at", "1,5,1,7", "1,6,2,7", "1,5,3,7", "1,5,4,8", "1,5,5,7"]
    (tmp_path / "events.csv").write_text("\n".join(rows))
    with caplog.at_level("INFO", "rellax_ds"):
        events = generic.read(config(tmp_path)).events
    assert events["rating"].to_list() == [2.0, 4.0, 5.0]
    assert "2 events left out" in caplog.text


def test_read_without_times_keeps_the_order_of_a_users_rows(tmp_path):
    rows = ["customer,sku,stars", "1,5,1", "2,5,1", "1,9,1", "1,5,1", "2,4,1"]
    (tmp_path / "events.csv").write_text("\n".join(rows))
    events = generic.read(config(tmp_path, {"time": None}, split_by="user")).events
    assert events.select("user_id", "item_id", "time").rows() == [
        (1, 5, 0),
        (2, 5, 0),
        (1, 9, 1),
        (1, 5, 2),
        (2, 4, 1),
    ]


def test_read_items_without_title_are_called_by_their_id_and_genre_is_empty(tmp_path):
    (tmp_path / "events.csv").write_text("customer,sku,stars,at\n1,a,1,1\n1,b,1,2\n")
    (tmp_path / "items.csv").write_text("sku,name\na,Anchor\nb,\nc,Cable\n")
    data = config(tmp_path, {"item_text": {"title": "name"}}, items="items.csv")
    items = generic.read(data).items
    assert items.select("item_id", "title", "genre").rows() == [
        ("a", "Anchor", ""),
        ("b", "b", ""),
        ("c", "Cable", ""),
    ]


def test_read_label_column_is_the_label_whatever_the_threshold(log, tmp_path):
    events, _, _ = renamed(log)
    liked = (pl.col("stars") > 3).cast(pl.Int8)
    write(events.with_columns(liked.alias("clicked")).drop("stars"), tmp_path / "events.csv")
    data = config(tmp_path, {"rating": None, "label": "clicked"})
    expected = build_tables(log, DataConfig())
    assert build_tables(generic.read(data), data).samples.equals(expected.samples)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_read_label_of_truth_values_in_parquet_and_digits_in_csv(tmp_path, ending):
    frame = pl.DataFrame({"customer": [1, 1], "sku": [1, 2], "at": [1, 2], "y": [True, False]})
    frame = frame if ending == "parquet" else frame.with_columns(pl.col("y").cast(pl.Int8))
    write(frame, tmp_path / f"events.{ending}")
    data = config(tmp_path, {"rating": None, "label": "y"}, events=f"events.{ending}")
    assert generic.read(data).events["rating"].to_list() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",b,1,1", r"customer '' is no id; fill or remove it"),
        ("a, ,1,1", r"sku ' ' is no id"),
        ("a,b,,1", r"stars '' is no finite number"),
        ("a,b,good,1", r"stars 'good' is no finite number"),
        ("a,b,1,", r"at '' is no time in seconds since 1970; data.columns.time_unit is s"),
        ("a,b,1,-0.5", r"at '-0.5' is no time in seconds"),
        ("a,b,1,-5", r"at '-5' is no time in seconds"),
        ("a,b,1,1700000000000", r"at '1700000000000' is no time in seconds"),
        ("a,b,1,2024-01-31", r"at '2024-01-31' is no time in seconds"),
    ],
)
def test_read_bad_value_is_refused_with_its_row(tmp_path, row, message):
    (tmp_path / "events.csv").write_text(f"customer,sku,stars,at\na,b,1,1\n{row}\n")
    with pytest.raises(TableError, match=rf"events\.csv, row 3: {message}"):
        generic.read(config(tmp_path))


@pytest.mark.parametrize("text", ["2024-02-30", "2024-1-5", "31.01.2024", "2024-01-01T25:00"])
def test_read_bad_date_is_refused(tmp_path, text):
    (tmp_path / "events.csv").write_text(f"customer,sku,stars,at\na,b,1,{text}\n")
    with pytest.raises(TableError, match=r"row 2: at .* is no date in ISO 8601"):
        generic.read(config(tmp_path, {"time_unit": "iso"}))


@pytest.mark.parametrize("value", ["2", "0.5", "true", ""])
def test_read_label_other_than_0_and_1_is_refused(tmp_path, value):
    (tmp_path / "events.csv").write_text(f"customer,sku,y,at\na,b,{value},1\n")
    with pytest.raises(TableError, match=rf"row 2: y '{value}' is no label, 0 or 1"):
        generic.read(config(tmp_path, {"rating": None, "label": "y"}))


def test_read_event_of_an_item_the_item_file_lacks_is_refused(tmp_path):
    (tmp_path / "events.csv").write_text("customer,sku,stars,at\n1,a,1,1\n1,b,1,2\n")
    (tmp_path / "items.csv").write_text("sku,name\na,Anchor\n")
    data = config(tmp_path, {"item_text": {"title": "name"}}, items="items.csv")
    with pytest.raises(TableError, match=r"events\.csv, row 3: sku 'b' is no item of the item fil"):
        generic.read(data)


def test_read_item_twice_in_the_item_file_is_refused(tmp_path):
    (tmp_path / "events.csv").write_text("customer,sku,stars,at\n1,a,1,1\n")
    (tmp_path / "items.csv").write_text("sku\na\nb\na\n")
    with pytest.raises(TableError, match=r"items\.csv, row 4: sku 'a' occurs on an earlier row"):
        generic.read(config(tmp_path, items="items.csv"))


def test_read_unknown_column_is_refused_naming_the_nearest(tmp_path):
    (tmp_path / "events.csv").write_text("customer_id,sku,stars,at\n1,a,1,1\n")
    with pytest.raises(TableError, match=r"lacks 'customer'.*the nearest is 'customer_id'"):
        generic.read(config(tmp_path))


def test_read_ids_that_are_fractions_are_refused(tmp_path):
    frame = pl.DataFrame({"customer": [1.0], "sku": [1], "stars": [1], "at": [1]})
    frame.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(TableError, match="column 'customer' is Float64, an id is an integer or te"):
        generic.read(config(tmp_path, events="events.parquet"))


def test_read_unknown_ending_needs_a_separator(tmp_path):
    (tmp_path / "events.txt").write_text("customer;sku;stars;at\n1;a;1;1\n")
    with pytest.raises(TableError, match=r"'\.txt' is no known ending.*data\.columns\.separator"):
        generic.read(config(tmp_path, events="events.txt"))
    found = generic.read(config(tmp_path, {"separator": ";"}, events="events.txt"))
    assert found.events.height == 1


def test_read_parquet_with_dictionary_ids_reads_as_with_text(tmp_path):
    frame = pl.DataFrame({"customer": ["a", "b"], "sku": ["x", "y"], "stars": [1, 2], "at": [1, 2]})
    frame.write_parquet(tmp_path / "text.parquet")
    coded = frame.with_columns(pl.col("customer", "sku").cast(pl.Categorical))
    coded.write_parquet(tmp_path / "coded.parquet")
    found = [generic.read(config(tmp_path, events=f"{n}.parquet")) for n in ("text", "coded")]
    assert found[0].events.equals(found[1].events)
