"""The frames of an animated PNG, put together as browsers do it (PNG, third edition, 4.9 and 11.3.6).

A frame covers a part of the screen, lies on what is there or takes its place, and says what becomes of that part afterwards. Pillow
makes what lies below a half transparent frame transparent too, clears to black in a file without opacity, and begins with the
hidden default picture where the screen is empty.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

NO_HURRY = 100.0
"""Milliseconds that a frame stays whose delay is 0, as in browsers."""
TO_BACKGROUND, TO_PREVIOUS = 1, 2
OVER = 1
SIGNATURE = b"\x89PNG\r\n\x1a\n"
OF_PIXELS = (b"PLTE", b"tRNS")
"""Chunks of the file that say what the pixels of each frame are. Its colours are known from the file."""


@dataclass(frozen=True)
class ApngFrame:
    """A frame as it is stored: a PNG of its own, where it lies on the screen, for how many ms, and how."""

    left: int
    top: int
    width: int
    height: int
    png: bytes
    duration: float
    disposal: int
    is_over: bool


def parts(path: Path) -> Iterator[ApngFrame]:
    """Yield the frames as they are stored. Raise OSError if the file is damaged or cut off."""
    with path.open("rb") as file:
        file.seek(len(SIGNATURE))
        head, kept, control, pixels, due = b"", b"", b"", bytearray(), 0
        while True:
            name, content = _chunk(file)
            if name in (b"fcTL", b"IEND"):
                if control and pixels:
                    due -= 1
                    yield _frame(head, kept, control, bytes(pixels))
                if name == b"IEND":
                    break
                control, pixels = content, bytearray()
            elif name == b"IHDR":
                head = content
            elif name == b"acTL":
                due = int.from_bytes(content[:4])
            elif name in OF_PIXELS:
                kept += _written(name, content)
            elif name == b"IDAT" and control:  # without a control before it, it is the hidden default picture
                pixels += content
            elif name == b"fdAT":
                pixels += content[4:]
        if due > 0:
            raise OSError(f"{due} frames are missing")


def composed(
    stored: Iterator[ApngFrame], size: tuple[int, int], rgba: Callable[[Image.Image], Image.Image]
) -> Iterator[tuple[Image.Image, float]]:  # fmt: skip
    """Yield each frame on the screen of this (width, height), as an RGBA picture, and its duration in ms.

    rgba: converts a stored frame to RGBA.
    """
    screen = Image.new("RGBA", size)
    for part in stored:
        before, place = screen, (part.left, part.top, part.left + part.width, part.top + part.height)
        with Image.open(io.BytesIO(part.png), formats=("PNG",)) as opened:
            picture = rgba(opened)
        screen = before.copy()
        if part.is_over:
            screen.alpha_composite(picture, place[:2])
        else:
            screen.paste(picture, place)
        yield screen, part.duration
        if part.disposal == TO_BACKGROUND:
            screen = screen.copy()
            screen.paste((0, 0, 0, 0), place)
        elif part.disposal == TO_PREVIOUS:
            screen = before


def _frame(head: bytes, kept: bytes, control: bytes, pixels: bytes) -> ApngFrame:
    width, height, left, top, delay, unit, disposal, blending = struct.unpack_from(">4I2H2B", control, 4)
    if left + width > int.from_bytes(head[:4]) or top + height > int.from_bytes(head[4:8]):
        raise OSError("a frame lies outside of the picture")
    png = SIGNATURE + _written(b"IHDR", control[4:12] + head[8:]) + kept + _written(b"IDAT", pixels) + _written(b"IEND", b"")
    return ApngFrame(left, top, width, height, png, 1000 * delay / (unit or 100) or NO_HURRY, disposal, blending == OVER)


def _chunk(file: io.BufferedReader) -> tuple[bytes, bytes]:
    """Read a chunk; return its name and its content."""
    length, name = struct.unpack(">I4s", _exactly(file, 8))
    content = _exactly(file, length)
    if int.from_bytes(_exactly(file, 4)) != zlib.crc32(name + content):
        raise OSError("a chunk is damaged")
    return name, content


def _exactly(file: io.BufferedReader, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise OSError("the file is cut off")
    return data


def _written(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
