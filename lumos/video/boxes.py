"""The boxes of files such as mp4, AVIF and HEIF (ISO/IEC 14496-12), of which a file and many boxes consist."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_BOX_BYTES = 2**24
"""Largest number of bytes of a box that are read. Boxes without pixels have kilobytes, in an hour of film some megabytes."""


def top_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the name and the number of content bytes of each box of a file, which stands at the content then."""
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        size -= 8
        if size == 1 - 8:
            size = int.from_bytes(file.read(8)) - 16
        if size < 0:  # 0 - 8: the box goes on to the end of the file
            return
        after = file.tell() + size
        yield name, size
        file.seek(after)


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the content of each box in data."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield name, data[at + 8 : at + size]
        at += size


def inside(data: bytes, *names: bytes) -> Iterator[bytes]:
    """Yield the content of each box at a path of names in data."""
    if not names:
        yield data
        return
    for name, content in boxes(data):
        if name == names[0]:
            yield from inside(content, *names[1:])


def most_edits(path: str | Path) -> int:
    """Return the largest number of pieces of its film that an edit list of a video track of an mp4 or mov file shows.

    Edits that show nothing are not counted. 1 also stands for a track without an edit list.
    """
    with open(path, "rb") as file:
        moov = next((file.read(min(size, MAX_BOX_BYTES)) for name, size in top_boxes(file) if name == b"moov"), b"")
    films = (track for track in inside(moov, b"trak") if b"vide" in {box[8:12] for box in inside(track, b"mdia", b"hdlr")})
    return max((pieces(box) for track in films for box in inside(track, b"edts", b"elst")), default=1)


def pieces(edit_list: bytes) -> int:
    """Return the number of edits of a box "elst" that show a piece of the film; an empty edit has the media time -1."""
    form = struct.Struct(">Qq4x" if edit_list[:1] == b"\1" else ">Ii4x")
    count = min(int.from_bytes(edit_list[4:8]), (len(edit_list) - 8) // form.size)
    return sum(form.unpack_from(edit_list, 8 + number * form.size)[1] >= 0 for number in range(count))
