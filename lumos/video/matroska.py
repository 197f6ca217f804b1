"""What a Matroska or WebM file states of its size and its films (RFC 8794, RFC 9559)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HEADER, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
TRACKS, CLUSTER, TRACK, FILM = b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75", b"\xae", b"\xe0"
MAX_TRACKS_BYTES = 2**24
"""Largest number of bytes of the descriptions of all tracks that are read."""


def stated_bytes(path: str | Path) -> int | None:
    """Return the number of bytes up to the end of the segment, which holds the film; None if the file does not state it.

    A file that was written while it was sent, or whose recording broke off, states none.
    """
    with open(path, "rb") as file:
        segment = _to_segment(file)
        return None if segment is None else file.tell() + segment


def films(path: str | Path) -> list[dict[bytes, int]]:
    """Return for each track the numbers that the file states of its film, by their names; {} for other tracks, such as sound."""
    with open(path, "rb") as file:
        _to_segment(file)
        for name, size in _elements(file):
            if name == TRACKS:
                tracks = _entries(file.read(min(size, MAX_TRACKS_BYTES)))
                described = (dict(_entries(track)).get(FILM, b"") for name, track in tracks if name == TRACK)
                return [{name: int.from_bytes(value) for name, value in _entries(film)} for film in described]
            if name == CLUSTER:
                break
            file.seek(size, 1)
    return []


def _to_segment(file: BinaryIO) -> int | None:
    """Read up to the content of the segment and return its size; None if it is unknown or there is none."""
    if file.read(4) != HEADER or (header := _size(file)) is None:
        return None
    file.seek(header, 1)
    return _size(file) if file.read(4) == SEGMENT else None


def _elements(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the name and the size of each element from here on; the file then stands at its content."""
    while (first := file.read(1)) and first[0]:
        name = first + file.read(8 - first[0].bit_length())
        if (size := _size(file)) is None:
            return
        yield name, size


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    file = io.BytesIO(data)
    for name, size in _elements(file):
        yield name, file.read(size)


def _size(file: BinaryIO) -> int | None:
    """Read the size of an element: the zero bits before the first one say how many bytes follow. None if it is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value, bits = int.from_bytes(first + file.read(more)), 7 * (more + 1)
    value &= (1 << bits) - 1
    return None if value == (1 << bits) - 1 else value
