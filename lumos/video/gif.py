"""The frames of a GIF, put together as browsers do it.

A frame covers a part of the screen and says what becomes of that part afterwards. "Restore to background" makes it transparent,
which Pillow does only where the picture is transparent already, and FFmpeg only in files with a transparent colour.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

KEPT_SHORT, SHORT = 10, 100
"""A frame that is to stay for at most 10 ms stays for 100, as in browsers: old programs wrote such delays for "no hurry"."""
TO_BACKGROUND, TO_PREVIOUS = 2, 3
_IMAGE, _EXTENSION, _END, _CONTROL = 0x2C, 0x21, 0x3B, 0xF9


@dataclass(frozen=True)
class GifFrame:
    """A frame as it is stored: a GIF of its own, where it lies on the screen, for how long, and what becomes of it."""

    left: int
    top: int
    width: int
    height: int
    gif: bytes
    duration: int
    disposal: int


def screen_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) of the screen, or those of the first frame if it does not fit."""
    first = next(parts(path), None)
    with path.open("rb") as file:
        width, height = struct.unpack("<HH", file.read(10)[6:])
    return (max(width, first.left + first.width), max(height, first.top + first.height)) if first else (width, height)


def parts(path: Path) -> Iterator[GifFrame]:
    """Yield the frames as they are stored. Raise OSError if the file is cut off."""
    with path.open("rb") as file:
        head = _exactly(file, 13)
        colours = _colours(file, head[10])
        control = bytes(4)
        while (mark := _exactly(file, 1)[0]) != _END:
            if mark == _EXTENSION:
                name = _exactly(file, 1)[0]
                content = _blocks(file)
                if name == _CONTROL:
                    control = content[1:5]
            elif mark == _IMAGE:
                left, top, width, height, flags = struct.unpack("<4HB", _exactly(file, 9))
                data = bytes([flags]) + _colours(file, flags) + _exactly(file, 1) + _blocks(file)
                extension = bytes([_EXTENSION, _CONTROL, 4]) + control + b"\0"
                gif = b"GIF89a" + struct.pack("<HH", width, height) + head[10:] + colours + extension
                gif += struct.pack("<B4H", _IMAGE, 0, 0, width, height) + data + bytes([_END])
                delay = 10 * int.from_bytes(control[1:3], "little")
                yield GifFrame(left, top, width, height, gif, SHORT if delay <= KEPT_SHORT else delay, control[0] >> 2 & 7)
                control = bytes(4)
            else:
                return  # bytes behind the end, as Pillow and browsers take them


def composed(stored: Iterator[GifFrame], size: tuple[int, int]) -> Iterator[tuple[Image.Image, int]]:
    """Yield each frame on the screen of this (width, height), as an RGBA picture, and its duration in ms."""
    screen = Image.new("RGBA", size)
    for part in stored:
        before = screen
        if part.width and part.height:
            with Image.open(io.BytesIO(part.gif), formats=("GIF",)) as opened:
                picture = opened.convert("RGBA")
            screen = before.copy()
            screen.paste(picture, (part.left, part.top), picture)  # opacity is none or all
        yield screen, part.duration
        if part.disposal == TO_BACKGROUND:
            screen = screen.copy()
            screen.paste((0, 0, 0, 0), (part.left, part.top, part.left + part.width, part.top + part.height))
        elif part.disposal == TO_PREVIOUS:
            screen = before


def _exactly(file: io.BufferedReader, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise OSError("the file is cut off")
    return data


def _colours(file: io.BufferedReader, flags: int) -> bytes:
    return _exactly(file, 3 << (flags & 7) + 1) if flags & 0x80 else b""


def _blocks(file: io.BufferedReader) -> bytes:
    """Read blocks up to the empty one; return them with their lengths."""
    read = bytearray()
    while True:
        length = _exactly(file, 1)
        read += length
        if not length[0]:
            return bytes(read)
        read += _exactly(file, length[0])
