"""Reading of prompt lists: one prompt per line (.txt), one JSON object per line (.jsonl), or a table with column names (.csv).

A row that cannot be read becomes a `PromptRow` with an error message, so that the other rows can still be
made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumos.errors import UserError, instead, shown
from lumos.files import existing_path, parse_json, read_prompts
from lumos.pipeline.options import all_options
from lumos.settings import is_whole
from lumos.wording import is_blank

MAX_LIST_BYTES = 2**28
MAX_ROWS = 1_000_000


@dataclass(frozen=True)
class ValueType:
    """A type of values: its name, a check of a value, and a function that parses a cell of a table."""

    name: str
    holds: Callable[[Any], bool]
    parse: Callable[[str], Any]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list_of(kind: Callable[[object], bool], value: object) -> bool:
    """Return whether the value is a list with at least one entry, all of this kind."""
    return isinstance(value, list) and bool(value) and all(map(kind, value))


def whole_numbers(cell: str) -> int | list[int]:
    numbers = [int(part) for part in cell.split()]
    return numbers[0] if len(numbers) == 1 else numbers


def true_or_false(cell: str) -> bool:
    if cell.strip().lower() not in ("true", "false"):
        raise ValueError(cell)
    return cell.strip().lower() == "true"


TEXT = ValueType("text", is_text, str)
PROMPT = ValueType("text, or a list of texts", lambda v: is_text(v) or is_list_of(is_text, v), str)
WHOLE = ValueType("a whole number", is_whole, int)
WHOLES = ValueType("a whole number, or a list of them", lambda v: is_whole(v) or is_list_of(is_whole, v), whole_numbers)
SWITCH = ValueType("true or false", lambda v: isinstance(v, bool), true_or_false)
COUNTS = ValueType("a list of whole numbers", lambda v: is_list_of(is_whole, v), lambda cell: [int(part) for part in cell.split()])

ARGUMENTS = {
    "prompt": PROMPT, "prompt_frames": COUNTS, "negative_prompt": TEXT, "image": TEXT, "video": TEXT, "last_image": TEXT,
    "interpolate": WHOLE, "views": SWITCH, "output": TEXT,
    "num_given_frames": WHOLE, "num_frames": WHOLE, "height": WHOLE, "width": WHOLE, "fps": WHOLE,
    "num_videos_per_prompt": WHOLE, "seed": WHOLES,
}  # fmt: skip
"""The keys of a row, except the sampling options."""
PATHS = ("image", "video", "last_image")
"""The keys whose values are paths, relative to the folder of the list."""


def columns() -> dict[str, ValueType]:
    """Return the kind of each key that a row may have: the arguments, and the sampling options of all generators."""
    return ARGUMENTS | {name: ValueType(option.kind, option.holds, option.parse) for name, option in all_options().items()}


@dataclass(frozen=True)
class PromptRow:
    """One entry of a prompt list."""

    line: int  # line of the file, from 1, on which the entry ends
    number: int  # number of the entry, from 0
    options: dict[str, Any] = field(default_factory=dict)  # the values of the entry, by key
    problem: str | None = None  # why the entry cannot be read


def read_rows(path: str | Path) -> list[PromptRow]:
    """Return the rows of a list. Paths of pictures and clips in a row are relative to the folder of the list.

    UserError for a file that cannot be read, for a file of another form, and for a file without
    rows.
    """
    path = Path(path)
    readers = {".txt": read_lines, ".jsonl": read_objects, ".csv": read_table}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is no list of prompts; give a file that ends in {', '.join(readers)}")
    text = read_prompts(path, "a list of prompts", MAX_LIST_BYTES, pipes=True)
    rows = []
    for line, read in readers[path.suffix.lower()](text, path):
        if len(rows) == MAX_ROWS:
            raise UserError(f"{path} has more than {MAX_ROWS:,} rows; make several lists of it")
        try:
            rows.append(PromptRow(line, len(rows), checked(read(), path.parent)))
        except UserError as error:
            rows.append(PromptRow(line, len(rows), problem=str(error)))
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


Reader = Iterator[tuple[int, Callable[[], dict[str, Any]]]]


def read_lines(text: str, path: Path) -> Reader:
    for number, line in enumerate(text.split("\n"), start=1):
        if not is_blank(line):
            yield number, lambda line=line: {"prompt": line.strip()}


def read_objects(text: str, path: Path) -> Reader:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, lambda line=line: parse_object(line)


def parse_object(line: str) -> dict[str, Any]:
    row = parse_json(line, "the row")
    if not isinstance(row, dict):
        raise UserError(f"the row is a JSON {type(row).__name__}; give an object, for example {{\"prompt\": \"a red circle\"}}")
    return {name: value for name, value in row.items() if value is not None}


def read_table(text: str, path: Path) -> Reader:
    known, table = columns(), csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(table, [])]
        if wrong := [name for name in names if name not in known or names.count(name) > 1]:
            raise UserError(f"{path}: the column {shown(wrong[0])} is unknown or named twice{instead(wrong[0], known)}")
        for cells in table:
            if any(cell.strip() for cell in cells):
                yield table.line_num, lambda cells=cells: parse_cells(names, cells)
    except csv.Error as error:
        raise UserError(f"{path} is no table of comma-separated values: {error} in line {table.line_num}") from error


def parse_cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise UserError(f"the row has {len(cells)} cells, but there are {len(names)} columns; give one cell for each column")
    known, row = columns(), {}
    for name, cell in zip(names, map(str.strip, cells), strict=True):
        try:
            row |= {name: known[name].parse(cell)} if cell else {}
        except (ValueError, OverflowError) as error:
            raise UserError(f"{name} {shown(cell)} is not allowed; give {known[name].name}") from error
    return row


def checked(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the row with its paths joined to the folder of the list; UserError for an unknown key and for a wrong type."""
    known = columns()
    if unknown := [name for name in row if name not in known]:
        raise UserError(f"{shown(unknown[0])} is unknown{instead(unknown[0], known)}")
    for name, value in row.items():
        if not known[name].holds(value):
            raise UserError(f"{name} {shown(value)} is not allowed; give {known[name].name}")
    return {name: str(existing_path(folder, value)) if name in PATHS else value for name, value in row.items()}
