"""The boxes of files such as mp4, AVIF and HEIF (ISO/IEC 14496-12), of which a file and many boxes consist."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_BOX_BYTES = 2**24
"""Largest number of bytes of a box that are read. Boxes without pixels have kilobytes, in an hour of film some megabytes."""

SAMPLE_ENTRY_BYTES = 78
"""Bytes of a VisualSampleEntry before its boxes (ISO/IEC 14496-12, 12.1.3)."""


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


def moov_of(path: str | Path) -> bytes:
    """Return the content of the box "moov" of an mp4 or mov file, which describes its tracks; empty without one."""
    with open(path, "rb") as file:
        return next((file.read(min(size, MAX_BOX_BYTES)) for name, size in top_boxes(file) if name == b"moov"), b"")


@dataclass(frozen=True)
class Edit:
    """An entry of an edit list: whether it shows a piece of the film, and whether at the speed at which it was recorded."""

    is_shown: bool
    is_usual_speed: bool


def edit_lists(path: str | Path) -> list[list[Edit]]:
    """Return the edit list of each video track of an mp4 or mov file that has one."""
    films = (track for track in inside(moov_of(path), b"trak") if b"vide" in {box[8:12] for box in inside(track, b"mdia", b"hdlr")})
    return [edits(box) for track in films for box in inside(track, b"edts", b"elst")]


def edits(box: bytes) -> list[Edit]:
    """Return the entries of a box "elst". One that shows nothing has the media time -1, and the usual rate is 1 as 16.16."""
    form = struct.Struct(">Qqi" if box[:1] == b"\1" else ">Iii")
    count = min(int.from_bytes(box[4:8]), (len(box) - 8) // form.size)
    entries = (form.unpack_from(box, 8 + number * form.size) for number in range(count))
    return [Edit(time >= 0, rate == 1 << 16) for _, time, rate in entries]
