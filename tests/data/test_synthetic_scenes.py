"""Synthetic scenes: geometry, words and held-out combinations."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data.synthetic import digits
from lumos.data.synthetic.drawing import render
from lumos.data.synthetic.sampling import GAP, SyntheticScenes, captions, sample_scene
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, Scene, SceneObject, is_held_out
from lumos.errors import UserError

INDEX = st.integers(0, 10**9)
CANVAS = st.sampled_from([(64, 64), (16, 16), (32, 48), (96, 64)])


def still(shape: str, x: float, y: float, radius: float, colour="white", background="black") -> np.ndarray:
    thing = SceneObject(shape, colour, "small", "still", radius, radius, x, y)
    return render(Scene((thing,), background, "", 1, 8, 64, 64))[0]


@settings(max_examples=80, deadline=None)
@given(INDEX, st.sampled_from(["train", "held_out", "all"]), st.sampled_from([1, 5, 17, 33, 65]), CANVAS)
def test_objects_stay_inside_the_canvas_and_apart(index, split, num_frames, canvas):
    height, width = canvas
    scene = sample_scene(3, index, split=split, num_frames=num_frames, height=height, width=width, share_two=0.5, share_digits=0.2)
    video = render(scene)
    assert video.shape == (num_frames, height, width, 3)
    assert video.dtype == np.uint8
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    assert (video[:, border] == BACKGROUNDS[scene.background]).all()
    paths = [thing.path(num_frames) for thing in scene.objects]
    for x, y, r in paths:
        assert (x - r).min() >= 1
        assert (y - r).min() >= 1
        assert (x + r).max() <= width - 1
        assert (y + r).max() <= height - 1
    if len(paths) == 2:
        (ax, ay, ar), (bx, by, br) = paths
        assert all(max(abs(ax - bx)[t], abs(ay - by)[t]) > (ar + br)[t] for t in range(num_frames))
        assert scene.objects[0].colour != scene.objects[1].colour


@settings(max_examples=60, deadline=None)
@given(INDEX, st.sampled_from(["train", "all"]))
def test_movers_take_one_straight_way_at_the_stated_speed(index, split):
    for thing in sample_scene(0, index, split=split).objects:
        x, y, r = thing.path(17)
        dx, dy = np.diff(x), np.diff(y)
        if thing.motion in DIRECTIONS:
            right, down = DIRECTIONS[thing.motion]
            assert 1.2 <= thing.speed <= 2.0
            np.testing.assert_allclose(dx, right * thing.speed)
            np.testing.assert_allclose(dy, down * thing.speed)
            assert (r == thing.radius).all()
        else:
            assert not dx.any()
            assert not dy.any()
            assert r[-1] / r[0] == pytest.approx({"grows": 1.6, "shrinks": 0.5, "still": 1.0}[thing.motion])
        if thing.shape != "digit":
            assert thing.radius == {"small": 7, "large": 12}[thing.size]


def test_longer_clips_keep_the_speed_where_it_fits():
    assert all(0.2 < t.speed <= 2.0 for i in range(50) for t in sample_scene(0, i, num_frames=65).objects if t.speed)
    fast = [t.speed for i in range(50) for t in sample_scene(0, i, num_frames=9).objects if t.speed]
    assert 1.2 <= min(fast) <= max(fast) <= 2.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), INDEX)
def test_a_clip_depends_on_seed_and_index_only(seed, index):
    first, caption = SyntheticScenes(seed)[index]
    SyntheticScenes(seed)[index + 1]
    again, same_caption = SyntheticScenes(seed)[index]
    assert caption == same_caption
    np.testing.assert_array_equal(first, again)


def test_seeds_and_indices_give_different_clips():
    scenes = {sample_scene(seed, index).objects for seed in range(10) for index in range(10)}
    assert len(scenes) == 100


def test_the_stream_is_endless_random_access():
    worlds = SyntheticScenes(1)
    in_order = [caption for _, caption in islice(worlds, 5)]
    assert in_order == [worlds[i][1] for i in range(5)] == list(captions(1, 5))
    with pytest.raises(IndexError, match="-1"):
        worlds[-1]


def test_held_out_combinations_by_split():
    rules = {("magenta", "triangle", "up"), ("yellow", "plus", "still"), ("blue", "square", "grows")}
    assert all(is_held_out(SceneObject(shape, colour, "small", motion)) for colour, shape, motion in rules)
    assert not is_held_out(SceneObject("square", "blue", "small", "still"))
    assert not is_held_out(SceneObject("circle", "blue", "small", "grows"))
    by_split = {
        split: [sample_scene(0, i, split=split, kinds=("shapes",), share_two=0.3) for i in range(600)]
        for split in ("train", "held_out", "all")
    }
    rate = {split: np.mean([any(map(is_held_out, s.objects)) for s in scenes]) for split, scenes in by_split.items()}
    assert rate["train"] == 0
    assert rate["held_out"] == 1
    assert 0 < rate["all"] < 0.3
    shown = {(t.colour, t.shape) for s in by_split["train"] for t in s.objects}
    assert len(shown) == len(COLOURS) * len(SHAPES) - 2
    assert {t.motion for s in by_split["train"] for t in s.objects} == set(MOTIONS)


def test_digit_images_of_the_splits_are_disjoint():
    used = {
        split: {s.objects[0].digit_image for s in (sample_scene(0, i, split=split, kinds=["digits"]) for i in range(300))}
        for split in ("train", "held_out")
    }
    assert not used["train"] & used["held_out"]
    assert {int(digits.load()[1][i]) for i in used["held_out"]} == set(range(10))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_colours_are_exact(colour, background):
    frame = still("square", 30.0, 30.0, 7.0, colour, background)
    assert {tuple(pixel) for pixel in frame.reshape(-1, 3)} == {COLOURS[colour], BACKGROUNDS[background]}


def inside(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """The slow statement of the shapes: is a point of the plane inside?"""
    in_box = (abs(dx) <= r) & (abs(dy) <= r)
    return {
        "circle": dx**2 + dy**2 <= r**2,
        "square": in_box,
        "triangle": in_box & (abs(dx) <= (dy + r) / 2),
        "plus": in_box & ((abs(dx) <= r / 3) | (abs(dy) <= r / 3)),
    }[shape]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.5, 7.0, 12.0, 19.2])
def test_edges_are_smooth_and_areas_right(shape, radius):
    x, y, fine = 31.3, 32.6, 16
    point = (np.arange(64 * fine) + 0.5) / fine
    truth = inside(shape, point[None] - x, point[:, None] - y, radius).reshape(64, fine, 64, fine).mean((1, 3))
    drawn = (still(shape, x, y, radius)[..., 0] - 10.0) / 230
    assert np.abs(drawn - truth).max() < 0.2
    assert drawn.sum() == pytest.approx(truth.sum(), rel=0.02)
    if shape in ("square", "plus"):
        assert np.abs(drawn - truth).max() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_not_rounded_to_pixels(shape):
    frames = [still(shape, 30 + step / 4, 30.0, 7.0).astype(int)[..., 0] - 10 for step in range(5)]
    centres = [(frame.sum(0) @ np.arange(64)) / frame.sum() for frame in frames]
    np.testing.assert_allclose(np.diff(centres), 0.25, atol=0.05)


def test_a_digit_is_its_image_enlarged_three_times():
    scene = sample_scene(0, 4, kinds=("digits",), num_frames=1)
    thing = replace(scene.objects[0], x0=32.0, y0=32.0)
    frame = render(replace(scene, objects=(thing,), background="black"))[0].astype(float)
    ink = (frame[20:44, 20:44, 0] - 10) / 230
    np.testing.assert_allclose(ink[1::3, 1::3], digits.load()[0][thing.digit_image], atol=0.003)


@pytest.mark.parametrize("num_frames", [1, 17])
def test_captions_say_what_is_shown(num_frames):
    seen = set()
    for index in range(400):
        scene = sample_scene(5, index, share_two=0.4, num_frames=num_frames)
        text, ground = scene.caption, f" on a {scene.background} background"
        seen.add(text.endswith(ground))
        parts = text.removesuffix(ground).split(" and ")
        assert len(parts) == len(scene.objects)
        for part, thing in zip(parts, scene.objects, strict=True):
            ways = [f" {verb} {thing.motion}" for verb in ("moves", "slides", "goes")]
            ways = {"still": [" stays still"], "grows": [" grows"], "shrinks": [" shrinks"]}.get(thing.motion, ways)
            nouns = [f"a {thing.colour} {thing.shape}", f"a {thing.size} {thing.colour} {thing.shape}"]
            if thing.shape == "digit":
                nouns = [f"the digit {thing.digit}"]
                assert thing.digit == digits.load()[1][thing.digit_image]
            assert part in [noun + way for noun in nouns for way in (ways if num_frames > 1 else [""])]
    assert seen == {True, False}


@pytest.mark.slow
def test_shares_are_kept():
    full = SyntheticScenes(0, kinds="shapes", share_two=1, share_size=1, share_background=1)
    assert all(
        len(s.objects) == 2 and "background" in s.caption and all(t.size in s.caption for t in s.objects)
        for s in map(full.scene, range(50))
    )
    bare = [sample_scene(0, i, kinds="shapes", share_two=0, share_size=0, share_background=0) for i in range(50)]
    assert all(len(s.objects) == 1 and "background" not in s.caption and "large" not in s.caption for s in bare)
    ways = [[t.motion for t in sample_scene(0, i, kinds="shapes", share_two=1, share_two_ways=0.6).objects] for i in range(400)]
    assert np.mean([a != b and {a, b} <= DIRECTIONS.keys() for a, b in ways]) == pytest.approx(0.6 + 0.4 * 0.19, abs=0.07)
    digit_share = np.mean([sample_scene(0, i).objects[0].shape == "digit" for i in range(1000)])
    assert digit_share == pytest.approx(0.15, abs=0.04)


@pytest.mark.parametrize("kind", ["shapes", "sprites"])
@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_two_objects_can_move_in_two_directions(kind, split):
    worlds = SyntheticScenes(3, kinds=kind, split=split, share_two=1, share_two_ways=1)
    for scene in map(worlds.scene, range(60)):
        a, b = scene.objects
        assert a.motion != b.motion
        assert {a.motion, b.motion} <= DIRECTIONS.keys()
        assert split != "train" or not (is_held_out(a) or is_held_out(b))
        assert split != "held_out" or is_held_out(a) or is_held_out(b)
        (ax, ay, ar), (bx, by, br) = a.path(17), b.path(17)
        assert (np.maximum(np.abs(ax - bx), np.abs(ay - by)) >= ar + br + GAP).all()


def test_objects_in_a_picture_stand_still():
    scenes = SyntheticScenes(3, kinds="shapes", share_two=1, share_two_ways=1, num_frames=1)
    assert all(t.motion == "still" for t in scenes.scene(0).objects)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split 'test'.*train, held_out, all"),
        ({"kinds": ("shapes", "cats")}, "kinds.*shapes, digits"),
        ({"kinds": ()}, "kinds"),
        ({"share_two": 1.5}, "share_two 1.5"),
        ({"share_two_ways": -0.1}, "share_two_ways -0.1"),
        ({"num_frames": 0}, "num_frames 0"),
        ({"height": 8}, "height 8.*16"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SyntheticScenes(**options)


@pytest.fixture
def fresh_digits():
    """Clear the cache of the digits before and after the test."""
    digits.load.cache_clear()
    yield
    digits.load.cache_clear()


@pytest.mark.parametrize("content", [None, b"", b"no archive", "cut off", "without labels"])
def test_damaged_digits_are_told(fresh_digits, tmp_path, monkeypatch, content):
    file = tmp_path / "digits.npz"
    if content == "cut off":
        file.write_bytes(digits.PICTURES.read_bytes()[:20_000])
    elif content == "without labels":
        np.savez(file, images=np.zeros((2, 8, 8), np.uint8))
    elif content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(digits, "PICTURES", file)
    with pytest.raises(UserError, match=r"digits\.npz cannot be read: .*install Lumos again"):
        sample_scene(0, 0, kinds=("digits",))
    sample_scene(0, 0, kinds=("shapes",))


def test_digits_are_the_pixels_that_runs_were_made_with():
    images, labels = digits.load()
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    assert sha256(images.tobytes()).hexdigest() == "9f578524b6cec1fc800cc52dfc87ebe56264983d490aa72a4bd928ba2570ec77"
    assert sha256(labels.tobytes()).hexdigest() == "a3c91c262eddcf7ba8f0e37507c30284493c9b20412ffe4af30d536401f7ba21"
