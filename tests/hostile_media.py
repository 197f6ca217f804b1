"""Media whose header and data have different sizes: small files that would need gigabytes of memory."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return file.getvalue()


def lying_avi(path: Path, width: int, height: int, at: int) -> Path:
    """Write a clip of nine frames that states 64 x 64 pixels; the frame with number `at` has another size."""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        container.start_encoding()
        for number in range(9):
            packet = av.Packet(jpeg(width, height) if number == at else jpeg(64, 64))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            container.mux(packet)
    return path


def growing_gif(path: Path, side: int) -> Path:
    """A screen of 64 x 64 pixels, whose second frame is side x side."""

    def frame(side: int) -> bytes:
        return b"!\xf9\x04\x00\x0a\0\0\0" + b"," + struct.pack("<4H", 0, 0, side, side) + b"\0\x02\x02\x4c\x01\0"

    path.write_bytes(b"GIF89a" + struct.pack("<HH", 64, 64) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame(1) + frame(side) + b";")
    return path


def wide_webp(path: Path, side: int) -> Path:
    """An animation whose frames have 16 x 16 pixels on a canvas of side x side."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "WEBP", lossless=True)
    chunk = lambda name, data: name + struct.pack("<I", len(data)) + data  # noqa: E731
    three = lambda number: number.to_bytes(3, "little")  # noqa: E731
    frame = three(0) * 2 + three(15) * 2 + three(100) + b"\0" + file.getvalue()[12:]
    canvas = chunk(b"VP8X", bytes([2, 0, 0, 0]) + three(side - 1) * 2)
    path.write_bytes(chunk(b"RIFF", b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + 2 * chunk(b"ANMF", frame)))
    return path


def tiled_tiff(path: Path, side: int) -> Path:
    """A picture of 64 x 64 pixels in one tile of side x side."""
    data = zlib.compress(bytes(100))
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path
