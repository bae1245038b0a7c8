"""Raw files as batches of columns: delimited text, quoted CSV and Parquet behind one call.

A published log has up to 25 million rows and a user's own may have more, so no file is held whole:
a batch is a few MiB of whole records, cut into columns as columns, and its reader keeps only the
numbers. Every row carries its place (`line` of a text file, `row` of a CSV or Parquet file; a CSV
header is row 1), so a check is one expression over a column and its message can name the place
without a second, slow pass.
"""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_BLOCK = 4 << 20
_LONGEST_LINE = 64 << 20
_PARQUET_ROWS = 1 << 17
_BOM = b"\xef\xbb\xbf"
_TYPED_NAME = re.compile(r"([^:]+):(?:token|token_seq|float|float_seq)")
_WRONG_WIDTH = re.compile(r".*Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Form:
    """How a file is written.

    Attributes:
        separator: Between columns; more than one character only without quoting.
        encoding: Of the text.
        columns: The columns in order; None when a header names them.
        quoted: Whether values may stand in double quotes, which then may hold anything; a quote
            inside is doubled, or escaped by `escape`.
        escape: Character that takes the next one literally; for quoted files.
        parquet: A Parquet file; nothing else applies.
    """

    separator: str = "\t"
    encoding: str = "utf-8"
    columns: tuple[str, ...] | None = None
    quoted: bool = False
    escape: str | None = None
    parquet: bool = False


def stream(path: Path, form: Form, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Read a file in batches of whole records.

    Text columns come as strings, never null; Parquet columns in their own type. A file whose name
    ends in .gz, .bz2 or .zst is unpacked on the way. Names of a header may carry a type
    (`user_id:token`), which is dropped when all of them do.

    Args:
        path: The file.
        form: How it is written.
        wanted: Columns to read.

    Yields:
        Frames with the place (`line` or `row`, from 1) as first column, then `wanted`; at least one
        frame with at least one row.

    Raises:
        TableError: The file is absent, empty, wrongly encoded, lacks a column or has a row of
            another width; names file, place and value.
    """
    read = _parquet if form.parquet else _quoted if form.quoted else _plain
    try:
        yield from read(path, form, list(dict.fromkeys(wanted)))
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; correct the path") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TableError(
            f"{path}: byte 0x{byte:02x} is not {form.encoding.upper()}; save the file as "
            f"{form.encoding.upper()}"
        ) from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise TableError(f"{path}: cannot be read ({reason}); copy it again") from None


def table(path: Path, form: Form, wanted: Sequence[str]) -> pl.DataFrame:
    """A whole file, for the small ones: items and users. See `stream`."""
    return pl.concat(list(stream(path, form, wanted)))


def integer(name: str) -> pl.Expr:
    """Column `name` as int64; null where it is none."""
    return pl.col(name).cast(pl.Int64, strict=False)


def number(name: str) -> pl.Expr:
    """Column `name` as float64; null where it is no finite number."""
    value = pl.col(name).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def reject(path: Path, raw: pl.DataFrame, name: str, bad: pl.Expr, reason: str) -> None:
    """Raise for the first row that `bad` marks; `raw` has the place as first column.

    Raises:
        TableError: Names file, place, column, value and `reason`.
    """
    rows = raw.filter(bad).head(1)
    if rows.height:
        kind = raw.columns[0]
        place, value = rows.select(kind, name).row(0)
        raise TableError(f"{path}, {kind} {place}: {name} {_shown(str(value))} {reason}")


def reject_repeated_ids(path: Path, raw: pl.DataFrame, name: str) -> None:
    """Raise for the first id that an earlier row has too."""
    repeated = ~pl.col(name).is_first_distinct()
    what = f"occurs on an earlier {raw.columns[0]} too; ids are unique"
    reject(path, raw, name, repeated, what)


def reject_unknown_ids(path: Path, raw: pl.DataFrame, name: str, known: pl.Series) -> None:
    """Raise for the first id that is not among `known`, the ids of another file."""
    what = name.removesuffix("_id")
    unknown = ~pl.col(name).is_in(known.implode())
    reject(path, raw, name, unknown, f"is no {what} of the {what} file; add it there")


def missing_column(where: str, name: str, found: Sequence[str], remedy: str = "") -> TableError:
    """The error for a column that a file does not have."""
    nearest = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
    hint = remedy or f"the nearest is '{nearest[0] if nearest else ''}'"
    return TableError(f"{where} '{name}' (found: {_shown_names(found)}); {hint}")


def _plain(path: Path, form: Form, wanted: list[str]) -> Iterator[pl.DataFrame]:
    """Lines without quoting; one line is one record."""
    names = form.columns
    line = 1
    any_rows = False
    for data in _blocks(path):
        text = pl.DataFrame({"text": [_decoded(path, form.encoding, data, line)]})
        lines = text.select(pl.col("text").str.split("\n").explode().str.strip_suffix("\r"))
        lines = lines.with_row_index("line", offset=line)
        line += lines.height
        if names is None:
            names = _header(path, lines["text"][0].split(form.separator), wanted)
            lines = lines.slice(1)
        if lines.height:
            any_rows = True
            yield _cut(path, lines, form.separator, names, wanted)
    _check_not_empty(path, names is not None and line > 1, any_rows)


def _cut(
    path: Path, lines: pl.DataFrame, separator: str, names: tuple[str, ...], wanted: list[str]
) -> pl.DataFrame:
    separators = pl.col("text").str.count_matches(separator, literal=True)
    bad = lines.filter(separators != len(names) - 1).head(1)
    if bad.height:
        line, row = bad.row(0)
        mark = "tab" if separator == "\t" else f"'{separator}'"
        raise TableError(
            f"{path}, line {line}: {row.count(separator) + 1} columns separated by {mark}, "
            f"expected {len(names)}: {_shown(row)}; mend or remove the row"
        )
    # Numbered, because two columns of a file may have one name.
    fields = pl.col("text").str.split_exact(separator, len(names) - 1)
    numbered = [f"_{n}" for n in range(len(names))]
    return lines.select("line", fields.struct.rename_fields(numbered).alias("row")).select(
        "line",
        *(pl.col("row").struct.field(f"_{names.index(name)}").alias(name) for name in wanted),
    )


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines, without the line end after a piece's last line."""
    with pa.input_stream(str(path), compression="detect") as file:
        rest = b""
        start = True
        while block := file.read(_BLOCK):
            if start:
                block = block.removeprefix(_BOM)
            text = rest + block
            # Line ends that follow the last whole line wait: only at the file's end are they void.
            whole = text[: max(text.rfind(b"\n"), 0)].rstrip(b"\r\n")
            rest = text[len(whole) :]
            if whole:
                yield whole if start else _after_line_end(whole)
                start = False
            elif len(rest) > _LONGEST_LINE:
                raise TableError(f"{path}: {len(rest)} bytes without a line; this is no text file")
        if whole := rest.rstrip(b"\r\n"):
            yield whole if start else _after_line_end(whole)


def _after_line_end(text: bytes) -> bytes:
    return text.removeprefix(b"\r").removeprefix(b"\n")


def _decoded(path: Path, encoding: str, data: bytes, line: int) -> str:
    if encoding in {"latin-1", "cp1252"} and not data.isascii() and _is_utf8(data):
        lines = enumerate(data.split(b"\n"), start=line)
        found = next(place for place, row in lines if not row.isascii())
        name = "ISO-8859-1" if encoding == "latin-1" else encoding
        raise TableError(
            f"{path}, line {found}: the text is UTF-8, the published file is {name}; convert it "
            f"with `iconv -f utf-8 -t {name.lower()}`"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        place = line + data.count(b"\n", 0, error.start)
        raise TableError(
            f"{path}, line {place}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; "
            f"save the file as {encoding.upper()}"
        ) from None


def _check_single_byte(path: Path, form: Form) -> None:
    """Refuse a file that is UTF-8 from end to end; a few valid sequences may be chance."""
    foreign = (_is_utf8(block) for block in _blocks(path) if not block.isascii())
    if next(foreign, False) and all(foreign):
        raise TableError(
            f"{path}: the text is UTF-8, the published file is {form.encoding}; convert it with "
            f"`iconv -f utf-8 -t {form.encoding}`"
        )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _quoted(path: Path, form: Form, wanted: list[str]) -> Iterator[pl.DataFrame]:
    """CSV with quotes, by Arrow's streaming parser; a quoted value may hold line ends."""
    with pa.input_stream(str(path), compression="detect") as file:
        first = file.read(1 << 16).removeprefix(_BOM).lstrip(b"\r\n").split(b"\n")[0]
    _check_not_empty(path, bool(first.strip()), any_rows=True)
    if form.encoding != "utf-8":
        _check_single_byte(path, form)
    cells = csv.reader(
        [first.decode(form.encoding).rstrip("\r")],
        delimiter=form.separator,
        escapechar=form.escape,
    )
    names = _header(path, next(cells), wanted)
    row = 2
    try:
        with pa.input_stream(str(path), compression="detect") as file:
            for batch in _csv_reader(file, form, names, wanted):
                if batch.num_rows:
                    frame = pl.DataFrame(pl.from_arrow(batch)).select(wanted)
                    yield frame.with_row_index("row", offset=row)
                    row += batch.num_rows
    except pa.ArrowInvalid as error:
        raise _csv_error(path, str(error)) from None
    _check_not_empty(path, any_header=True, any_rows=row > 2)


def _csv_reader(
    file: pa.NativeFile, form: Form, names: tuple[str, ...], wanted: list[str]
) -> pa.csv.CSVStreamingReader:
    return pa.csv.open_csv(
        file,
        pa.csv.ReadOptions(
            use_threads=False,
            block_size=_BLOCK,
            skip_rows=1,
            column_names=list(names),
            encoding="utf8" if form.encoding == "utf-8" else form.encoding,
        ),
        pa.csv.ParseOptions(
            delimiter=form.separator,
            escape_char=form.escape or False,
            newlines_in_values=True,
        ),
        pa.csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.large_string()),
            strings_can_be_null=False,
        ),
    )


def _csv_error(path: Path, reason: str) -> TableError:
    wrong_width = _WRONG_WIDTH.fullmatch(reason)
    if wrong_width:
        row, expected, found, text = wrong_width.groups()
        return TableError(
            f"{path}, row {row}: {found} columns, expected {expected}: {_shown(text)}; mend or "
            "remove the row"
        )
    if "invalid UTF8" in reason:
        return TableError(f"{path}: the text is not UTF-8; save the file as UTF-8")
    return TableError(f"{path}: no readable CSV ({' '.join(reason.split())}); mend the file")


def _parquet(path: Path, _form: Form, wanted: list[str]) -> Iterator[pl.DataFrame]:
    row = 1
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            for name in wanted:
                if name not in found:
                    raise missing_column(f"{path}: there is no column", name, found)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                if batch.num_rows:
                    frame = pl.DataFrame(pl.from_arrow(batch)).select(wanted)
                    yield frame.with_row_index("row", offset=row)
                    row += batch.num_rows
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise TableError(f"{path}: not a readable Parquet file ({reason}); copy it again") from None
    _check_not_empty(path, any_header=True, any_rows=row > 1)


def _header(path: Path, cells: list[str], wanted: list[str]) -> tuple[str, ...]:
    """Names of a header; every wanted one must be there."""
    typed = [_TYPED_NAME.fullmatch(cell) for cell in cells]
    names = tuple(match[1] if match else "" for match in typed) if all(typed) else tuple(cells)
    for name in wanted:
        if name not in names:
            raise missing_column(f"{path}, line 1: the header lacks", name, names)
    return names


def _check_not_empty(path: Path, any_header: bool, any_rows: bool) -> None:
    if not any_header:
        raise TableError(f"{path}: the file is empty; copy it again")
    if not any_rows:
        raise TableError(f"{path}: holds a header and no rows; check that the copy is complete")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _shown_names(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
