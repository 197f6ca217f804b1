"""The kinds of failure that the command line reports in one line instead of a traceback."""

from __future__ import annotations

import reprlib
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, or torch's on the CPU or on a GPU, way of saying that memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def printable(text: str) -> str:
    """The text with control characters, direction marks and undecodable bytes escaped, so that it can be shown on a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    return text if len(text) <= length else f"{text[: length - 4]} ..."
