"""Grey pictures whose levels are not those of 8 bits: ink for light, 16 and 32 bits, floats."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lumos.errors import UserError
from lumos.video.frames import as_uint8
from lumos.video.reading import read_image, read_video

LEVELS = np.array([[0, 60], [200, 255]], np.uint8)
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1


def tiff(path: Path, levels: np.ndarray, photometric: int) -> Path:
    """A TIFF of one strip of grey levels."""
    data, (height, width) = levels.tobytes(), levels.shape
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    tags = [(256, width), (257, height), (258, 8 * levels.itemsize), (259, 1), (262, photometric), (273, 0), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, kind)]
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, at if tag == 273 else value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)
    return path


@pytest.mark.parametrize("levels", [LEVELS, LEVELS.astype(np.uint16) * 257, LEVELS.astype(np.float32) / 255])
def test_levels_of_ink_are_turned_to_levels_of_light(tmp_path, levels):
    """Pillow does it for 8 bits only."""
    for photometric, expected in ((WHITE_IS_ZERO, 255 - LEVELS), (BLACK_IS_ZERO, LEVELS)):
        path = tiff(tmp_path / "a.tif", levels, photometric)
        from_pil = as_uint8(Image.open(path), ndim=3), as_uint8([Image.open(path)])[0]
        for found in (read_image(path), read_video(path)[0][0], *from_pil):
            assert found[..., 0].tolist() == expected.tolist()


def test_white_of_twelve_bits_is_white(tmp_path):
    """Pillow reads them into 16 bits without scaling them."""
    path = tiff(tmp_path / "a.tif", np.frombuffer(bytes([0xFF, 0xF8, 0x00]), np.uint8)[None], BLACK_IS_ZERO)  # 4095 and 2048
    found = bytearray(path.read_bytes())
    for tag, value in ((256, 2), (258, 12)):
        at = found.find(struct.pack("<HHI", tag, 4, 1)) + 8
        found[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(found)
    for levels in (read_image(path), read_video(path)[0][0], as_uint8(Image.open(path), ndim=3)):
        assert levels[..., 0].tolist() == [[255, 128]]


@pytest.mark.parametrize("white", [1023, 65535])
def test_a_dark_picture_of_stated_depth_stays_dark(tmp_path, white):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 %d\n" % white + struct.pack(">2H", 0, white // 256))
    for levels in (read_image(tmp_path / "a.pgm"), as_uint8(Image.open(tmp_path / "a.pgm"), ndim=3)):
        assert levels[..., 0].tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_eight_bits_in_a_picture_of_32_bits_keep_their_levels(mode):
    assert as_uint8(Image.fromarray(LEVELS).convert(mode), ndim=3)[..., 0].tolist() == LEVELS.tolist()


def test_sixteen_bits_in_a_picture_of_32_bits_are_scaled(tmp_path):
    deep = LEVELS.astype(np.int32) * 257
    assert as_uint8(Image.fromarray(deep), ndim=3)[..., 0].tolist() == LEVELS.tolist()


@pytest.mark.parametrize(
    "levels",
    [
        np.array([[-5, 200]], np.int32), np.array([[0, 2**31 - 1]], np.int32), np.array([[np.nan, 0.5]], np.float32),
        np.array([[-1, 1]], np.float32), np.array([[0, 1.2]], np.float32), np.array([[0, 40_000]], np.float32),
    ],
)  # fmt: skip
def test_levels_whose_white_is_not_known_are_refused(tmp_path, levels):
    with pytest.raises(UserError, match=r"given picture has grey levels from .* whose white is not known; scale them to 0 to"):
        as_uint8(Image.fromarray(levels), ndim=3)
    path = tiff(tmp_path / "a.tif", levels, BLACK_IS_ZERO)
    for read in (read_image, read_video):
        with pytest.raises(UserError, match=r"a\.tif has grey levels from"):
            read(path)


def test_a_raw_photograph_is_not_its_preview(tmp_path):
    """It looks like a TIFF, whose first picture is small."""
    for tag, value in ((254, 1), (50706, b"\1\4\0\0")):  # NewSubfileType, DNGVersion
        tags = ImageFileDirectory_v2()
        tags[tag] = value
        Image.new("RGB", (16, 12)).save(tmp_path / "a.dng", "TIFF", tiffinfo=tags)
        for read in (read_image, read_video):
            with pytest.raises(UserError, match=r"a\.dng begins with a preview, as raw photographs .* convert it to PNG or JPEG"):
                read(tmp_path / "a.dng")


@pytest.mark.parametrize("values", [(-1, 1), (0, 255)])
def test_a_refused_array_is_named_with_its_values(values):
    given = np.linspace(*values, 48).reshape(1, 4, 4, 3).astype(np.float32)
    tensor = torch.from_numpy(np.moveaxis(given, -1, 1).copy())
    said = rf"cannot be read; give uint8 or floats in \[0, 1\] .*; these have values from {values[0]} to {values[1]}$"
    for frames, shape in ((given, "[1, 4, 4, 3]"), (tensor, "[1, 3, 4, 4]")):
        with pytest.raises(UserError, match=rf"{re.escape(shape)} {said}"):
            as_uint8(frames)
