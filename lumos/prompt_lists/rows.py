"""Lists of clips to make, read from a file: a prompt a line (.txt), an object a line (.jsonl), or columns under names (.csv).

A row that cannot be read becomes a `Row` with its problem, so that the others can be made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import parse_json, read_text
from lumos.pipeline.options import all_options
from lumos.settings import is_whole

MAX_LIST_BYTES = 2**28
MAX_ROWS = 1_000_000


@dataclass(frozen=True)
class Kind:
    """What a value must be, and how a cell of a table says it."""

    name: str
    holds: Callable[[Any], bool]
    parse: Callable[[str], Any]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list_of(kind: Callable[[object], bool], value: object) -> bool:
    """Not of an empty one."""
    return isinstance(value, list) and bool(value) and all(map(kind, value))


def whole_numbers(cell: str) -> int | list[int]:
    numbers = [int(part) for part in cell.split()]
    return numbers[0] if len(numbers) == 1 else numbers


TEXT = Kind("text", is_text, str)
PROMPT = Kind("text, or a list of texts", lambda v: is_text(v) or is_list_of(is_text, v), str)
WHOLE = Kind("a whole number", is_whole, int)
WHOLES = Kind("a whole number, or a list of them", lambda v: is_whole(v) or is_list_of(is_whole, v), whole_numbers)
COUNTS = Kind("a list of whole numbers", lambda v: is_list_of(is_whole, v), lambda cell: [int(part) for part in cell.split()])

ARGUMENTS = {
    "prompt": PROMPT, "prompt_frames": COUNTS, "negative_prompt": TEXT, "image": TEXT, "video": TEXT, "last_image": TEXT,
    "output": TEXT, "num_given_frames": WHOLE, "num_frames": WHOLE, "height": WHOLE, "width": WHOLE, "fps": WHOLE,
    "num_videos_per_prompt": WHOLE, "seed": WHOLES,
}  # fmt: skip
"""What a row may say beside sampling options."""
PATHS = ("image", "video", "last_image")


def columns() -> dict[str, Kind]:
    """What a row may say, by the names of the command line: arguments, and the sampling options of all generators."""
    return ARGUMENTS | {name: Kind(option.kind, option.holds, option.parse) for name, option in all_options().items()}


@dataclass(frozen=True)
class Row:
    """One entry of a list: the line of the file where it ends, its number from 0, what it says, why it cannot be read."""

    line: int
    number: int
    options: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a list; pictures and clips that they name are looked for from the list's folder.

    UserError for a file that cannot be read, one of another form, and one without rows.
    """
    path = Path(path)
    readers = {".txt": read_lines, ".jsonl": read_objects, ".csv": read_table}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is no list of prompts; give a file that ends in {', '.join(readers)}")
    text = read_text(path, "a list of prompts", MAX_LIST_BYTES, pipes=True).removeprefix("\ufeff")
    rows = []
    for line, read in readers[path.suffix.lower()](text, path):
        if len(rows) == MAX_ROWS:
            raise UserError(f"{path} has more than {MAX_ROWS:,} rows; make several lists of it")
        try:
            rows.append(Row(line, len(rows), checked(read(), path.parent)))
        except UserError as error:
            rows.append(Row(line, len(rows), problem=str(error)))
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


Reader = Iterator[tuple[int, Callable[[], dict[str, Any]]]]


def read_lines(text: str, path: Path) -> Reader:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, lambda line=line: {"prompt": line.strip()}


def read_objects(text: str, path: Path) -> Reader:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, lambda line=line: parse_object(line)


def parse_object(line: str) -> dict[str, Any]:
    row = parse_json(line, "the row")
    if not isinstance(row, dict):
        raise UserError(f"a JSON {type(row).__name__}; give an object, as {{\"prompt\": \"a red circle\"}}")
    return {name: value for name, value in row.items() if value is not None}


def read_table(text: str, path: Path) -> Reader:
    known, table = columns(), csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(table, [])]
        if wrong := [name for name in names if name not in known or names.count(name) > 1]:
            raise UserError(f"{path}: the column {shown(wrong[0])} is unknown or there twice; allowed: {', '.join(known)}")
        for cells in table:
            if any(cell.strip() for cell in cells):
                yield table.line_num, lambda cells=cells: parse_cells(names, cells)
    except csv.Error as error:
        raise UserError(f"{path} is no table of comma-separated values: {error} in line {table.line_num}") from error


def parse_cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise UserError(f"{len(cells)} cells under {len(names)} columns")
    known, row = columns(), {}
    for name, cell in zip(names, map(str.strip, cells), strict=True):
        try:
            row |= {name: known[name].parse(cell)} if cell else {}
        except (ValueError, OverflowError) as error:
            raise UserError(f"{name} {shown(cell)} is not allowed; give {known[name].name}") from error
    return row


def checked(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with the paths of what it begins with; UserError for an unknown name and for a value of another kind."""
    known = columns()
    if unknown := [name for name in row if name not in known]:
        raise UserError(f"{shown(unknown[0])} is unknown; allowed: {', '.join(known)}")
    for name, value in row.items():
        if not known[name].holds(value):
            raise UserError(f"{name} {shown(value)} is not allowed; give {known[name].name}")
    return {name: str(folder / value) if name in PATHS else value for name, value in row.items()}
