"""The tables' files: equal rows give equal bytes, and a wrong file stops at the door."""

import pyarrow as pa
import pytest

from rellax_ds.errors import TableError
from rellax_ds.tables import read_tables, write_parquet, write_tables
from rellax_ds.testing import made_tables

NAMES = ("users", "items", "events", "samples")


@pytest.fixture
def tables(tmp_path):
    return made_tables(tmp_path / "raw", num_users=10, num_items=20, num_events=150)


def test_write_tables_read_back_are_equal(tables, tmp_path):
    write_tables(tables, tmp_path)
    found = read_tables(tmp_path)
    for name in NAMES:
        assert getattr(found, name).equals(getattr(tables, name)), name


def test_write_tables_twice_gives_equal_bytes(tables, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tables(tables, tmp_path / folder)
    for name in NAMES:
        first, second = ((tmp_path / f / f"{name}.parquet").read_bytes() for f in "ab")
        assert first == second, name


def test_write_parquet_chunked_table_gives_the_bytes_of_a_whole_one(tables, tmp_path):
    events = tables.events
    write_parquet(events, tmp_path / "whole")
    write_parquet(pa.concat_tables([events.slice(0, 40), events.slice(40)]), tmp_path / "chunked")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "chunked").read_bytes()


def test_read_tables_missing_file_is_refused(tables, tmp_path):
    write_tables(tables, tmp_path)
    (tmp_path / "events.parquet").unlink()
    with pytest.raises(TableError, match=r"events\.parquet: no such file"):
        read_tables(tmp_path)


def test_read_tables_truncated_file_is_refused(tables, tmp_path):
    write_tables(tables, tmp_path)
    path = tmp_path / "items.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TableError, match=r"items\.parquet: not a readable Parquet file"):
        read_tables(tmp_path)


def test_read_tables_wrong_column_is_refused(tables, tmp_path):
    write_tables(tables, tmp_path)
    write_parquet(tables.events.drop_columns(["time"]), tmp_path / "events.parquet")
    with pytest.raises(TableError, match=r"events\.parquet: column 'time' is missing"):
        read_tables(tmp_path)
