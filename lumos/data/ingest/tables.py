"""Reading of tables (csv, tsv, jsonl, parquet) by other programs. An invalid row does not affect the other rows."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lumos.data.shards.format import parquet
from lumos.errors import RunError, UserError, shown
from lumos.files import open_regular, parse_json
from lumos.wording import encoding_of, is_blank

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PATH_KEYS = ("path", "file", "file_name", "filename", "video", "image")
CAPTION_KEYS = ("caption", "text", "prompt")
COLUMNS = (*PATH_KEYS, *CAPTION_KEYS, "start", "end")
MAX_ROW_LENGTH = 1 << 24
"""Largest number of characters of a row of text."""
MAX_COLUMN_BYTES = 1 << 30
"""Largest number of bytes of a column of a row group of a parquet file."""
MAX_ROW_LINES = 200
"""Largest number of lines of a csv row. If a quote is not closed, this many lines are read before the row counts as
invalid and reading goes on at its second line."""

class _WrongNames(Exception):
    """The first row of a table does not name the columns, or one of them twice."""


TableRow = dict[str, Any] | str
"""The columns of a row by name, or a message that says why the row is invalid."""


def rows(table: Path) -> Iterator[tuple[int, TableRow]]:
    """Yield (row number from 1, row) for each row of a table.

    Of a parquet file only the COLUMNS are read. Bytes that are not UTF-8 become lone surrogates. Raise
    RunError at the point from which the table cannot be read.
    """
    suffix = table.suffix.lower()
    try:
        with open_regular(table) as file:
            if suffix == ".parquet":
                yield from _parquet_rows(file)
                return
            newline = "" if suffix == ".csv" else None
            encoding, mark = encoding_of(file.read(4))
            file.seek(mark)
            errors = "surrogateescape" if encoding == "utf-8" else "replace"
            lines = _lines(io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline))
            if suffix == ".csv":
                yield from enumerate(_csv_rows(lines), 1)
            elif suffix == ".tsv":
                yield from enumerate(_tsv_rows(lines), 1)
            else:
                yield from ((number, json_row(line)) for number, line in enumerate(lines, 1) if line.strip())
    except UserError:  # pyarrow is not installed
        raise
    except _WrongNames as error:
        raise RunError(f"cannot read {table}: {error}") from error
    except Exception as error:  # whatever a reader raises for a damaged file
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"cannot read {table}: {why}; check that it is a whole {suffix[1:]} file") from error


def first(row: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first text that shows something among the columns `keys`, without spaces around it; "" if there is none."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and not is_blank(value)), "")


def not_text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return a message about the first value that is no text among the columns `keys`, or None. None and NaN are no values."""
    for key in keys:
        value = row.get(key)
        if value is not None and value == value and not isinstance(value, str):
            return f"{key} is {shown(value, 60)}, not text"
    return None


def json_row(line: str) -> TableRow:
    """Return the columns of a JSON object, or a message that says why the text is invalid."""
    if len(line) > MAX_ROW_LENGTH:
        return f"it has more than {MAX_ROW_LENGTH:,} characters"
    try:
        row = parse_json(line, "it")
    except UserError as error:
        return str(error)
    return row if isinstance(row, dict) else "it is not a JSON object"


def _lines(text: TextIO) -> Iterator[str]:
    """Yield the lines of a text. Only the first MAX_ROW_LENGTH + 1 characters of a longer line are kept.

    A byte order mark at the begin of a line, as in files that are joined, is left out.
    """
    while line := text.readline(MAX_ROW_LENGTH + 1):
        yield line.removeprefix("\ufeff")
        while len(line) > MAX_ROW_LENGTH and not line.endswith(("\n", "\r")):
            line = text.readline(MAX_ROW_LENGTH + 1)


def _tsv_rows(lines: Iterator[str]) -> Iterator[TableRow]:
    """Yield the rows of a tsv file, in which quotes are characters like others; the first row has the names of the columns."""
    names = None
    for line in lines:
        if len(line) > MAX_ROW_LENGTH:
            yield f"it has more than {MAX_ROW_LENGTH:,} characters"
            continue
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if names is None:
            names = _checked_names(cells)
        else:
            yield _named(names, cells, "a tab")
    if names is None:
        raise _WrongNames("it is empty")


