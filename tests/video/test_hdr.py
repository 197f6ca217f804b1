"""HDR video and pictures (PQ, HLG) are refused by name, wherever they are read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, features

from lumos.data.ingest.item import HDR, problem_of
from lumos.errors import UserError
from lumos.video.frames import as_uint8
from lumos.video.hdr import HighDynamicRange, picture_transfer
from lumos.video.reading import can_read, count_frames, is_still, read_image, read_video

SRGB, PQ, HLG = 13, 16, 18
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def film(path: Path, codec: str, pix: str, transfer: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"auto-alt-ref": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, pix
        stream.codec_context.color_trc = transfer
        for level in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * level, np.uint8), format="rgb24").reformat(format=pix)
            frame.color_trc = transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
@pytest.mark.parametrize(
    ("file", "codec", "pix"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),  # its decoder knows nothing of what the container states
    ],
)
def test_hdr_video_is_refused_by_name(tmp_path, transfer, name, file, codec, pix):
    path = film(tmp_path / file, codec, pix, transfer)
    assert can_read(path)  # so that ingest names it as skipped
    with pytest.raises(HighDynamicRange, match=rf"a\.\w+ is an HDR video \({name}\).*convert it to SDR"):
        read_video(path)
    with pytest.raises(HighDynamicRange, match=name):
        read_video(path, fps=8, num_frames=1, from_end=True)


def test_video_of_other_transfers_is_read(tmp_path):
    path = film(tmp_path / "a.mp4", "libx264", "yuv420p10le", 1)
    assert len(read_video(path)[0]) == count_frames(path, 8) == 3


def avif(path: Path, transfers: dict[int, int], frames: int = 1) -> Path:
    """An AVIF whose n-th colour box states the transfer `transfers[n]`."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (32, 32), (60 * n, 0, 0)) for n in range(frames)]
    pictures[0].save(file, "AVIF", save_all=frames > 1, append_images=pictures[1:])
    data, at, number = bytearray(file.getvalue()), 0, 0
    while (at := data.find(b"colrnclx", at + 1)) > 0:
        data[at + 10 : at + 12] = struct.pack(">H", transfers.get(number, SRGB))
        number += 1
    assert number > max(transfers, default=0)
    path.write_bytes(data)
    return path


@needs_avif
@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
def test_hdr_avif_is_refused_by_name(tmp_path, transfer, name):
    path = avif(tmp_path / "a.avif", {0: transfer})
    assert is_still(path)
    assert picture_transfer(path, "AVIF") == transfer
    for read in (read_image, read_video):
        with pytest.raises(HighDynamicRange, match=rf"a.avif is an HDR picture \({name}\)"):
            read(path)
    film = avif(tmp_path / "film.avif", {1: transfer}, frames=2)  # the second box is that of the track
    assert not is_still(film)
    with pytest.raises(HighDynamicRange, match=name):
        read_video(film)


@needs_avif
def test_avif_of_other_transfers_is_read(tmp_path):
    assert read_image(avif(tmp_path / "a.avif", {})).shape == (32, 32, 3)
    assert len(read_video(avif(tmp_path / "film.avif", {}, frames=2))[0]) == 2


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def colour(transfer: int) -> bytes:
    return box(b"colr", b"nclx" + struct.pack(">HHHB", 1, transfer, 1, 128))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("primary", "expected"), [(1, None), (2, PQ)])
def test_only_the_primary_item_of_an_avif_counts(tmp_path, wide, primary, expected):
    """A picture with a gain map has an HDR rendition as a second item."""
    form, number = (">I", ">H") if wide else (">H", ">B")
    flag = 0x8000 if wide else 0x80  # essential
    places = {item: struct.pack(number, 1) + struct.pack(number, flag | place) for item, place in ((1, 2), (2, 3))}
    items = b"".join(struct.pack(form, item) + b"\2" + place for item, place in places.items())
    rules = box(b"ipma", bytes([wide, 0, 0, wide]) + struct.pack(">I", 2) + items)
    properties = box(b"ipco", box(b"ispe", bytes(12)) + colour(SRGB) + colour(PQ))
    named = box(b"pitm", (b"\1\0\0\0" if wide else bytes(4)) + struct.pack(form, primary))
    path = tmp_path / "a.avif"
    path.write_bytes(box(b"ftyp", b"avif") + box(b"meta", bytes(4) + named + box(b"iprp", properties + rules)))
    assert picture_transfer(path, "AVIF") == expected


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_damaged_avif_states_nothing(tmp_path, cut):
    whole = box(b"meta", bytes(4) + box(b"pitm", bytes(6)) + box(b"iprp", box(b"ipco", colour(PQ)) + box(b"ipma", b"\0" * 8)))
    path = tmp_path / "a.avif"
    path.write_bytes((box(b"ftyp", b"avif") + whole)[:cut])
    assert picture_transfer(path, "AVIF") is None


def png(path: Path, code: int | None) -> Path:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    data = file.getvalue()
    chunk = b"cICP" + bytes([9, code or 0, 0, 1])
    added = b"" if code is None else struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + added + data[33:])  # behind IHDR
    return path


def test_hdr_png_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a.png is an HDR picture \(PQ\)"):
        read_image(png(tmp_path / "a.png", PQ))
    assert read_image(png(tmp_path / "b.png", SRGB)).shape == read_image(png(tmp_path / "c.png", None)).shape == (4, 4, 3)


def test_hdr_is_a_reason_of_its_own_in_ingest(tmp_path):
    with pytest.raises(UserError) as caught:
        read_image(png(tmp_path / "a.png", HLG))
    assert problem_of(caught.value) == (HDR, str(caught.value))


def profile(name: str, transfer: int | None) -> bytes:
    """An ICC profile with this name and, in its tag "cicp", this transfer function."""
    text = name.encode("utf-16-be")
    tags = {b"desc": b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text}
    tags |= {} if transfer is None else {b"cicp": b"cicp" + bytes(4) + bytes([9, transfer, 0, 1])}
    table, data, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, begin + len(data), len(content))
        data += content
    size = struct.pack(">I", 128 + len(table) + len(data))
    return size + b"lcms\4\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(88) + table + data


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize(("name", "transfer", "said"), [
    ("Rec. 2100 PQ", PQ, "PQ"), ("Rec. 2100 HLG", HLG, "HLG"), ("ITUR_2100_PQ_FULL", None, "PQ"),
])  # fmt: skip
def test_an_hdr_profile_is_refused_by_name(tmp_path, suffix, name, transfer, said):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 16), "red").save(path, icc_profile=profile(name, transfer))
    for read in (read_image, read_video):
        with pytest.raises(UserError, match=rf"a.{suffix} is an HDR picture \({said}\)"):
            read(path)
    with Image.open(path) as image, pytest.raises(HighDynamicRange, match="the given picture is an HDR picture"):
        as_uint8([image])


def test_profiles_of_other_transfers_are_read(tmp_path):
    for number, given in enumerate((profile("Display P3", SRGB), profile("odd", PQ)[:140], b"\xff" * 300, b"x")):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{number}.png", icc_profile=given)
        assert read_image(tmp_path / f"{number}.png").shape == (16, 16, 3)
