"""Colours that a file states by numbers: PNG's gAMA, cHRM and cICP, Adobe RGB in EXIF, AVIF's and video's primaries."""

from __future__ import annotations

import gc
import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, features

from lumos.video.av_picture import displayed
from lumos.video.colour import ADOBE_RGB, D65, PRIMARIES, SRGB, matrix_profile
from lumos.video.frames import as_uint8, picture_rgb
from lumos.video.reading import read_image, read_video

GIVEN = (180, 90, 60)
DISPLAY_P3, BT2020, BT709 = 12, 9, 1
SRGB_CURVE, LINEAR = 13, 8


def light(places) -> np.ndarray:
    """The matrix from linear RGB to XYZ."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in places]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def in_srgb(rgb: tuple[int, ...], places, exponent: float | None = None) -> np.ndarray:
    """The slow twin: the same colour in sRGB, for primaries of the same white."""
    values = np.array(rgb) / 255
    curve = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = curve if exponent is None else values**exponent
    linear = (np.linalg.inv(light(SRGB)) @ light(places) @ linear).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def near(found: np.ndarray, expected: np.ndarray, most: float = 1.5) -> bool:
    return bool(np.abs(found.reshape(-1, 3).astype(float) - expected).max() <= most)


@pytest.mark.parametrize("exponent", [None, 1.0, 1.8, 563 / 256])
@pytest.mark.parametrize("places", [SRGB, ADOBE_RGB, PRIMARIES[DISPLAY_P3], PRIMARIES[BT2020]])
def test_a_profile_of_numbers_converts_as_the_formula(places, exponent):
    picture = Image.new("RGB", (2, 2), GIVEN)
    picture.info["icc_profile"] = matrix_profile(places, exponent)
    assert near(picture_rgb(picture), in_srgb(GIVEN, places, exponent))


def test_another_white_stays_white():
    picture = Image.new("RGB", (2, 2), (255, 255, 255))
    picture.info["icc_profile"] = matrix_profile(PRIMARIES[11], None)
    assert near(picture_rgb(picture), np.array([255, 255, 255]))
    assert matrix_profile((D65, D65, D65, D65), None) is None


def png(path: Path, *chunks: tuple[bytes, bytes], **options) -> Path:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), GIVEN).save(data, "PNG", **options)
    body = b"".join(struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    path.write_bytes(data.getvalue()[:33] + body + data.getvalue()[33:])
    return path


def gamma(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(100_000 * value))


def points(places) -> tuple[bytes, bytes]:
    red, green, blue, white = places
    return b"cHRM", struct.pack(">8I", *(round(100_000 * value) for point in (white, red, green, blue) for value in point))


P3_CHUNK, SRGB_CHUNK = (b"cICP", bytes([DISPLAY_P3, SRGB_CURVE, 0, 1])), (b"sRGB", b"\0")


@pytest.mark.parametrize(
    ("chunks", "places", "exponent"),
    [
        ([gamma(1)], SRGB, 1.0),
        ([gamma(1 / 2.2)], SRGB, None),
        ([gamma(0)], SRGB, None),
        ([gamma(1 / 2.2), points(SRGB)], SRGB, None),
        ([gamma(1 / 2.2), points(PRIMARIES[DISPLAY_P3])], PRIMARIES[DISPLAY_P3], None),
        ([gamma(1), points(PRIMARIES[DISPLAY_P3])], PRIMARIES[DISPLAY_P3], 1.0),
        ([SRGB_CHUNK, gamma(1), points(PRIMARIES[DISPLAY_P3])], SRGB, None),
        ([P3_CHUNK], PRIMARIES[DISPLAY_P3], None),
        ([P3_CHUNK, SRGB_CHUNK, gamma(1)], PRIMARIES[DISPLAY_P3], None),
        ([(b"cICP", bytes([BT709, SRGB_CURVE, 0, 1])), gamma(1)], SRGB, None),
    ],
)
def test_the_colours_that_a_png_states(tmp_path, chunks, places, exponent):
    path = png(tmp_path / "a.png", *chunks)
    expected = in_srgb(GIVEN, places, exponent)
    assert near(read_image(path), expected)
    assert near(read_video(path)[0], expected)
    if chunks[0][0] != b"cICP":  # Pillow does not pass it on
        assert near(as_uint8(Image.open(path), ndim=3), expected)


def test_codes_of_a_png_come_before_its_profile(tmp_path):
    linear = matrix_profile(SRGB, 1.0)
    assert near(read_image(png(tmp_path / "a.png", icc_profile=linear)), in_srgb(GIVEN, SRGB, 1.0))
    assert near(read_image(png(tmp_path / "a.png", P3_CHUNK, icc_profile=linear)), in_srgb(GIVEN, PRIMARIES[DISPLAY_P3]))


@pytest.mark.parametrize(("index", "places", "exponent"), [("R03", ADOBE_RGB, 563 / 256), ("R98", SRGB, None)])
def test_cameras_state_adobe_rgb_in_exif(tmp_path, index, places, exponent):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 0xFFFF, 0xA005: {1: index}})
    Image.new("RGB", (16, 16), GIVEN).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    for found in (read_image(tmp_path / "a.jpg"), as_uint8(Image.open(tmp_path / "a.jpg"), ndim=3)):
        assert near(found, in_srgb(GIVEN, places, exponent), 2.5)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("frames", [1, 3])
def test_the_primaries_of_an_avif(tmp_path, frames):
    data = io.BytesIO()
    first, *others = [Image.new("RGB", (32, 32), GIVEN)] * frames
    first.save(data, "AVIF", quality=100, subsampling="4:4:4", save_all=frames > 1, append_images=others)
    (tmp_path / "a.avif").write_bytes(data.getvalue().replace(b"nclx\0\1", b"nclx\0" + bytes([DISPLAY_P3])))
    assert near(read_video(tmp_path / "a.avif")[0], in_srgb(GIVEN, PRIMARIES[DISPLAY_P3]), 3)


@pytest.mark.parametrize(
    ("primaries", "transfer", "places", "exponent"),
    [
        (BT709, 1, SRGB, None), (5, 1, SRGB, None), (DISPLAY_P3, 1, PRIMARIES[DISPLAY_P3], None),
        (BT2020, 14, PRIMARIES[BT2020], None), (BT709, LINEAR, SRGB, 1.0),
    ],
)  # fmt: skip
def test_the_primaries_of_a_film(tmp_path, primaries, transfer, places, exponent):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), GIVEN, np.uint8), format="rgb24").reformat(format="yuv444p")
        for place in (stream.codec_context, frame):
            place.color_primaries, place.color_trc, place.colorspace = primaries, transfer, 6
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert near(read_video(tmp_path / "a.mp4")[0], in_srgb(GIVEN, places, exponent), 4)


def film_of_pictures(path: Path, kind: str, codec: str, **options) -> Path:
    data, picture = io.BytesIO(), Image.new("RGB", (32, 32), GIVEN)
    if kind == "PNG":
        picture.putpixel((0, 0), (9, 9, 9))
    picture.save(data, kind, icc_profile=matrix_profile(SRGB, 1.0), **options)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24" if kind == "PNG" else "yuvj444p"
        container.start_encoding()
        for number in range(3):
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            container.mux(packet)
    return path


def test_the_profile_of_the_pictures_of_a_film(tmp_path):
    path = film_of_pictures(tmp_path / "a.mov", "JPEG", "mjpeg", quality=100, subsampling=0)
    assert near(read_video(path)[0], in_srgb(GIVEN, SRGB, 1.0), 3)


@pytest.mark.parametrize("turn", [0, 90, -90, 180])
def test_a_film_of_png_with_profiles_does_not_end_the_process(tmp_path, turn):
    """PyAV frees memory twice if it is asked for the profile, which is therefore not known here."""
    path = film_of_pictures(tmp_path / "a.mov", "PNG", "png")
    data, one = bytearray(path.read_bytes()), 1 << 16
    cos, sin = round(np.cos(np.radians(turn))), round(np.sin(np.radians(turn)))
    at = data.find(b"tkhd") + 44
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    expected = np.full((32, 32, 3), GIVEN, np.uint8)
    expected[0, 0] = 9
    frames, _ = read_video(path)
    assert np.array_equal(frames, [displayed(expected, matrix)] * 3)
    del frames
    gc.collect()
