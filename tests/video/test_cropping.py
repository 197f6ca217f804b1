"""Sides of coded frames that a container hides, as players show them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from lumos.video import matroska
from lumos.video.reading import read_video

TOP, BOTTOM, LEFT, RIGHT = 8, 4, 16, 12
NAMES = {
    "top": b"\x54\xbb", "bottom": b"\x54\xaa", "left": b"\x54\xcc", "right": b"\x54\xdd", "wide": b"\x54\xb0", "high": b"\x54\xba",
    "unit": b"\x54\xb2",
}  # fmt: skip
CHECKSUM = b"\xbf"
SIDES = {"top": TOP, "bottom": BOTTOM, "left": LEFT, "right": RIGHT}
SHOWN = (96 - TOP - BOTTOM, 128 - LEFT - RIGHT)


def film(path: Path, turned: int = 0, **options: str) -> bytes:
    """A film of 128 x 96, black but for the part that is to be shown. It is the second track, behind sound."""
    with av.open(str(path), "w", options=options) as container:
        container.add_stream("aac", rate=48000).layout = "mono"
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        frame = np.zeros((96, 128, 3), np.uint8)
        frame[TOP : 96 - BOTTOM, LEFT : 128 - RIGHT] = 200
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path.read_bytes()


def in_matroska(path: Path, **told: int) -> Path:
    """A film whose description states these numbers. It is written as if it were sent, with no places that would have to change."""
    content = film(path, live="1")

    def sized(name: bytes, data: bytes) -> bytes:
        return b"" if name == CHECKSUM else name + (len(data) | 1 << 28).to_bytes(4) + data

    def described(name: bytes, data: bytes) -> bytes:
        if name == matroska.TRACK:
            return b"".join(sized(*entry) for entry in ((name, described(name, data)) for name, data in matroska._entries(data)))
        if name == matroska.FILM:
            kept = b"".join(sized(*entry) for entry in matroska._entries(data) if entry[0] not in NAMES.values())
            return kept + b"".join(sized(NAMES[name], number.to_bytes(2)) for name, number in told.items())
        return data

    file = io.BytesIO(content)
    file.seek(at := content.rindex(matroska.TRACKS))
    _, size = next(matroska._elements(file))
    tracks = b"".join(sized(name, described(name, data)) for name, data in matroska._entries(file.read(size)))
    path.write_bytes(content[:at] + sized(matroska.TRACKS, tracks) + file.read())
    return path


def in_mov(path: Path, turned: int = 0) -> Path:
    """A film with a clean aperture: its size, and how far its middle is from that of the frame."""
    content = bytearray(film(path, turned))
    right, down = LEFT - RIGHT, TOP - BOTTOM
    box = struct.pack(">I4s8i", 40, b"clap", SHOWN[1], 1, SHOWN[0], 1, right, 2, down, 2)
    at = content.rfind(b"avc1")
    at = content.index(b"avcC", at) - 4
    content[at:at] = box
    for name in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        place = content.rfind(name, 0, at) - 4
        content[place : place + 4] = (int.from_bytes(content[place : place + 4]) + len(box)).to_bytes(4)
    path.write_bytes(content)
    return path


def is_shown_part(frame: np.ndarray) -> bool:
    return bool((np.abs(frame[2:-2, 2:-2].astype(int) - 200) < 8).all())


@pytest.mark.parametrize(
    ("display", "width"),
    [({}, SHOWN[1]), ({"wide": SHOWN[1], "high": SHOWN[0]}, SHOWN[1]), ({"wide": 400, "high": 168, "unit": 0}, 200)],
)
def test_hidden_sides_of_matroska_are_cut_off(tmp_path, display, width):
    """The size of the display is that of what is shown, so that a film whose sides stay would be distorted too."""
    frame = read_video(in_matroska(tmp_path / "a.mkv", **SIDES, **display))[0][0]
    assert frame.shape == (SHOWN[0], width, 3)
    assert is_shown_part(frame)


@pytest.mark.parametrize("turned", [0, 90])
def test_what_is_outside_of_a_clean_aperture_is_cut_off(tmp_path, turned):
    frame = read_video(in_mov(tmp_path / "a.mov", turned))[0][0]
    assert frame.shape[:2] == (SHOWN[::-1] if turned else SHOWN)
    assert is_shown_part(frame)


def test_films_without_hidden_sides_are_whole(tmp_path):
    assert read_video(in_matroska(tmp_path / "a.mkv", wide=256, high=96, unit=0))[0].shape == (3, 96, 256, 3)
    film(tmp_path / "a.mov")
    assert read_video(tmp_path / "a.mov")[0].shape == (3, 96, 128, 3)


@pytest.mark.parametrize("values", [(200, 1, 84, 1, 0, 1, 0, 1), (100, 1, 84, 1, 90, 1, 0, 1), (100, 0, 84, 1, 0, 1, 0, 1)])
def test_an_aperture_outside_of_the_frame_does_not_count(tmp_path, values):
    content = in_mov(tmp_path / "a.mov").read_bytes()
    at = content.index(b"clap") + 4
    (tmp_path / "a.mov").write_bytes(content[:at] + struct.pack(">8i", *values) + content[at + 32 :])
    assert read_video(tmp_path / "a.mov")[0].shape == (3, 96, 128, 3)
