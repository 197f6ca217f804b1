"""The rasteriser agrees with plain trigonometry and with a ray through every sample."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data.synthetic.raster import SAMPLES, Camera, draw
from lumos.data.synthetic.scene import SOLIDS
from lumos.data.synthetic.solids import mesh

GROUND = (10, 60, 110)


def projected(point, camera: Camera, height: int, width: int) -> tuple[float, float, float]:
    """Rotate a point until the camera looks along x, by plain trigonometry."""
    x, y, z = point
    a, e = math.radians(camera.azimuth), math.radians(camera.elevation)
    towards, right = x * math.cos(a) + y * math.sin(a), y * math.cos(a) - x * math.sin(a)
    towards, up = towards * math.cos(e) + z * math.sin(e), z * math.cos(e) - towards * math.sin(e)
    depth = camera.distance - towards
    half = math.tan(math.radians(camera.field_of_view / 2)) * depth  # of the world, seen at this depth
    side = min(height, width) / 2
    return width / 2 + side * right / half, height / 2 - side * up / half, depth


@given(
    azimuth=st.floats(-720, 720), elevation=st.floats(-90, 90), distance=st.floats(2, 50), view=st.floats(5, 120),
    height=st.integers(1, 200), width=st.integers(1, 200),
)  # fmt: skip
def test_corners_of_a_cube_are_projected(azimuth, elevation, distance, view, height, width):
    camera = Camera(azimuth, elevation, distance, view)
    corners = np.array(list(product((-1.0, 1.0), repeat=3)))
    expected = np.array([projected(corner, camera, height, width) for corner in corners])
    assert np.stack(camera.project(corners, height, width), 1) == pytest.approx(expected, abs=1e-7)


def test_directions_on_the_screen():
    x, y, depth = Camera(0, 0, 4).project(np.array([[0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]]), 64, 64)
    assert (x[0] > 32, y[0]) == (True, 32)  # seen from +x, +y is to the right
    assert (x[1], y[1] < 32) == (32, True)
    assert depth == pytest.approx([4, 4, 3])
    x, y, _ = Camera(90, 0, 4).project(np.array([[1.0, 0, 0]]), 64, 64)
    assert x[0] < 32  # the camera moved to the right, so points in front of it move to the left in the picture


def ray_cast(triangles: np.ndarray, colours: np.ndarray, camera: Camera, height: int, width: int) -> np.ndarray:
    """Return each pixel as the mean over its samples of the colour of the nearest triangle on the sample's ray."""
    right, up, forward = camera.axes
    side = 2 * math.tan(math.radians(camera.field_of_view) / 2) / min(height, width)
    eye = -camera.distance * forward
    a, edge_1, edge_2 = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    normal = np.cross(edge_1, edge_2)
    picture = np.zeros((height, width, 3))
    centres = (np.arange(SAMPLES) + 0.5) / SAMPLES
    for row, column in product(range(height), range(width)):
        for dy, dx in product(centres, repeat=2):
            ray = forward + side * ((column + dx - width / 2) * right - (row + dy - height / 2) * up)
            facing = normal @ ray
            with np.errstate(divide="ignore", invalid="ignore"):
                far = ((a - eye) * normal).sum(1) / facing
                q = eye + far[:, None] * ray - a
                u = (np.cross(q, edge_2) * normal).sum(1) / (normal**2).sum(1)
                v = (np.cross(edge_1, q) * normal).sum(1) / (normal**2).sum(1)
            hit = (facing < 0) & (u >= 0) & (v >= 0) & (u + v <= 1)
            picture[row, column] += colours[np.where(hit, far, np.inf).argmin()] if hit.any() else GROUND
    return np.rint(picture / SAMPLES**2).astype(np.uint8)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    what=st.sampled_from((*SOLIDS, "triangles that cut each other")), azimuth=st.integers(0, 359), elevation=st.integers(-89, 88),
    distance=st.floats(1.2, 6), view=st.floats(15, 60), height=st.integers(1, 13), width=st.integers(1, 13),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_pictures_are_those_of_a_ray_cast(what, azimuth, elevation, distance, view, height, width, seed):
    rng = np.random.default_rng(seed)
    triangles = mesh(what)[0] if what in SOLIDS else rng.uniform(-0.55, 0.55, (30, 3, 3))
    colours = rng.integers(0, 256, (len(triangles), 3)).astype(float)
    # From a symmetric place, rays would meet edges, where both triangles are right.
    camera = Camera(azimuth + 0.1234, elevation + 0.4321, distance, view)
    picture = draw(triangles, colours, camera, GROUND, height, width)
    assert np.array_equal(picture, ray_cast(triangles, colours, camera, height, width))


@pytest.mark.parametrize("shape", [shape for shape in SOLIDS if shape != "torus"])
@pytest.mark.parametrize("elevation", [-90, -30, 0, 45, 90])
def test_a_convex_surface_has_no_gaps(shape, elevation):
    """Many edges of these views lie on the centres of samples, where rounding decides which triangle has the sample."""
    triangles, _ = mesh(shape)
    for azimuth in (0, 45, 90, 180):
        picture = draw(triangles, np.full((len(triangles), 3), 255.0), Camera(azimuth, elevation), (0, 0, 0), 33, 33)[..., 0]
        assert (picture == 255).sum() > 40
        for line in (*picture, *picture.T):
            inside = np.flatnonzero(line == 255)
            assert len(inside) in (0, np.ptp(inside) + 1 if len(inside) else 0)


@pytest.mark.parametrize("shape", SOLIDS)
def test_a_turn_by_360_degrees_gives_the_same_picture(shape):
    triangles, half = mesh(shape)
    colours = np.array([[250.0, 0, 0], [0, 200, 0]])[half]
    views = [draw(triangles, colours, Camera(77.25 + turn, 20), GROUND, 24, 30) for turn in (0, 360, -720)]
    assert all(np.array_equal(views[0], view) for view in views)


def test_what_lies_outside_the_picture_is_cut_off():
    triangles = mesh("cube")[0] + (0, 5, 0)
    colours = np.full((len(triangles), 3), 255.0)
    assert (draw(triangles, colours, Camera(0, 0), GROUND, 20, 20) == GROUND).all()
    assert (draw(triangles, colours, Camera(180, 0), GROUND, 20, 20) == GROUND).all()
    wide = draw(triangles, colours, Camera(0, 0), GROUND, 20, 120)
    assert (wide[:, :50] == GROUND).all()
    assert (wide[:, 60:] == 255).any()


def test_a_camera_inside_the_object_is_refused():
    triangles, _ = mesh("cube")
    with pytest.raises(ValueError, match=r"behind the camera, whose distance 0\.3"):
        draw(triangles, np.zeros((len(triangles), 3)), Camera(0, 0, 0.3), GROUND, 8, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"azimuth": math.nan}, "azimuth nan"),
        ({"elevation": 90.5}, "elevation 90.5"),
        ({"elevation": math.nan}, "elevation nan"),
        ({"distance": 0}, "distance 0"),
        ({"distance": math.inf}, "distance inf"),
        ({"field_of_view": 180}, "field_of_view 180"),
        ({"field_of_view": 0}, "field_of_view 0"),
    ],
)
def test_impossible_cameras_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Camera(**{"azimuth": 0, "elevation": 0} | values)
