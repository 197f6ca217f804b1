"""Animated pictures whose frames cover a part of the screen, are taken away again, or are cut off."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from lumos.errors import UserError
from lumos.video.reading import count_frames, read_image, read_video

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOURS = bytes((*RED, *BLUE, *GREEN, 7, 7, 7))
KEEP, CLEAR, BEFORE = 1, 2, 3
PLACES = ((0, 0), (5, 5), (12, 12))


def gif(path: Path, frames: list[tuple], delay: int = 10) -> Path:
    """A GIF of 16 x 16; frames: (left, top, width, height, number of the colour, transparent number or None, disposal)."""
    data = b"GIF89a" + struct.pack("<HH", 16, 16) + bytes([0x81, 0, 0]) + COLOURS
    for left, top, width, height, colour, clear, disposal in frames:
        data += b"\x21\xf9\x04" + bytes([disposal << 2 | (clear is not None)]) + struct.pack("<H", delay) + bytes([clear or 0, 0])
        data += b"\x2c" + struct.pack("<4H", left, top, width, height) + b"\0\2"
        bits = "".join(f"{code:03b}"[::-1] for n in range(width * height) for code in ((4, colour) if n % 2 == 0 else (colour,)))
        bits += "101"  # codes of three bits, with a clear code (4) before each pair, and the end (5)
        packed = bytes(int(bits[n : n + 8][::-1], 2) for n in range(0, len(bits), 8))
        for n in range(0, len(packed), 255):
            data += bytes([len(packed[n : n + 255])]) + packed[n : n + 255]
        data += b"\0"
    path.write_bytes(data + b";")
    return path


def colours(frame: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, frame[place])) for place in PLACES]


@pytest.mark.parametrize("clear", [None, 3])
@pytest.mark.parametrize(
    ("disposal", "second", "third"),
    [
        (KEEP, [RED, BLUE, RED], [RED, BLUE, GREEN]),
        (BEFORE, [RED, BLUE, RED], [RED, RED, GREEN]),
        (CLEAR, [RED, BLUE, RED], [RED, WHITE, GREEN]),
    ],
)
def test_what_becomes_of_a_frame_of_a_gif(tmp_path, clear, disposal, second, third):
    """As in browsers, what is cleared is transparent, even in a file without a transparent colour."""
    parts = [(0, 0, 16, 16, 0, clear, KEEP), (4, 4, 4, 4, 1, clear, disposal), (10, 10, 4, 4, 2, clear, KEEP)]
    path = gif(tmp_path / "a.gif", parts)
    frames, rate = read_video(path)
    assert [colours(frame) for frame in frames] == [[RED] * 3, second, third]
    assert (len(frames), rate) == (count_frames(path, 10), pytest.approx(10))


def test_what_no_frame_of_a_gif_covers_is_white(tmp_path):
    path = gif(tmp_path / "a.gif", [(4, 4, 4, 4, 1, None, KEEP), (10, 10, 4, 4, 2, None, KEEP)])
    assert [colours(frame) for frame in read_video(path)[0]] == [[WHITE, BLUE, WHITE], [WHITE, BLUE, GREEN]]
    assert colours(read_image(path)) == [WHITE, BLUE, WHITE]


@pytest.mark.parametrize(("delay", "shown"), [(0, 100), (1, 100), (2, 20), (10, 100)])
def test_delays_of_a_gif_are_those_of_browsers(tmp_path, delay, shown):
    path = gif(tmp_path / "a.gif", [(0, 0, 16, 16, n, None, KEEP) for n in (0, 1, 2)], delay)
    assert read_video(path)[1] == pytest.approx(1000 / shown)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {"disposal": 1})])
def test_frames_that_are_opaque_only_at_first(tmp_path, kind, options):
    """The header of such a WebP says that no frame is transparent, which its screen is."""
    first, second, third = (Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(3))
    first.paste(RED, (0, 0, 16, 16))
    second.paste(BLUE, (4, 4, 8, 8))
    third.paste(GREEN, (10, 10, 14, 14))
    first.save(tmp_path / "a", kind, save_all=True, append_images=[second, third], duration=100, **options)
    frames = read_video(tmp_path / "a")[0]
    assert [colours(frame) for frame in frames] == [[RED] * 3, [WHITE, BLUE, WHITE], [WHITE, WHITE, GREEN]]


KINDS = ["GIF", "WEBP", "PNG", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_an_animation_that_is_cut_off_is_refused(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    path = tmp_path / f"a.{kind.lower()}"
    first.save(path, kind, save_all=True, append_images=others, duration=100)
    assert len(read_video(path)[0]) == 6
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for read in (read_video, lambda path: count_frames(path, 10)):
        with pytest.raises(UserError, match=r"(damaged|cut off).*copy it again"):
            read(path)
