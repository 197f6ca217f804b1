"""The sides of coded frames that a container hides: PixelCrop of Matroska (RFC 9559), the clean aperture of mov and mp4.

Players show neither, and FFmpeg's command cuts them off, but its library does not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from lumos.video import matroska
from lumos.video.boxes import SAMPLE_ENTRY_BYTES, boxes, inside, moov_of

UNKNOWN_UNIT = 4
"""DisplayUnit of a Matroska film whose display size says nothing of the shape of its pixels."""


@dataclass(frozen=True)
class Cropping:
    """Hidden rows and columns, and the width of a pixel by its height if that depends on them."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    aspect: Fraction | None = None

    def of(self, frame: np.ndarray) -> np.ndarray:
        """Return a frame [H, W, C] without what is hidden."""
        return frame[self.top : frame.shape[0] - self.bottom, self.left : frame.shape[1] - self.right]


NOTHING = Cropping()


def cropping_of(path: Path, form: str, number: int, width: int, height: int) -> Cropping:
    """Return what the container hides of the frames, width x height, of a stream. form: FFmpeg's name of the container."""
    if form.startswith("matroska"):
        return _checked(_of_matroska(path, number, width, height), width, height)
    if form.startswith("mov"):
        return _checked(_of_mov(path, number, width, height), width, height)
    return NOTHING


def _checked(found: Cropping, width: int, height: int) -> Cropping:
    sides = (found.top, found.bottom, found.left, found.right)
    is_sound = min(sides) >= 0 and found.top + found.bottom < height and found.left + found.right < width
    return found if any(sides) and is_sound else NOTHING


def _of_matroska(path: Path, number: int, width: int, height: int) -> Cropping:
    film = next(iter(matroska.films(path)[number : number + 1]), {})
    top, bottom, left, right = (film.get(name, 0) for name in (b"\x54\xbb", b"\x54\xaa", b"\x54\xcc", b"\x54\xdd"))
    wide, high = width - left - right, height - top - bottom
    across, down = (film.get(name) or side for name, side in ((b"\x54\xb0", wide), (b"\x54\xba", high)))  # DisplayWidth, -Height
    has_shape = film.get(b"\x54\xb2", 0) < UNKNOWN_UNIT and wide > 0 and high > 0
    return Cropping(top, bottom, left, right, Fraction(across * high, down * wide) if has_shape else None)


def _of_mov(path: Path, number: int, width: int, height: int) -> Cropping:
    for track in list(inside(moov_of(path), b"trak"))[number : number + 1]:
        for table in inside(track, b"mdia", b"minf", b"stbl", b"stsd"):
            for _, entry in boxes(table[8:]):
                for content in inside(entry[SAMPLE_ENTRY_BYTES:], b"clap"):
                    values = struct.unpack_from(">8i", content.ljust(32, b"\0"))
                    if 0 in values[1::2]:
                        continue
                    wide, high, right, down = (Fraction(*pair) for pair in zip(values[::2], values[1::2], strict=True))
                    left, top = round((width - wide) / 2 + right), round((height - high) / 2 + down)  # offsets from the middle
                    return Cropping(top, height - top - round(high), left, width - left - round(wide))
    return NOTHING
