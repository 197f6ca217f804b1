"""A rasteriser: pictures of triangles of one colour each, from any camera.

The world is right-handed with z up. On the screen x is to the right and y down, and pixel i of a row
covers [i, i + 1]. The colour of a pixel is the mean of SAMPLES x SAMPLES samples, which smooths the
edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SAMPLES = 3
"""Samples along each side of a pixel."""
_ROUNDING = 1e-9
"""Samples by which a triangle is widened, so that rounding leaves no gap between triangles with a common edge."""
_LEAST_AREA = 1e-6
"""Twice the area in samples below which a triangle is left out: it is seen edge-on, and its depth has no exact slope."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the origin. ValueError for a value that is not possible."""

    azimuth: float  # degrees around z, from x towards y: 0 looks from +x, 90 from +y; any number
    elevation: float  # degrees above the plane z = 0, -90 to 90
    distance: float = 4.0  # from the origin, above 0
    field_of_view: float = 35.0  # degrees that the shorter side of the picture spans, above 0 and below 180

    def __post_init__(self) -> None:
        if not math.isfinite(self.azimuth):
            raise ValueError(f"azimuth {self.azimuth} is not possible: take a finite number of degrees")
        if not -90 <= self.elevation <= 90:
            raise ValueError(f"elevation {self.elevation} is not possible: take -90 to 90 degrees")
        if not 0 < self.distance < math.inf:
            raise ValueError(f"distance {self.distance} is not possible: take a finite number above 0")
        if not 0 < self.field_of_view < 180:
            raise ValueError(f"field_of_view {self.field_of_view} is not possible: take a number above 0 and below 180 degrees")

    @property
    def axes(self) -> np.ndarray:
        """The directions right, up and forward of the camera in the world, float64 [3, 3], one direction in each row."""
        a, e = math.radians(self.azimuth % 360), math.radians(self.elevation)
        outward = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        right = np.array([-math.sin(a), math.cos(a), 0.0])
        return np.stack([right, np.cross(outward, right), -outward])

    def project(self, points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (x, y, depth) of points [..., 3] on a screen of height x width, [...] each.

        The depth is measured along the direction in which the camera looks. A point that is not in
        front of the camera has a depth of 0 or less, and its x and y have no meaning.
        """
        across, up, forward = np.moveaxis(points @ self.axes.T, -1, 0)
        depth = forward + self.distance
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = min(height, width) / (2 * math.tan(math.radians(self.field_of_view) / 2)) / depth
            return width / 2 + scale * across, height / 2 - scale * up, depth


def draw(
    triangles: np.ndarray, colours: np.ndarray, camera: Camera, background: tuple[int, int, int], height: int, width: int
) -> np.ndarray:
    """Return the picture of triangles on a plain background, uint8 [height, width, 3].

    triangles [F, 3, 3]: three corners each, counterclockwise as seen from outside; a triangle seen
    from inside is left out. colours [F, 3]: from 0 to 255. ValueError if a corner is not in front of
    the camera.
    """
    x, y, depth = camera.project(triangles, height, width)
    if depth.min() <= 0:
        raise ValueError(f"a corner lies behind the camera, whose distance {camera.distance} is too short")
    (left, right), (top, bottom) = _pixels(x, width), _pixels(y, height)  # only this part of the picture is drawn
    rows, columns = SAMPLES * (bottom - top), SAMPLES * (right - left)
    face, sample, nearness = _samples(SAMPLES * (x - left), SAMPLES * (y - top), depth, rows, columns)
    nearest = np.zeros(rows * columns)
    np.maximum.at(nearest, sample, nearness)
    shown = nearness >= nearest[sample]
    faces = np.full(rows * columns, len(triangles))
    faces[sample[shown]] = face[shown]
    palette = np.concatenate([colours, np.array([background])]).astype(np.float32)
    samples = palette.take(faces, axis=0).reshape(bottom - top, SAMPLES, columns, 3)
    # NumPy adds whole slices several times faster than it sums over a short axis.
    lines = sum(samples[:, i] for i in range(SAMPLES)).reshape(bottom - top, right - left, SAMPLES, 3)
    picture = np.full((height, width, 3), background, np.uint8)
    picture[top:bottom, left:right] = np.rint(sum(lines[:, :, i] for i in range(SAMPLES)) / SAMPLES**2)
    return picture


def _pixels(places: np.ndarray, count: int) -> tuple[int, int]:
    """Return (first, last + 1) of the pixels 0 ... count - 1 that the places on the screen span."""
    first, last = np.clip([np.floor(places.min()), np.ceil(places.max())], 0, count)
    return int(first), int(last)


def _samples(
    x: np.ndarray, y: np.ndarray, depth: np.ndarray, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the samples that triangles cover as (triangle, sample, nearness), [N] each.

    x, y and depth [F, 3] are the corners on a screen whose unit is a sample. `sample` counts row by row.
    `nearness` is 1 / depth, which is linear on the screen where the depth is not.
    """
    x1, x2, y1, y2 = np.roll(x, -1, 1), np.roll(x, -2, 1), np.roll(y, -1, 1), np.roll(y, -2, 1)
    area = x1 * y2 - x2 * y1  # the sum over the corners is twice the area, below 0 for a triangle that is seen from outside
    seen = np.flatnonzero(area.sum(1) < -_LEAST_AREA)
    x1, x2, y1, y2, y, depth, area = (values[seen] for values in (x1, x2, y1, y2, y, depth, area))
    # Weight of each corner at (x, y): a x + b y + c, from 1 at the corner to 0 at the side that is opposite.
    total = area.sum(1, keepdims=True)
    a, b, c = (y1 - y2) / total, (x2 - x1) / total, area / total  # [F, 3]
    first, last = _inside(y.min(1), y.max(1), rows)
    face, row = _ranges(first, last)  # [R] rows of triangles
    # The weights are all above 0 in one range of x. A side that lies along the row (a = 0) does not bound it.
    with np.errstate(divide="ignore", invalid="ignore"):
        end = -(b[face] * (row + 0.5)[:, None] + c[face]) / a[face]
    left = np.where(a[face] > 0, end, -np.inf).max(1)
    right = np.where(a[face] < 0, end, np.inf).min(1)
    line, column = _ranges(*_inside(left, right, columns))
    face, row = face[line], row[line]
    slope_x, slope_y, start = ((values / depth).sum(1) for values in (a, b, c))
    nearness = slope_x[face] * (column + 0.5) + slope_y[face] * (row + 0.5) + start[face]
    return seen[face], row * columns + column, nearness


def _inside(low: np.ndarray, high: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first, last + 1) of the samples 0 ... count - 1 whose centres lie between low and high."""
    first = np.ceil(np.clip(low - 0.5 - _ROUNDING, 0, count)).astype(int)
    last = np.floor(np.clip(high - 0.5 + _ROUNDING, -1, count - 1)).astype(int) + 1
    return first, np.maximum(first, last)


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (number of the range, value) for all values of the ranges first[i] ... last[i] - 1, one after the other."""
    counts = last - first
    number = np.repeat(np.arange(len(counts)), counts)
    return number, np.arange(len(number)) + (first - (np.cumsum(counts) - counts))[number]
