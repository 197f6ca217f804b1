"""Animated pictures whose frames cover a part of the screen, are taken away again, or are cut off."""

from __future__ import annotations

import struct
import zlib
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


SOURCE, OVER = 0, 1
HALF_BLUE = (127, 127, 255)  # on white
OPAQUE, CLEARED, PREVIOUS = 0, 1, 2
STORED = {0: lambda c: c[1:2], 2: lambda c: c[:3], 6: lambda c: c}  # what is stored of a colour, by the type of a PNG


def apng(path: Path, colour_type: int, frames: list[tuple], hidden: tuple | None = None, delay: tuple = (1, 10)) -> Path:
    """An animated PNG of 16 x 16; frames: (left, top, width, height, colour of four levels, disposal, blending)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def pixels(width: int, height: int, colour: tuple) -> bytes:
        return zlib.compress((b"\0" + bytes(STORED[colour_type](colour)) * width) * height)

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, colour_type, 0, 0, 0))
    data += chunk(b"acTL", struct.pack(">II", len(frames), 0))
    if hidden:
        data += chunk(b"IDAT", pixels(16, 16, hidden))
    number = 0
    for n, (left, top, width, height, colour, disposal, blending) in enumerate(frames):
        data += chunk(b"fcTL", struct.pack(">5I2H2B", number, width, height, left, top, *delay, disposal, blending))
        is_first = n == 0 and not hidden
        number += 1 if is_first else 2
        stored = pixels(width, height, colour)
        data += chunk(b"IDAT", stored) if is_first else chunk(b"fdAT", struct.pack(">I", number - 1) + stored)
    path.write_bytes(data + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("colour_type", [0, 2, 6])
@pytest.mark.parametrize(("disposal", "left"), [(OPAQUE, BLUE), (PREVIOUS, RED), (CLEARED, WHITE)])
def test_what_becomes_of_a_frame_of_an_apng(tmp_path, colour_type, disposal, left):
    """What is cleared is transparent, also in a file without opacity."""
    red, blue, green = ((*colour, 255) for colour in (RED, BLUE, GREEN))
    parts = [(0, 0, 16, 16, red, OPAQUE, SOURCE), (4, 4, 4, 4, blue, disposal, SOURCE), (10, 10, 4, 4, green, OPAQUE, OVER)]
    path = apng(tmp_path / "a.png", colour_type, parts)
    grey = {RED: (0,) * 3, BLUE: (0,) * 3, GREEN: (255,) * 3, WHITE: (255,) * 3}
    shown = [[RED] * 3, [RED, BLUE, RED], [RED, left, GREEN]]
    expected = shown if colour_type else [[grey[colour] for colour in frame] for frame in shown]
    frames, rate = read_video(path)
    assert [colours(frame) for frame in frames] == expected
    assert (rate, count_frames(path, 10)) == (pytest.approx(10), 3)


@pytest.mark.parametrize(
    ("cleared", "blending", "seen"),
    [(False, OVER, (127, 0, 128)), (False, SOURCE, HALF_BLUE), (True, OVER, HALF_BLUE), (True, SOURCE, HALF_BLUE)],
)
def test_half_transparent_frames_of_an_apng(tmp_path, cleared, blending, seen):
    """On red it is mixed with red, if it does not take its place; on nothing it is mixed with the white ground."""
    first = (0, 0, 16, 16, (*RED, 255), CLEARED if cleared else OPAQUE, SOURCE)
    path = apng(tmp_path / "a.png", 6, [first, (4, 4, 4, 4, (*BLUE, 128), OPAQUE, blending)])
    ground = WHITE if cleared else RED
    assert [colours(frame) for frame in read_video(path)[0]] == [[RED] * 3, [ground, seen, ground]]


def test_a_hidden_picture_is_not_below_the_first_frame(tmp_path):
    path = apng(tmp_path / "a.png", 6, [(4, 4, 4, 4, (*BLUE, 255), PREVIOUS, OVER)] * 2, hidden=(*GREEN, 255))
    assert [colours(frame) for frame in read_video(path)[0]] == [[WHITE, BLUE, WHITE]] * 2
    assert colours(read_image(path)) == [WHITE, BLUE, WHITE]


@pytest.mark.parametrize(("delay", "rate"), [((20, 0), 5), ((0, 10), 10), ((1, 25), 25)])
def test_delays_of_an_apng(tmp_path, delay, rate):
    path = apng(tmp_path / "a.png", 2, [(0, 0, 16, 16, (*RED, 255), OPAQUE, SOURCE)] * 3, delay=delay)
    assert read_video(path)[1] == pytest.approx(rate)


def test_an_apng_with_a_damaged_frame_is_refused(tmp_path):
    first = (0, 0, 16, 16, (*RED, 255), OPAQUE, SOURCE)
    path = apng(tmp_path / "a.png", 2, [first, (4, 4, 4, 4, (*BLUE, 255), OPAQUE, SOURCE)])
    whole = bytearray(path.read_bytes())
    whole[whole.rfind(b"fdAT") + 12] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="a chunk is damaged"):
        read_video(path)
    outside = apng(tmp_path / "b.png", 2, [first, (14, 4, 4, 4, (*BLUE, 255), OPAQUE, SOURCE)])
    with pytest.raises(UserError, match="a frame lies outside of the picture"):
        read_video(outside)


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
