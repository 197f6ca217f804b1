"""A frame as FFmpeg decodes it, as the picture that players show: its colours, its opacity, its shape, and which side is up."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lumos.video.colour import profile_of_codes
from lumos.video.cropping import Cropping
from lumos.video.frames import picture_rgb

UNSPECIFIED, BT709 = 2, 1
"""Codes of the matrix between YUV and RGB that a file states (ITU-T H.273, table 4), and the one of FFmpeg's scaler."""
LIMITED = 1
"""Code of a range of levels from 16 (black) to 235 (white)."""
LIMITED_TO_FULL = np.clip((np.arange(256) - 16) * (255 / 219), 0, 255).round().astype(np.uint8)


def rgb_of(
    frame: av.VideoFrame, path: Path, cropping: Cropping, aspect: Fraction, is_png: bool, is_plain: bool
) -> np.ndarray:  # fmt: skip
    """Return a decoded frame as it is shown, uint8 [H, W, 3]: with square pixels, turned and mirrored as the file says.

    cropping: what the container hides. aspect: the width of a pixel by its height. is_png: PyAV must not be asked for what stands
    beside the pixels. is_plain: the fourth byte of a pixel has no meaning.
    """
    has_alpha = any(component.is_alpha for component in frame.format.components) and not is_plain
    # Players take BT.709 for films in HD that state nothing, and FFmpeg BT.601.
    is_hd = frame.width >= 1280 or frame.height > 576
    matrix = BT709 if frame.colorspace == UNSPECIFIED and is_hd and not frame.format.is_rgb else None
    rgb = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", src_colorspace=matrix)
    rgb = cropping.of(rgb)
    if frame.format.name.startswith("gray") and frame.color_range == LIMITED:  # FFmpeg's scaler takes the levels of grey for full
        rgb = LIMITED_TO_FULL[rgb]
    beside = {} if is_png else frame.side_data
    held = beside.get("ICC_PROFILE")
    profile = profile_of_codes(frame.color_primaries, frame.color_trc) if held is None else bytes(held)
    if has_alpha or profile:
        picture = Image.fromarray(rgb)
        picture.info["icc_profile"] = profile
        rgb = picture_rgb(picture, path)
    if aspect != 1:
        wide = max(1, round(rgb.shape[1] * aspect))
        rgb = np.asarray(Image.fromarray(rgb).resize((wide, rgb.shape[0]), Image.Resampling.BICUBIC))
    if is_png:
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
    turned = beside.get("DISPLAYMATRIX")
    return np.ascontiguousarray(rgb) if turned is None else displayed(rgb, struct.unpack("9i", bytes(turned)))


def displayed(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Return a picture [H, W, C] as a display matrix shows it, for right angles and mirrors.

    matrix: a b u c d v x y w by rows, which maps the point (column, row) to (a column + c row, b column + d row). Other
    angles are rounded to the nearest of these.
    """
    a, b, _, c, d, *_ = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # rows become columns
        picture, across, down = picture.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    picture = picture[:, ::-1] if across < 0 else picture
    return np.ascontiguousarray(picture[::-1] if down < 0 else picture)
