"""Colour profiles for pictures and films that state their colours by numbers, without a profile of their own."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Point = tuple[float, float]
"""Chromaticity (x, y)."""
D65, DCI, D50 = (0.3127, 0.329), (0.314, 0.351), (0.9642, 1.0, 0.8249)
SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06), D65)
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
PRIMARIES = {9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046), D65), 11: (*P3, DCI), 12: (*P3, D65)}
"""Red, green, blue and white of the codes of ITU-T H.273, table 2, whose colours are far from those of sRGB."""
LINEAR = 8
"""Code of the transfer function of light itself (ITU-T H.273, table 3)."""
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_EXIF, _INTEROPERABILITY, _INDEX = 0x8769, 0xA005, 1
_NO_GAMMA = (0.1, 10.0)  # exponents outside of this are mistakes
_SAME = 0.02


@cache
def profile_of_codes(primaries: int | None, transfer: int | None) -> bytes | None:
    """Return an ICC profile for codes of ITU-T H.273; None for colours that are, or nearly are, those of sRGB.

    A transfer function other than that of light itself is taken for that of sRGB: the others are meant for much the same screens.
    """
    linear = transfer == LINEAR
    if primaries not in PRIMARIES and not linear:
        return None
    return matrix_profile(PRIMARIES.get(primaries or 0, SRGB), 1.0 if linear else None)


def profile_of_picture(image: Image.Image) -> bytes | None:
    """Return an ICC profile for what a picture without one says of its colours: gAMA and cHRM of PNG, Adobe RGB in EXIF."""
    info = image.info
    if info.get("icc_profile"):
        return None
    if "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        return _of_png(info.get("gamma"), info.get("chromaticity"))
    if "exif" in info and image.getexif().get_ifd(_EXIF).get(_INTEROPERABILITY) is not None:
        index = image.getexif().get_ifd(_INTEROPERABILITY).get(_INDEX)
        if str(index).strip("\0") == "R03":  # DCF 2.0, "option file"
            return matrix_profile(ADOBE_RGB, 563 / 256)
    return None


def _of_png(gamma: Any, points: Any) -> bytes | None:
    exponent = 1 / gamma if gamma else 2.2
    white, *rgb = zip(points[::2], points[1::2], strict=True) if points else (D65, *SRGB[:3])
    places = (*rgb, white)
    is_srgb = abs(exponent - 2.2) < _SAME * 2.2 and np.abs(np.subtract(places, SRGB)).max() < _SAME / 2
    if is_srgb or not _NO_GAMMA[0] < exponent < _NO_GAMMA[1] or min(y for _, y in places) <= 0:
        return None
    return matrix_profile(places, None if abs(exponent - 2.2) < _SAME * 2.2 else exponent)


def matrix_profile(places: tuple[Point, Point, Point, Point], exponent: float | None) -> bytes | None:
    """Return an ICC profile (ICC.1:2010, 8.3.3) of these red, green, blue and white; None if they span no colours.

    exponent: of the tone curve; None: the curve of sRGB.
    """
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in places]).T  # [XYZ, 4]
    rgb, white = columns[:, :3], columns[:, 3]
    if abs(np.linalg.det(rgb)) < 1e-6:
        return None
    cones = _BRADFORD @ np.stack([white, np.array(D50)], 1)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(cones[:, 1] / cones[:, 0]) @ _BRADFORD @ rgb * np.linalg.solve(rgb, white)
    if exponent is None:  # type 3 of 10.15: (a x + b) ** g, and c x below d
        numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        curve = b"para" + struct.pack(">4xHH", 3, 0) + _fixed(numbers)
    else:
        curve = b"para" + struct.pack(">4xHH", 0, 0) + _fixed([exponent])
    text = b"desc" + struct.pack(">4xI", 2) + b"x" + bytes(79)
    tags = {b"desc": text, b"cprt": b"text" + bytes(5), b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    for number, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(adapted[:, number])
        tags[name + b"TRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(table) + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + _fixed(D50)).ljust(128, b"\0") + table + body


def _fixed(numbers: Any) -> bytes:
    """Return numbers as s15Fixed16Number."""
    return struct.pack(f">{len(numbers)}i", *(round(float(number) * 65536) for number in numbers))
