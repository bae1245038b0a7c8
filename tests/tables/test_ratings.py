"""Repeated events: found exactly, in small memory, with the line of the second one."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.errors import TableError
from rellax_ds.tables import columns
from rellax_ds.tables.columns import Form
from rellax_ds.tables.ratings import read_ratings, repeated_events

FORM = Form(",")
NAMES = ("u", "i", "r", "t")
ITEMS = pl.DataFrame({"item_id": range(1000)})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), max_size=40))
def test_repeated_events_are_those_an_earlier_row_has(rows):
    schema = dict.fromkeys(("user_id", "item_id", "time"), pl.Int64)
    events = pl.DataFrame(rows, schema=schema, orient="row")
    expected = [n for n, row in enumerate(rows) if row in rows[:n]]
    assert repeated_events(events).tolist() == expected


def test_read_ratings_repeat_in_another_batch_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 256)
    path = tmp_path / "r.csv"
    rows = [f"1,{n},3.5,100" for n in range(200)]
    path.write_text("\n".join(["u,i,r,t", *rows, "1,7,2.0,100"]))
    with pytest.raises(TableError, match=r"r\.csv, line 202: event '1 7 100' .*earlier line"):
        read_ratings(path, FORM, NAMES, None, ITEMS)


def test_read_ratings_bad_value_in_a_late_batch_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 256)
    path = tmp_path / "r.csv"
    rows = [f"1,{n},3.5,100" for n in range(200)]
    path.write_text("\n".join(["u,i,r,t", *rows, "1,7,inf,100"]))
    with pytest.raises(TableError, match=r"line 202: r 'inf' is no finite number"):
        read_ratings(path, FORM, NAMES, None, ITEMS)
