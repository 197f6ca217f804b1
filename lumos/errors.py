"""The kinds of failure that the command line reports in one line instead of a traceback."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

SHOWN_LENGTH = 200
"""Characters of a value that a message shows at most."""


class UserError(ValueError):
    """What was asked for cannot be done: says what was given, what is allowed, what to do. Exit code 2."""


class NotFound(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or holds nothing of what is asked of it."""


class RunError(RuntimeError):
    """A correct request that failed on the way (disk, damaged file, non-finite loss). Exit code 1."""


class OutOfMemory(RunError):
    """Memory ran out; says what would need less."""


class NotFinite(RunError):
    """Numbers that a model computes are NaN or infinite; `clips` are those of the batch that are hit, counted from 0."""

    def __init__(self, message: str, clips: Sequence[int] = ()):
        super().__init__(message)
        self.clips = tuple(clips)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, or torch's on the CPU or on a GPU, way of saying that memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def printable(text: str) -> str:
    """The text with control characters, direction marks and undecodable bytes escaped, so that it can be shown on a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def drawable(text: str) -> str:
    """As `printable`, for matplotlib, to which a dollar sign begins a formula."""
    return printable(text).replace("$", r"\$")


def cut(text: str, length: int = SHOWN_LENGTH) -> str:
    """The text, or its first characters and " ..." where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def reason_of(error: BaseException) -> str:
    """The first line of what an error of another library says, in at most SHOWN_LENGTH printable characters; else its kind."""
    said = str(error).strip().splitlines()
    return cut(printable(said[0])) if said else type(error).__name__


def as_text(value: Any, length: int = SHOWN_LENGTH) -> str:
    """As `shown`, but a text stands without quotes: for the names of keys, and for what a message sets apart otherwise."""
    return cut(printable(value), length) if isinstance(value, str) else shown(value, length)


def shown(value: Any, length: int = SHOWN_LENGTH) -> str:
    """`repr` of any value in at most `length` printable characters, in bounded time: for messages that name a value.

    Nested containers are cut after a few entries and levels, so a value of a billion entries (YAML aliases) costs nothing.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 4, length, length, length
    for container in ("maxtuple", "maxlist", "maxarray", "maxdict", "maxset", "maxfrozenset", "maxdeque"):
        setattr(short, container, 8)
    try:
        text = printable(short.repr(value))
    except Exception:  # a number of too many digits, or a broken __repr__
        text = f"<{type(value).__name__}>"
    return cut(text, length)
