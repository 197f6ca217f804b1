"""Sprites in synthetic scenes: their places, drawing, held-out combinations, and the error without pictures."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lumos.data.synthetic import sprites
from lumos.data.synthetic.drawing import SPRITE_RADIUS, render, sprite_pixels
from lumos.data.synthetic.sampling import GAP, MARGIN, SPEED, SPRITE_MOTIONS, SyntheticScenes, sample_scene
from lumos.data.synthetic.scene import BACKGROUNDS, DIRECTIONS, GRADIENTS, HELD_OUT_SPRITES, Scene, SceneObject
from lumos.errors import UserError

ALL_KINDS = ("shapes", "digits", "sprites")


def one(name: str, x: float, y: float, *, motion="still", speed=0.0, background="black", num_frames=1, side=64) -> np.ndarray:
    radius = SPRITE_RADIUS * side / 64
    thing = SceneObject("sprite", "", "", motion, radius, radius, x, y, speed, sprite=name)
    return render(Scene((thing,), background, "", num_frames, 8, side, side))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sampled_from(["train", "held_out", "all"]),
    st.sampled_from([1, 5, 17, 65]),
    st.sampled_from([(64, 64), (16, 16), (32, 48), (128, 96)]),
)
def test_sprites_stay_inside_and_apart_and_move_straight(index, split, num_frames, canvas):
    height, width = canvas
    scale = min(canvas) / 64
    scene = sample_scene(3, index, split=split, kinds="sprites", num_frames=num_frames, height=height, width=width, share_two=0.5)
    paths = [thing.path(num_frames) for thing in scene.objects]
    margin = MARGIN * max(scale, 1) - 1e-9
    for thing, (x, y, r) in zip(scene.objects, paths, strict=True):
        assert (r == SPRITE_RADIUS * scale).all()
        assert min((x - r).min(), (y - r).min()) >= margin
        assert (x + r).max() <= width - margin
        assert (y + r).max() <= height - margin
        right, down = DIRECTIONS.get(thing.motion, (0, 0))
        np.testing.assert_allclose(np.diff(x), right * thing.speed)
        np.testing.assert_allclose(np.diff(y), down * thing.speed)
        assert thing.speed <= SPEED[1] * scale
        assert (thing.speed > 0) == (thing.motion in DIRECTIONS)
        if num_frames == 17:
            assert thing.motion not in DIRECTIONS or thing.speed >= SPEED[0] * scale
    if len(paths) == 2:
        (ax, ay, ar), (bx, by, br) = paths
        assert all(max(abs(ax - bx)[t], abs(ay - by)[t]) >= (ar + br)[t] + GAP * scale for t in range(num_frames))
        assert scene.objects[0].sprite != scene.objects[1].sprite


@pytest.mark.slow
def test_held_out_combinations_by_split():
    def shown(split: str, count: int, share_two: float) -> list[list[tuple[str, str]]]:
        scenes = (sample_scene(0, i, split=split, kinds=("sprites",), share_two=share_two) for i in range(count))
        return [[(thing.sprite, thing.motion) for thing in scene.objects] for scene in scenes]

    held_out = set(HELD_OUT_SPRITES)
    every = {(name, motion) for name in sprites.SPRITES for motion in SPRITE_MOTIONS}
    assert {thing for (thing,) in shown("train", 4000, 0)} == every - held_out
    assert not any(held_out.intersection(pair) for pair in shown("train", 600, 1))
    assert {thing for (thing,) in shown("held_out", 100, 0)} == held_out
    assert all(held_out.intersection(pair) for pair in shown("held_out", 100, 1))
    assert 0 < np.mean([thing in held_out for (thing,) in shown("all", 1000, 0)]) < 0.05


def test_a_picture_has_no_motion_that_could_be_held_out():
    scenes = [sample_scene(0, i, kinds=("sprites",), share_two=1.0, num_frames=1) for i in range(800)]
    assert {thing.motion for scene in scenes for thing in scene.objects} == {"still"}
    counts = Counter(thing.sprite for scene in scenes for thing in scene.objects)
    assert set(counts) == set(sprites.SPRITES)
    assert counts["star"] > 0.75 * np.mean(list(counts.values()))


@pytest.mark.slow
def test_shares_of_kinds():
    def kinds(**options) -> Counter:
        shapes = (sample_scene(0, i, share_two=0, **options).objects[0].shape for i in range(1500))
        return Counter({"digit": "digits", "sprite": "sprites"}.get(shape, "shapes") for shape in shapes)

    found = kinds(kinds=ALL_KINDS)
    assert found["sprites"] / 1500 == pytest.approx(0.35, abs=0.04)
    assert found["digits"] / 1500 == pytest.approx(0.65 * 0.15, abs=0.025)
    found = kinds(kinds=("sprites", "digits"), share_sprites=0.6)
    assert found["sprites"] / 1500 == pytest.approx(0.6, abs=0.04)
    assert found["shapes"] == 0
    assert kinds(kinds=("sprites",), share_sprites=0.0) == {"sprites": 1500}
    assert kinds(kinds=ALL_KINDS, share_sprites=1.0) == {"sprites": 1500}
    twos = [len(sample_scene(0, i, kinds="sprites", share_two=0.25).objects) for i in range(600)]
    assert np.mean(twos) == pytest.approx(1.25, abs=0.05)


def test_scenes_without_sprites_are_as_they_were():
    scenes = [sample_scene(4, i) for i in range(500)]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert not any(thing.sprite for scene in scenes for thing in scene.objects)
    mixed = [scene for scene in (sample_scene(4, i, kinds=ALL_KINDS) for i in range(500)) if scene.objects[0].shape != "sprite"]
    assert {scene.background for scene in mixed} == set(BACKGROUNDS)
    grounds = {sample_scene(4, i, kinds="sprites").background for i in range(100)}
    assert grounds == {*BACKGROUNDS, *GRADIENTS}


def test_a_clip_depends_on_seed_and_index_only():
    options = {"kinds": ALL_KINDS, "share_sprites": 0.7, "share_two": 0.5}
    later = [SyntheticScenes(9, **options)[index] for index in (7, 3, 5)]
    worlds = SyntheticScenes(9, **options)
    in_order = [worlds[index] for index in range(8)]
    for (video, caption), index in zip(later, (7, 3, 5), strict=True):
        assert caption == in_order[index][1]
        np.testing.assert_array_equal(video, in_order[index][0])
    assert not np.array_equal(SyntheticScenes(10, **options)[3][0], in_order[3][0])


@pytest.mark.parametrize("name", [*BACKGROUNDS, *GRADIENTS])
@pytest.mark.parametrize("height", [16, 64, 96])
def test_grounds_are_exact(name, height):
    top, bottom = GRADIENTS.get(name) or (BACKGROUNDS[name],) * 2
    video = render(Scene((), name, "", 2, 8, height, 24))
    for row in range(height):
        below = (row + 0.5) / height
        wanted = [round(a + (b - a) * below) for a, b in zip(top, bottom, strict=True)]
        assert (video[:, row] == wanted).all()


@pytest.mark.parametrize("side", [16, 48, 64, 128, 512])
@pytest.mark.parametrize("name", ["owl", "star", "banana"])
def test_a_sprite_keeps_its_mass_and_its_mean_place(name, side):
    x, y = 0.45 * side, 0.52 * side + 0.3
    picture, cell = sprites.load(name), 2 * SPRITE_RADIUS / 64 * side / 64
    drawn = one(name, x, y, side=side)[0].astype(float) - BACKGROUNDS["black"]  # [H, W, 3]
    beside_ground = 255 * picture[..., :3] - picture[..., 3:] * BACKGROUNDS["black"]
    np.testing.assert_allclose(drawn.sum((0, 1)), beside_ground.sum((0, 1)) * cell**2, rtol=0.005)
    pixel, grid = np.arange(side) + 0.5, (np.arange(64) - 31.5) * cell
    for axis, middle in ((0, x), (1, y)):
        wanted = middle + beside_ground.sum((axis, 2)) @ grid / beside_ground.sum()
        assert drawn.sum((axis, 2)) @ pixel / drawn.sum() == pytest.approx(wanted, abs=0.01 + side / 10_000)


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_a_sprite_moves_by_parts_of_a_pixel(motion):
    x, y = {"left": (49.2, 30.0), "right": (15.1, 30.7), "up": (30.3, 48.8), "down": (30.0, 14.9)}[motion]
    drawn = one("fish", x, y, motion=motion, speed=1.37, num_frames=17).astype(float) - BACKGROUNDS["black"]
    mass = drawn.sum((1, 2, 3))
    way_x, way_y = (np.diff(drawn.sum((axis, 3)) @ (np.arange(64) + 0.5) / mass) for axis in (1, 2))
    right, down = DIRECTIONS[motion]
    np.testing.assert_allclose(way_x, 1.37 * right, atol=0.02)
    np.testing.assert_allclose(way_y, 1.37 * down, atol=0.02)


@pytest.mark.parametrize("side", [24, 64, 100, 128, 200])
def test_opaque_pixels_hide_the_ground(tmp_path, monkeypatch, side):
    Image.new("RGBA", (64, 64), (200, 30, 90, 255)).save(tmp_path / "owl.png")
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path))
    x, y, radius = side / 2 + 0.3, side / 2 - 0.4, SPRITE_RADIUS * side / 64
    frame = one("owl", x, y, background="sky", side=side)[0]
    far = np.maximum(abs(np.arange(side) + 0.5 - x)[None], abs(np.arange(side) + 0.5 - y)[:, None])
    assert (frame[far <= radius - 1] == (200, 30, 90)).all()
    ground = render(Scene((), "sky", "", 1, 8, side, side))[0]
    assert (frame[far >= radius + 1] == ground[far >= radius + 1]).all()


@pytest.mark.parametrize("radius", [3.0, 12.0, 45.5])
def test_pixels_are_those_of_a_finely_sampled_filter(radius):
    """The slow statement: a pixel is the mean of the picture under a triangle of two pixels, taken at many places."""
    picture, box = sprites.load("rocket"), int(2 * radius) + 4
    dx, dy = (np.arange(box) + 0.5 - box / 2 + off for off in (0.27, -0.4))
    samples = ((np.arange(64 * 20) + 0.5) / (64 * 20) * 2 - 1) * radius  # places from the sprite's centre

    def weights(centres):
        triangle = np.maximum(0, 1 - np.abs(samples - centres[:, None])) * radius / (32 * 20)
        return triangle.reshape(box, 64, 20).sum(2)

    wanted = np.einsum("yr,rcd,xc->yxd", weights(dy), picture, weights(dx), optimize=True)
    drawn = sprite_pixels(picture, *(d[None].astype(np.float32) for d in (dx, dy)), np.array([[radius]], np.float32))[0]
    np.testing.assert_allclose(drawn, wanted, atol=0.001)


def test_a_picture_fills_the_square_premultiplied():
    for name in ("owl", "rocket", "whale"):
        picture = sprites.load(name)
        assert (picture.shape, picture.dtype, picture.flags.writeable) == ((64, 64, 4), np.float32, False)
        assert (picture[..., :3] <= picture[..., 3:] + 1e-6).all()
        inked = picture[..., 3] > 0.1
        rows, columns = np.nonzero(inked.any(1))[0], np.nonzero(inked.any(0))[0]
        assert max(np.ptp(rows), np.ptp(columns)) >= 62
        assert rows[0] + rows[-1] == pytest.approx(63, abs=2)
        assert columns[0] + columns[-1] == pytest.approx(63, abs=2)


def test_all_pictures_differ():
    pictures = np.stack([sprites.load(name).ravel() for name in sprites.SPRITES])
    pictures = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    assert (pictures @ pictures.T - np.eye(64)).max() < 0.97


def test_only_drawing_needs_the_pictures(no_sprite_pictures):
    scene = sample_scene(0, 0, kinds="sprites")
    assert scene.objects[0].sprite in scene.caption
    with pytest.raises(UserError, match=r"picture of the sprite .* is missing: .*no-sprites.*LUMOS_SPRITES names this folder"):
        render(scene)


def test_pictures_follow_a_change_of_lumos_sprites(tmp_path, monkeypatch):
    before = sprites.load("owl")
    Image.new("RGBA", (64, 64), "red").save(tmp_path / "owl.png")
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path))
    assert not np.array_equal(sprites.load("owl"), before)
    monkeypatch.delenv("LUMOS_SPRITES")
    assert np.array_equal(sprites.load("owl"), before)


def test_a_missing_shipped_picture_asks_for_a_reinstall(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "PICTURES", tmp_path)
    with pytest.raises(UserError, match=r"owl\.png\. This picture comes with Lumos: install Lumos again, or leave sprites out"):
        sprites.load("owl")


def test_sprites_are_the_pixels_that_runs_were_made_with():
    """Another picture, or another resampling of it, changes every loss."""
    pixels = np.stack([sprites.load(name) for name in sprites.SPRITES])
    assert sha256(pixels.tobytes()).hexdigest() == "d0219d69a55a144b2d64d6060e6d52fd45f8a855b2bcd984b3165d8ae0e45846"


def empty_picture(path):
    Image.new("RGBA", (64, 64)).save(path)


def cut_off_picture(path):
    path.write_bytes((path.parent / "rocket.png").read_bytes()[:900])


@pytest.mark.parametrize("damage", [empty_picture, cut_off_picture, Path.mkdir, lambda path: path.write_text("none")])
def test_a_damaged_picture_is_named(tmp_path, monkeypatch, damage):
    (tmp_path / "rocket.png").write_bytes((sprites.PICTURES / "rocket.png").read_bytes())
    damage(tmp_path / "owl.png")
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path))
    with pytest.raises(UserError, match=r"owl\.png cannot be read: .*LUMOS_SPRITES names this folder"):
        sprites.load("owl")