def _csv_rows(lines: Iterator[str]) -> Iterator[TableRow]:
    """Yield the rows of a csv file; the first row has the names of the columns.

    A quote that is not closed would join all later lines into one row. Such a row counts as invalid,
    and reading goes on at its second line.
    """
    csv.field_size_limit(MAX_ROW_LENGTH)
    again: deque[str] = deque()
    record: list[str] = []
    ended = False

    def feed() -> Iterator[str]:
        nonlocal ended
        while (line := again.popleft() if again else next(lines, None)) is not None:
            record.append(line)
            if len(line) > MAX_ROW_LENGTH or len(record) > MAX_ROW_LINES or sum(map(len, record)) > MAX_ROW_LENGTH:
                raise csv.Error("it is too long, or a quote in it is not closed")
            yield line
        ended = True

    names, reader = None, csv.reader(feed(), strict=True, skipinitialspace=True)
    while True:
        record.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if names is None:
                raise
            again.extendleft(reversed(record[1:]))
            ended, reader = False, csv.reader(feed(), strict=True, skipinitialspace=True)
            yield f"it is not a row of comma-separated values: {error}; a quote inside of quotes is written twice"
            continue
        if cells is None:
            if names is None:
                raise _WrongNames("it is empty")
            return
        if not cells:
            continue
        if names is None:
            names = _checked_names(cells)
        else:
            yield _named(names, cells, "a comma")


def _checked_names(cells: list[str]) -> list[str]:
    """Return the names of the columns in the first row of a table; raise _WrongNames if none of them is that of the path.

    The same error is raised if a name that is read stands there twice.
    """
    names = [cell.strip() for cell in cells]
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise _WrongNames(f"its first row names the column {twice[0]} twice; give each column a name of its own")
    if not set(names) & set(PATH_KEYS):
        raise _WrongNames(
            f"its first row is {shown(names)}, but must name the columns: {' or '.join(PATH_KEYS)}, and {' or '.join(CAPTION_KEYS)}"
        )
    return names


def _named(names: list[str], cells: list[str], separator: str) -> TableRow:
    """Return the cells of a row by the names of the columns, or a message if there are more cells than names."""
    if len(cells) > len(names):
        quoted = "; text with a comma stands in quotes" if separator == "a comma" else ""
        return f"it has {len(cells)} cells, but there are {len(names)} columns: {separator} separates cells{quoted}"
    return dict(zip(names, cells, strict=False))


def _parquet_rows(file: Any) -> Iterator[tuple[int, TableRow]]:
    import pyarrow as pa

    table = parquet().ParquetFile(file)
    wanted = [name for name in COLUMNS if name in table.schema_arrow.names]
    # Text that a dictionary holds once stays so in memory, however many rows repeat it.
    texts = [name for name in wanted if pa.types.is_string(table.schema_arrow.field(name).type)]
    table = parquet().ParquetFile(file, metadata=table.metadata, read_dictionary=texts)  # the footer is read once
    number = 1
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        done = 0
        if size := _too_large(table.metadata.row_group(group), wanted):
            yield number, f"rows {number} to {number + count - 1} cannot be read: {size}"
            number += count
            continue
        try:
            for batch in table.iter_batches(1024, row_groups=[group], columns=wanted):
                for index in range(batch.num_rows):
                    yield number + done, _parquet_row(batch, index)
                    done += 1
        except Exception as error:  # whatever pyarrow raises for damaged pages
            why = (str(error).splitlines() or [type(error).__name__])[0]
            yield number + done, f"rows {number + done} to {number + count - 1} cannot be read: {why}"
        number += count


def _too_large(group: Any, wanted: list[str]) -> str | None:
    """Return a description of a column of a row group that would take too much memory, or None."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in wanted and column.total_uncompressed_size > MAX_COLUMN_BYTES:
            return f"{column.path_in_schema} has {column.total_uncompressed_size:,} bytes, at most {MAX_COLUMN_BYTES:,} are allowed"
    return None


def _parquet_row(batch: Any, index: int) -> TableRow:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except Exception as error:  # for example text that is not UTF-8, or times that Python cannot represent
        return f"it cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
