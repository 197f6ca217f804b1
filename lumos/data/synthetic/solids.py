"""Solid objects, lit by one light and seen from seven sides, as samples for multi-view generation.

A solid stands in the middle of a sphere of radius 1. The half in front of the plane x = 0 has its
first colour, the half behind it has the second, so that almost every view shows both colours and
tells from which side it is taken. The light does not move with the camera.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lumos.data.synthetic.raster import Camera, draw
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, NUM_VIEWS, VIEWS, Solid

ROUND = 32
"""Number of flat sides that stand for something round."""
LIGHT = np.array([0.5, -0.6, 1.0]) / np.sqrt(1.61)
"""Direction towards the light, which is far away."""
DARKEST = 0.4
"""Brightness of a face that looks away from the light; a face that looks at the light has 1."""


def cameras(solid: Solid) -> list[Camera]:
    """Return the cameras of the views of a solid: that of the input view, then those of VIEWS."""
    around = [Camera(solid.azimuth + azimuth, elevation) for azimuth, elevation in VIEWS]
    return [Camera(solid.azimuth, solid.elevation), *around]


def views(solid: Solid, size: tuple[int, int], count: int = NUM_VIEWS) -> np.ndarray:
    """Return the true views of a solid, uint8 [count, H, W, 3]: the input view, then the first of VIEWS.

    size: (H, W) in pixels. count: number of views, 1 to NUM_VIEWS.
    """
    triangles, half = mesh(solid.shape)
    colours = np.array([COLOURS[name] for name in solid.colours])[half] * shade(triangles)[:, None]
    ground = BACKGROUNDS[solid.background]
    return np.stack([draw(solid.radius * triangles, colours, camera, ground, *size) for camera in cameras(solid)[:count]])


def shade(triangles: np.ndarray) -> np.ndarray:
    """Return the brightness of triangles [F, 3, 3] under the light, [F] from DARKEST to 1.

    It is linear in the cosine between normal and light, also where the light does not reach, so that
    faces in the shadow can be told apart (half-Lambert shading).
    """
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    cosine = normal @ LIGHT / np.linalg.norm(normal, axis=1)
    return DARKEST + (1 - DARKEST) * (1 + cosine) / 2


@cache
def mesh(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the surface of a solid of radius 1 as (triangles [F, 3, 3], half [F]), read-only.

    The corners of a triangle are counterclockwise as seen from outside. half: 0 in front of the plane
    x = 0, 1 behind it.
    """
    triangles, halves = [], []
    for face in _FACES[shape]():
        for half, sign in enumerate((1, -1)):
            corners = _in_front(face, sign)
            for i in range(1, len(corners) - 1):
                triangle = corners[[0, i, i + 1]]
                if np.linalg.norm(np.cross(triangle[1] - triangle[0], triangle[2] - triangle[0])) > 1e-9:
                    triangles.append(triangle)
                    halves.append(half)
    surface = np.array(triangles), np.array(halves)
    for values in surface:
        values.setflags(write=False)
    return surface


def _in_front(face: np.ndarray, sign: int) -> np.ndarray:
    """Return the part of a convex face [n, 3] where sign * x >= 0, [m, 3]; m is 0 if there is none."""
    part = []
    for corner, following in zip(face, np.roll(face, -1, axis=0), strict=True):
        x, x_following = sign * corner[0], sign * following[0]
        if x >= 0:
            part.append(corner)
        if x * x_following < 0:
            crossing = corner + (following - corner) * (x / (x - x_following))
            part.append(crossing * (0, 1, 1))
    return np.array(part).reshape(-1, 3)


def _ring(corners: int, radius: float, z: float) -> np.ndarray:
    """Return the corners of a regular polygon around the z axis, [corners, 3], with a side that looks towards +x."""
    angle = (np.arange(corners) + 0.5) * 2 * np.pi / corners
    ring = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(corners, z)], axis=1)
    return np.where(np.abs(ring) < 1e-12, 0.0, ring)  # a corner on the plane x = 0 lies exactly on it


def _between(lower: np.ndarray, upper: np.ndarray) -> list[np.ndarray]:
    """Return the sides [4, 3] between two rings of as many corners."""
    return [
        np.array([lower[i - 1], lower[i], upper[i], upper[i - 1]])  # counterclockwise as seen from outside
        for i in range(len(lower))
    ]


def _column(corners: int, radius: float, top_radius: float, bottom: float, top: float) -> list[np.ndarray]:
    """Return the faces of a column with a polygon as base; a top radius of 0 makes it a pyramid."""
    lower, upper = _ring(corners, radius, bottom), _ring(corners, top_radius, top)
    return [lower[::-1], *_between(lower, upper), upper]


def _torus(radius: float, tube: float) -> list[np.ndarray]:
    angle = np.arange(ROUND // 2) * 2 * np.pi / (ROUND // 2)
    rings = [_ring(ROUND, radius + tube * np.cos(a), tube * np.sin(a)) for a in angle]
    return [face for i in range(len(rings)) for face in _between(rings[i - 1], rings[i])]


_FACES = {
    "cube": lambda: _column(4, (2 / 3) ** 0.5, (2 / 3) ** 0.5, -(3**-0.5), 3**-0.5),
    "pyramid": lambda: _column(4, 0.8, 0.0, -0.6, 0.9),
    "prism": lambda: _column(3, 0.8, 0.8, -0.6, 0.6),
    "cylinder": lambda: _column(ROUND, 0.6, 0.6, -0.8, 0.8),
    "cone": lambda: _column(ROUND, 0.75, 0.0, -0.65, 0.9),
    "torus": lambda: _torus(0.72, 0.28),
}
