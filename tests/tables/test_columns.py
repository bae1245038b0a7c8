"""Raw files in batches: what a batch holds, where a bad row is said to be, and that batches do not
change what is read.
"""

import csv
import gzip

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rellax_ds.errors import TableError
from rellax_ds.tables import columns
from rellax_ds.tables.columns import Form

PLAIN = Form("::", columns=("a", "b"))
CSV = Form(",", quoted=True)
PARQUET = Form(parquet=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 bytes, so that a small file has many."""
    monkeypatch.setattr(columns, "_BLOCK", 64)


def rows_of(path, form, wanted=("a", "b")):
    frames = list(columns.stream(path, form, wanted))
    return pl.concat(frames).rows(), len(frames)


def test_stream_plain_text_in_blocks_gives_every_line_with_its_number(tmp_path, small_blocks):
    path = tmp_path / "x.dat"
    expected = [(n + 1, f"left {n}", "é" * (n % 7)) for n in range(200)]
    path.write_text("".join(f"{a}::{b}\n" for _, a, b in expected), encoding="utf-8")
    rows, num_batches = rows_of(path, PLAIN)
    assert rows == expected
    assert num_batches > 20


def test_stream_plain_batch_is_no_larger_than_a_block(tmp_path, small_blocks):
    path = tmp_path / "x.dat"
    path.write_text("aaaa::bbbb\n" * 500)
    heights = [frame.height for frame in columns.stream(path, PLAIN, ("a", "b"))]
    assert max(heights) <= 2 * 64 // 11
    assert sum(heights) == 500


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(0, 80),
)
def test_stream_plain_any_lengths_and_line_ends_equal_the_lines(
    tmp_path, small_blocks, lengths, end, num_blank
):
    path = tmp_path / "x.dat"
    lines = [f"{'x' * length}::{n}" for n, length in enumerate(lengths)]
    path.write_bytes((end.join(lines) + end * num_blank).encode())
    rows, _ = rows_of(path, PLAIN)
    assert rows == [(n + 1, "x" * length, str(n)) for n, length in enumerate(lengths)]


def test_stream_plain_blank_line_between_blocks_is_refused_where_it_is(tmp_path, small_blocks):
    path = tmp_path / "x.dat"
    path.write_text("aaaa::bbbb\n" * 30 + "\n" + "aaaa::bbbb\n" * 30)
    with pytest.raises(TableError, match=r"x\.dat, line 31: 1 columns separated by '::'"):
        rows_of(path, PLAIN)


def test_stream_plain_bad_byte_in_a_late_block_names_its_line(tmp_path, small_blocks):
    path = tmp_path / "x.dat"
    path.write_bytes(b"aaaa::bbbb\n" * 30 + b"a::\xff\n")
    with pytest.raises(TableError, match=r"line 31: byte 0xff is not UTF-8"):
        rows_of(path, PLAIN)


def test_stream_file_without_line_ends_is_refused(tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(columns, "_LONGEST_LINE", 1000)
    path = tmp_path / "x.dat"
    path.write_bytes(b"\0" * 2000)
    with pytest.raises(TableError, match="bytes without a line"):
        rows_of(path, PLAIN)


def test_stream_typed_header_loses_its_types(tmp_path):
    path = tmp_path / "x.inter"
    path.write_text("a:token\tb:float\n1\t2\n")
    assert rows_of(path, Form())[0] == [(2, "1", "2")]


def test_stream_header_with_colons_of_another_kind_keeps_them(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a:token,b:euro\n1,2\n")
    assert rows_of(path, CSV, ("a:token", "b:euro"))[0] == [(2, "1", "2")]


@pytest.mark.parametrize("form", [CSV, Form(",")])
def test_stream_byte_order_mark_is_no_part_of_the_header(tmp_path, form):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8-sig")
    assert rows_of(path, form)[0] == [(2, "1", "2")]


@pytest.mark.parametrize("form", [CSV, Form(",")])
def test_stream_packed_file_reads_as_the_unpacked_one(tmp_path, form):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n3,4\n"))
    assert rows_of(path, form)[0] == [(2, "1", "2"), (3, "3", "4")]


@pytest.mark.parametrize("form", [CSV, Form(",")])
def test_stream_damaged_packed_file_is_refused(tmp_path, form):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 50_000)[:80])
    with pytest.raises(TableError, match=r"x\.csv\.gz: cannot be read"):
        rows_of(path, form)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from("ab\"',;\n\\é "), max_size=9)] * 2),
        min_size=1,
        max_size=30,
    )
)
def test_stream_quoted_text_equals_what_a_csv_writer_wrote(tmp_path, rows):
    path = tmp_path / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("a", "b"), *rows])
    assert rows_of(path, CSV)[0] == [(n + 2, *row) for n, row in enumerate(rows)]


def test_stream_quoted_file_longer_than_a_block_comes_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_BLOCK", 4096)
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f'"{n}","x,\ny"\n' for n in range(2000)))
    rows, num_batches = rows_of(path, CSV)
    assert rows == [(n + 2, str(n), "x,\ny") for n in range(2000)]
    assert num_batches > 3


def test_stream_escaped_quotes_and_separators_stay_inside_the_value(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'"a";"b"\n"the \\"J\\"; it";"\x93caf\xe9\x94"\n')
    form = Form(";", "cp1252", quoted=True, escape="\\")
    assert rows_of(path, form)[0] == [(2, 'the "J"; it', "\u201ccaf\u00e9\u201d")]


def test_stream_quoted_cp1252_file_in_utf_8_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('"a";"b"\n"é";"x"\n', encoding="utf-8")
    with pytest.raises(TableError, match="the text is UTF-8, the published file is cp1252"):
        rows_of(path, Form(";", "cp1252", quoted=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n3\n", r"x\.csv, row 3: 1 columns, expected 2: '3'; mend"),
        (b"a,b\n1,2\n3,4,5\n", r"x\.csv, row 3: 3 columns, expected 2"),
        (b"a,bc\n1,2\n", r"x\.csv, line 1: the header lacks 'b' \(found: a, bc\).*nearest is 'bc'"),
        (b"a,b\n1,\xff\n", r"x\.csv: the text is not UTF-8"),
        (b"a,b\n", r"x\.csv: holds a header and no rows"),
        (b"", r"x\.csv: the file is empty"),
        (b"\n", r"x\.csv: the file is empty"),
    ],
)
def test_stream_bad_csv_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_bytes(text)
    with pytest.raises(TableError, match=message):
        rows_of(path, CSV)


@pytest.mark.parametrize("form", [CSV, PLAIN, PARQUET])
def test_stream_missing_file_is_refused(tmp_path, form):
    with pytest.raises(TableError, match=r"absent: no such file"):
        rows_of(tmp_path / "absent", form)


def test_stream_parquet_gives_rows_in_their_types(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"b": [1.5, None], "a": ["x", "y"], "c": [0, 0]}), path)
    assert rows_of(path, PARQUET)[0] == [(1, "x", 1.5), (2, "y", None)]


def test_stream_parquet_in_batches_numbers_rows_through(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_PARQUET_ROWS", 10)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(35), "b": range(35)}), path)
    rows, num_batches = rows_of(path, PARQUET)
    assert rows == [(n + 1, n, n) for n in range(35)]
    assert num_batches == 4


def test_stream_parquet_without_the_column_is_refused_naming_the_nearest(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1], "bb": [1]}), path)
    with pytest.raises(TableError, match=r"no column 'b' \(found: a, bb\); the nearest is 'bb'"):
        rows_of(path, PARQUET)


def test_stream_text_named_parquet_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="not a readable Parquet file"):
        rows_of(path, PARQUET)


def test_stream_parquet_without_rows_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.int64()), "b": pa.array([], pa.int64())}), path)
    with pytest.raises(TableError, match="no rows"):
        rows_of(path, PARQUET)
