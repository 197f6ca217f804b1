"""Errors that the command line reports in one line without a traceback, and functions that format values for messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SHOWN_LENGTH = 200
"""The maximum number of characters of a value in a message."""


class UserError(ValueError):
    """A request that cannot be met. The message says what was given, what is allowed and what to do. Exit code 2."""


class NotFound(UserError, FileNotFoundError):
    """A file or folder in a request does not exist or does not have the expected content. Exit code 2."""


class RunError(RuntimeError):
    """A correct request failed, for example because of the disk, a damaged file or a non-finite loss. Exit code 1."""


class OutOfMemory(RunError):
    """Memory ran out. The message says what would need less."""


class NotFinite(RunError):
    """A model computed numbers that are NaN or infinite.

    `clips` are the indices in the batch of the clips with such numbers.
    """

    def __init__(self, message: str, clips: Sequence[int] = ()):
        super().__init__(message)
        self.clips = tuple(clips)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python or torch (on the CPU or on a GPU) raised this error because memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def printable(text: str) -> str:
    """Return the text with control characters, direction marks and undecodable bytes escaped.

    The result is safe to show on a terminal.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def drawable(text: str) -> str:
    """Return `printable(text)` with dollar signs escaped, because a dollar sign begins a formula in matplotlib."""
    return printable(text).replace("$", r"\$")


@contextmanager
def needing_matplotlib(what: str) -> Iterator[None]:
    """Turn an ImportError within the block into a UserError which says that `what` needs matplotlib."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs matplotlib ({error}); install it with pip install 'lumos-video[plot]'") from error


def cut(text: str, length: int = SHOWN_LENGTH) -> str:
    """Return the text; a text longer than `length` is cut and ends with " ..."."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message.

    The result has at most SHOWN_LENGTH printable characters. Use it for errors of other libraries.
    """
    said = str(error).strip().splitlines()
    return cut(printable(said[0])) if said else type(error).__name__


def meant(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """Return ", did you mean X?" if a known word is close to this one, else an empty text.

    least: the similarity of a close word, from 0 to 1 (`difflib.get_close_matches`).
    """
    close = difflib.get_close_matches(word, known, 1, least)
    return f", did you mean {close[0]}?" if close else ""


def instead(word: Any, known: Iterable[str], say: str = "allowed:") -> str:
    """Return what the message on an unknown word goes on with: the known word that was meant, if one is close, and all of them."""
    known = list(known)
    return f"{meant(as_text(word), known) or ';'} {say} {', '.join(known)}"


def as_text(value: Any, length: int = SHOWN_LENGTH) -> str:
    """Return `shown(value)`, but without quotes around a string.

    Use it for keys, and for values that need no quotes in a message.
    """
    return cut(printable(value), length) if isinstance(value, str) else shown(value, length)


def shown(value: Any, length: int = SHOWN_LENGTH) -> str:
    """Return the repr of any value for a message, in at most `length` printable characters and in bounded time.

    Nested containers are cut after a few entries and levels, so that a value with a billion entries
    (from YAML aliases) takes no time.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 4, length, length, length
    for container in ("maxtuple", "maxlist", "maxarray", "maxdict", "maxset", "maxfrozenset", "maxdeque"):
        setattr(short, container, 8)
    try:
        text = printable(short.repr(value))
    except Exception:  # a number with too many digits, or a __repr__ that fails
        text = f"<{type(value).__name__}>"
    return cut(text, length)
