"""The checker agrees with the truth, also under mild damage, and disagrees with everything else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from lumos.data.synthetic.drawing import render
from lumos.data.synthetic.sampling import SyntheticScenes, sample_scene
from lumos.data.synthetic.scene import Scene, SceneObject
from lumos.errors import UserError
from lumos.evaluation.captions import parse_caption, scene_attributes
from lumos.evaluation.checker import check_clip, inspect_clip


def clip(*things: tuple, background: str = "black", num_frames: int = 17) -> np.ndarray:
    """Things as (shape, colour, motion, radius, x, y, speed)."""
    factor = {"grows": 1.6, "shrinks": 0.5}
    drawn = tuple(
        SceneObject(shape, colour, "", motion, radius, radius * factor.get(motion, 1), x, y, speed)
        for shape, colour, motion, radius, x, y, speed in things
    )
    return render(Scene(drawn, background, "", num_frames, 8, 64, 64))


RED_LEFT = ("circle", "red", "left", 7, 50, 20, 1.5)
BLUE_STILL = ("square", "blue", "still", 7, 20, 50, 0)


def damaged(video: np.ndarray, blur: float, noise: float, seed: int) -> np.ndarray:
    soft = gaussian_filter(video.astype(np.float32), (0, blur, blur, 0))
    soft += np.random.default_rng(seed).normal(0, noise, video.shape)
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "blur", "noise"), [
    (64, 0, 0), (64, 0.8, 6), (128, 0, 0),
    *(pytest.param(64, *damage, marks=pytest.mark.thorough) for damage in ((0, 6), (0.8, 0))),
])  # fmt: skip
def test_truth_is_recognised(side, blur, noise, times):
    worlds = SyntheticScenes(11, split="all", share_two=0.25, share_digits=0.25, height=side, width=side)
    total, right = Counter(), Counter()
    for index in range(times(50 if side == 64 else 20, 200 if side == 64 and blur == noise == 0 else 100)):
        scene = worlds.scene(index)
        for key, value in check_clip(damaged(render(scene), blur, noise, index), scene).items():
            total[key] += 1
            right[key] += value
    assert set(total) == {"count", "colour", "shape", "size", "motion", "background", "all"}
    assert {key: right[key] / total[key] for key in total if right[key] < 0.99 * total[key]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("size", [{"num_frames": 1}, {"num_frames": 33}, {"height": 128, "width": 96}])
def test_truth_is_recognised_at_other_sizes(size):
    scenes = [sample_scene(2, index, **size) for index in range(15)]
    assert all(check_clip(render(scene), scene)["all"] for scene in scenes)
    assert all(check_clip(render(scene), scene.caption)["all"] for scene in scenes)


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red circle moves left on a black background", set()),
        ("a circle", set()),
        ("a green circle moves left", {"colour"}),
        ("a red square moves left", {"shape"}),
        ("the digit 0 moves left", {"shape"}),
        ("a large red circle moves left", {"size"}),
        ("a red circle moves right", {"motion"}),
        ("a red circle moves up", {"motion"}),
        ("a red circle stays still", {"motion"}),
        ("a red circle grows", {"motion"}),
        ("a red circle moves left on a navy background", {"background"}),
        ("a red circle moves left and a blue square stays still", {"count", "colour", "shape", "motion"}),
        ("a large blue plus shrinks on a gray background", {"colour", "shape", "size", "motion", "background"}),
    ],
)
def test_each_attribute_can_be_wrong(caption, wrong):
    result = check_clip(clip(RED_LEFT), caption)
    assert {key for key, value in result.items() if not value} == (wrong | {"all"} if wrong else set())


def test_two_objects_are_told_apart():
    video = clip(RED_LEFT, BLUE_STILL)
    assert check_clip(video, "a red circle moves left and a blue square stays still")["all"]
    assert check_clip(video, "a blue square stays still and a red circle moves left")["all"]
    swapped = check_clip(video, "a red circle stays still and a blue square moves left")
    assert swapped == {"count": True, "colour": True, "shape": True, "motion": False, "all": False}
    one = check_clip(video, "a red circle moves left")
    assert one == {"count": False, "colour": True, "shape": True, "motion": True, "all": False}


def test_two_objects_of_one_colour_are_counted():
    twins = clip(RED_LEFT, ("circle", "red", "left", 7, 50, 50, 1.5))
    assert inspect_clip(twins).count == 2
    assert not check_clip(twins, "a red circle moves left")["all"]


@pytest.mark.parametrize("noise", [0, 6])
def test_no_object_is_wrong(noise):
    empty = damaged(clip(), 0, noise, 0)
    result = check_clip(empty, "a red circle moves left on a black background")
    assert result.pop("background")
    assert not any(result.values())


def test_an_object_that_is_mostly_absent_is_wrong():
    video = clip(RED_LEFT)
    video[:9] = clip(num_frames=9)
    assert inspect_clip(video).objects == ()


def test_random_pixels_are_wrong():
    video = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert not check_clip(video, "a red circle moves left on a gray background")["all"]


def test_a_shape_of_another_kind_is_unclear():
    video = clip(num_frames=5)
    video[:, 20:24, 10:50] = (220, 40, 40)
    assert inspect_clip(video).objects[0].shape == "unclear"


def test_a_diagonal_way_is_unclear():
    right = clip(("circle", "red", "right", 7, 15, 15, 1.5))
    both = np.stack([np.roll(frame, round(1.5 * t), axis=0) for t, frame in enumerate(right)])
    assert inspect_clip(right).objects[0].motion == "right"
    assert inspect_clip(both).objects[0].motion == "unclear"


def test_measures_are_in_pixels():
    seen = inspect_clip(clip(("triangle", "cyan", "down", 12, 30, 20, 1.3))).objects[0]
    assert seen.radius == pytest.approx(12, abs=0.2)
    assert seen.way == pytest.approx((0, 16 * 1.3), abs=0.2)
    assert seen.growth == pytest.approx(1, abs=0.02)
    grown = inspect_clip(clip(("triangle", "cyan", "grows", 12, 30, 30, 0))).objects[0]
    assert grown.growth == pytest.approx(1.6, abs=0.03)
    assert grown.way == pytest.approx((0, 0), abs=0.2)


def test_digits_are_read():
    scene = sample_scene(1, 0, kinds=("digits",))
    other = (scene.objects[0].digit + 1) % 10
    assert check_clip(render(scene), f"the digit {scene.objects[0].digit}")["all"]
    assert check_clip(render(scene), f"the digit {other}") == {"count": True, "shape": False, "all": False}
    assert not check_clip(render(scene), "a white circle")["shape"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1, 17]))
def test_captions_are_parsed_back(index, num_frames):
    scene = sample_scene(7, index, split="all", share_two=0.4, num_frames=num_frames)
    full = scene_attributes(scene)
    parsed = parse_caption(scene.caption)
    assert ("background" in parsed) == ("background" in scene.caption)
    assert parsed.get("background", scene.background) == scene.background
    for named, true, thing in zip(parsed["objects"], full["objects"], scene.objects, strict=True):
        assert named.items() <= true.items()
        may_be_missing = {"size"} if thing.shape != "digit" else {"colour"}
        assert set(true) - set(named) <= may_be_missing


def test_captions_by_hand():
    assert parse_caption("  The Digit 7 goes UP on a grey background. ") == {
        "objects": [{"shape": "digit", "digit": 7, "motion": "up"}],
        "background": "gray",
    }
    assert parse_caption("plus") == {"objects": [{"shape": "plus"}]}
    with pytest.raises(UserError, match="purple elephant"):
        parse_caption("a purple elephant dances")


def test_a_scene_is_checked_beyond_its_caption():
    scene = replace(sample_scene(0, 0, kinds=("shapes",), share_two=0), caption="a circle")
    assert {"colour", "size", "motion", "background"} <= set(check_clip(render(scene), scene))


@pytest.mark.parametrize("video", [np.zeros((64, 64, 3), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(video):
    with pytest.raises(UserError, match="uint8"):
        inspect_clip(video)
