"""The size that a Matroska or WebM file states (RFC 8794, RFC 9559)."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

HEADER, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def stated_bytes(path: str | Path) -> int | None:
    """Return the number of bytes up to the end of the segment, which holds the film; None if the file does not state it.

    A file that was written while it was sent, or whose recording broke off, states none.
    """
    with open(path, "rb") as file:
        if file.read(4) != HEADER or (header := _size(file)) is None:
            return None
        file.seek(header, 1)
        if file.read(4) != SEGMENT or (segment := _size(file)) is None:
            return None
        return file.tell() + segment


def _size(file: BinaryIO) -> int | None:
    """Read the size of an element: the zero bits before the first one say how many bytes follow. None if it is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value, bits = int.from_bytes(first + file.read(more)), 7 * (more + 1)
    value &= (1 << bits) - 1
    return None if value == (1 << bits) - 1 else value
