"""Solids: closed surfaces in two colours, lit by one light, and their seven views as a kind of synthetic scenes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.data.synthetic.drawing import render
from lumos.data.synthetic.raster import Camera, draw
from lumos.data.synthetic.sampling import SyntheticScenes, sample_scene
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, HELD_OUT_SOLIDS, SOLIDS, Solid, is_held_out
from lumos.data.synthetic.solids import DARKEST, LIGHT, cameras, mesh, shade, views
from lumos.data.synthetic.source import SyntheticSource
from lumos.errors import UserError

PI = np.pi
CUBE = Solid("cube", ("red", "blue"), 1.0, 0.0, 0.0, "black")
ONLY = {"kinds": ("solids",), "num_frames": 7}

# ---- surfaces


@pytest.mark.parametrize("shape", SOLIDS)
def test_a_surface_is_closed(shape):
    """Every side of a triangle is the side of one more triangle, in the other direction."""
    triangles = np.round(mesh(shape)[0], 9) + 0.0
    sides = Counter((tuple(t[i]), tuple(t[(i + 1) % 3])) for t in triangles.tolist() for i in range(3))
    assert set(sides.values()) == {1}
    assert {(end, start) for start, end in sides} == set(sides)


@pytest.mark.parametrize(
    ("shape", "volume"),
    [
        ("cube", (2 / 3**0.5) ** 3),
        ("pyramid", 2 * 0.8**2 * 1.5 / 3),
        ("prism", 3 * 3**0.5 / 4 * 0.8**2 * 1.2),
        ("cylinder", PI * 0.6**2 * 1.6),
        ("cone", PI * 0.75**2 * 1.55 / 3),
        ("torus", 2 * PI**2 * 0.72 * 0.28**2),
    ],
)
def test_a_surface_encloses_the_volume_of_its_solid(shape, volume):
    """The volume is above 0 only if the triangles are counterclockwise as seen from outside."""
    triangles, _ = mesh(shape)
    enclosed = np.linalg.det(triangles).sum() / 6
    assert 0.96 * volume < enclosed < volume * 1.0001
    assert np.linalg.norm(triangles, axis=-1).max() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", SOLIDS)
def test_each_half_lies_on_its_side_of_the_plane(shape):
    triangles, half = mesh(shape)
    x = triangles[..., 0]
    assert (x[half == 0] >= 0).all()
    assert (x[half == 1] <= 0).all()
    assert set(half) == {0, 1}


def test_the_shade_of_a_face_follows_its_angle_to_the_light():
    triangles, _ = mesh("cube")
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal = np.rint(normal / np.linalg.norm(normal, axis=1, keepdims=True))
    found = {tuple(map(int, n)): s for n, s in zip(normal, shade(triangles), strict=True)}
    light = dict(zip("xyz", LIGHT, strict=True))
    axes = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
    assert len(found) == 6
    assert np.linalg.norm(LIGHT) == pytest.approx(1)
    for name, axis in axes.items():
        for sign in (1, -1):
            expected = DARKEST + (1 - DARKEST) * (1 + sign * light[name]) / 2
            assert found[tuple(sign * n for n in axis)] == pytest.approx(expected)


# ---- views


def test_views_surround_the_solid():
    solid = replace(CUBE, azimuth=100.0, elevation=7.0)
    expected = [(100, 7), (130, 30), (190, -20), (250, 30), (310, -20), (370, 30), (430, -20)]
    assert [(c.azimuth, c.elevation) for c in cameras(solid)] == expected


@pytest.mark.parametrize("shape", SOLIDS)
def test_views_are_pictures_from_their_cameras(shape):
    solid = Solid(shape, ("green", "magenta"), 0.8, 33.0, 12.0, "navy")
    found = views(solid, (20, 24))
    assert (found.shape, found.dtype) == ((7, 20, 24, 3), np.uint8)
    triangles, half = mesh(shape)
    colours = np.array([(40, 180, 60), (215, 60, 200)])[half] * shade(triangles)[:, None]
    for view, camera in zip(found, cameras(solid), strict=True):
        assert np.array_equal(view, draw(0.8 * triangles, colours, camera, (20, 25, 70), 20, 24))
    assert np.array_equal(views(solid, (20, 24), 3), found[:3])


def test_opposite_views_of_a_cube_show_one_colour_each():
    """From the front the cube is a square of the first colour, and from behind one of the second."""
    for azimuth, (r, g, b) in ((0, COLOURS["red"]), (180, COLOURS["blue"])):
        view = views(replace(CUBE, azimuth=azimuth), (64, 64), 1)[0]
        middle = view[20:44, 20:44].reshape(-1, 3)
        assert (middle == middle[0]).all()
        brightness = DARKEST + (1 - DARKEST) * (1 + (1 if azimuth == 0 else -1) * LIGHT[0]) / 2
        assert middle[0] == pytest.approx(np.array([r, g, b]) * brightness, abs=0.51)
        shown = (view != BACKGROUNDS["black"]).any(-1)
        assert np.array_equal(shown, shown[::-1])
        assert np.array_equal(shown, shown[:, ::-1])


@pytest.mark.parametrize("shape", [shape for shape in SOLIDS if shape != "prism"])
def test_opposite_views_swap_the_colours(shape):
    """Without light, a prism looks different from behind."""
    triangles, half = mesh(shape)
    colours = np.array([(200.0, 0, 0), (0, 0, 150.0)])
    for azimuth, elevation in ((20.3, 15.2), (110.7, -20.1), (250.9, 30.4)):
        view = draw(triangles, colours[half], Camera(azimuth, elevation), (9, 9, 9), 40, 40)
        opposite = draw(triangles, colours[1 - half], Camera(azimuth + 180, elevation), (9, 9, 9), 40, 40)
        assert np.array_equal(view, opposite)


@pytest.mark.parametrize("shape", SOLIDS)
def test_a_whole_solid_is_in_the_picture_from_all_sides(shape):
    found = views(Solid(shape, ("red", "white"), 1.0, 10.0, 30.0, "gray"), (64, 48))
    empty = (found == BACKGROUNDS["gray"]).all(-1)
    for border in (empty[:, 0], empty[:, -1], empty[:, :, 0], empty[:, :, -1]):
        assert border.all()
    assert ((~empty).mean((1, 2)) > 0.1).all()


# ---- scenes


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**60), split=st.sampled_from(("train", "held_out", "all")))
@settings(max_examples=60)
def test_a_solid_has_the_attributes_of_its_split(seed, index, split):
    scene = sample_scene(seed, index, split=split, **ONLY)
    (solid,) = scene.objects
    assert (scene.caption, scene.background) == ("", solid.background)
    assert solid.shape in SOLIDS
    assert solid.colours[0] != solid.colours[1]
    assert set(solid.colours) <= COLOURS.keys()
    assert 0.75 <= solid.radius <= 1
    assert 0 <= solid.azimuth < 360
    assert -20 <= solid.elevation <= 30
    held_out = any((solid.shape, colour) in HELD_OUT_SOLIDS for colour in solid.colours)
    assert is_held_out(solid) == held_out
    assert split == "all" or held_out == (split == "held_out")


def test_splits_hold_all_that_they_may_hold():
    def drawn(split: str, n: int) -> set[tuple[str, str, str]]:
        solids = [sample_scene(1, i, split=split, **ONLY).objects[0] for i in range(n)]
        return {(solid.shape, *solid.colours) for solid in solids}

    every = {(shape, a, b) for shape in SOLIDS for a in COLOURS for b in COLOURS if a != b}
    held_out = {(shape, a, b) for shape, a, b in every if {(shape, a), (shape, b)} & set(HELD_OUT_SOLIDS)}
    assert drawn("held_out", 400) == held_out
    assert drawn("train", 2500) == every - held_out


def test_a_clip_is_the_views_and_a_picture_the_input_view():
    worlds = SyntheticScenes(5, height=16, width=20, **ONLY)
    frames, caption = worlds[9]
    (solid,) = worlds.scene(9).objects
    assert caption == ""
    assert np.array_equal(frames, views(solid, (16, 20)))
    assert np.array_equal(worlds[9][0], frames)
    for count in (1, 5):
        shorter = replace(worlds, num_frames=count)
        assert shorter.scene(9).objects == (solid,)
        assert np.array_equal(render(shorter.scene(9)), frames[:count])


def test_kinds_are_mixed_by_the_share_of_solids():
    def count(**options) -> int:
        scenes = [sample_scene(3, i, num_frames=7, **options) for i in range(400)]
        return sum(isinstance(scene.objects[0], Solid) for scene in scenes)

    assert count(kinds=("shapes", "solids"), share_solids=0) == 0
    assert count(kinds=("shapes", "solids"), share_solids=1) == 400
    assert 90 < count(kinds=("digits", "shapes", "solids"), share_solids=0.3) < 150
    assert count(kinds=("solids",), share_solids=0) == 400


def test_more_frames_than_views_are_refused():
    with pytest.raises(UserError, match=r"num_frames 8 is not possible: a solid has 7 views.*solids out of kinds"):
        SyntheticScenes(kinds=("shapes", "solids"), num_frames=8)
    with pytest.raises(UserError, match=r"share_solids 2"):
        SyntheticScenes(share_solids=2)


def source(**options) -> SyntheticSource:
    shape = {"height": 16, "width": 16, "num_frames": 7, "fps": 8}
    return SyntheticSource(**shape, scenes=None, seed=4, options={"kinds": ["solids"], **options}, most_codes={})


def test_a_training_step_is_a_function_of_its_number():
    video, image = StepShape("video", 4), StepShape("image", 4)
    clips = source().clips(11, video, range(4))
    again = source().clips(11, video, range(2, 4))
    assert [clip.caption for clip in clips] == [""] * 4
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(clips[2:], again, strict=True))
    assert len({clip.frames.tobytes() for clip in (*clips, *source().clips(12, video, range(4)))}) == 8
    pictures = source().clips(11, image, range(4))
    assert all(np.array_equal(p.frames, c.frames[:1]) for p, c in zip(pictures, clips, strict=True))
    validation = source().clips(VALIDATION_STEP, video, range(4))
    other_run = replace_seed(source()).clips(VALIDATION_STEP, video, range(4))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(validation, other_run, strict=True))


def replace_seed(of: SyntheticSource) -> SyntheticSource:
    of.videos = replace(of.videos, seed=77)
    return of


def test_options_of_a_training_may_not_ask_for_held_out_solids():
    with pytest.raises(UserError, match="split"):
        source(split="held_out")
