"""The checker of sprites agrees with the truth, also under mild damage, and disagrees with everything else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from lumos.cli import main
from lumos.data.synthetic import sprites
from lumos.data.synthetic.drawing import SPRITE_RADIUS, ground_colours, render, sprite_pixels
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.scene import BACKGROUNDS, GRADIENTS, Scene, SceneObject
from lumos.errors import UserError
from lumos.evaluation.checker import check_clip
from lumos.evaluation.sprites import REACH, _likeness, inspect_sprites


def clip(*things: tuple, background: str = "sky", num_frames: int = 17) -> np.ndarray:
    """Sprites as (name, motion, x, y, speed), or (name, motion, x, y, speed, radius)."""
    drawn = []
    for name, motion, x, y, speed, *radius in things:
        start = radius[0] if radius else SPRITE_RADIUS
        end = start * (1.6 if motion == "grows" else 1)
        drawn.append(SceneObject("sprite", "", "", motion, start, end, x, y, speed, sprite=name))
    return render(Scene(tuple(drawn), background, "", num_frames, 8, 64, 64))


OWL_LEFT = ("owl", "left", 48, 17, 1.5)
CAR_STILL = ("car", "still", 30, 47, 0)


def damaged(video: np.ndarray, blur: float, noise: float, seed: int) -> np.ndarray:
    soft = gaussian_filter(video.astype(np.float32), (0, blur, blur, 0))
    soft += np.random.default_rng(seed).normal(0, noise, video.shape)
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "blur", "noise"), [
    (64, 0, 0), (128, 1.6, 6), *(pytest.param(side, 0.8, 6, marks=pytest.mark.thorough) for side in (64, 128)),
])  # fmt: skip
def test_truth_is_recognised(side, blur, noise, times):
    worlds = SyntheticScenes(11, split="all", kinds="sprites", share_two=0.3, height=side, width=side)
    total, right = Counter(), Counter()
    for index in range(times(25, 100)):
        scene = worlds.scene(index)
        for key, value in check_clip(damaged(render(scene), blur, noise, index), scene).items():
            total[key] += 1
            right[key] += value
    assert set(total) == {"count", "sprite", "motion", "background", "all"}
    assert {key: right[key] / total[key] for key in total if right[key] < 0.99 * total[key]} == {}


@pytest.mark.parametrize("size", [{"num_frames": 1}, {"num_frames": 33}, {"height": 48, "width": 64}])
def test_truth_is_recognised_at_other_sizes(size):
    worlds = SyntheticScenes(12, split="all", kinds="sprites", share_two=0.3, **size)
    assert all(check_clip(damaged(render(worlds.scene(i)), 0.5, 4, i), worlds.scene(i))["all"] for i in range(15))


@pytest.mark.parametrize("background", [*BACKGROUNDS, *GRADIENTS])
def test_real_pictures_are_recognised_on_every_ground(repo, background):
    for path in (repo / "tests" / "sprites").glob("*.png"):
        video = damaged(clip((path.stem, "still", 30.4, 33.7, 0), background=background, num_frames=1), 0.8, 6, 0)
        assert check_clip(video, f"a {path.stem} on a {background} background")["all"], path.stem


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("an owl moves left on a sky background", set()),
        ("an owl", set()),
        ("a penguin moves left", {"sprite"}),
        ("a star moves left", {"sprite"}),
        ("an owl moves right", {"motion"}),
        ("an owl moves up", {"motion"}),
        ("an owl stays still", {"motion"}),
        ("an owl grows", {"motion"}),
        ("an owl moves left on a meadow background", {"background"}),
        ("an owl moves left on a navy background", {"background"}),
        ("an owl and a car move left", {"count", "sprite", "motion"}),
        ("a car goes down on a sunset background", {"sprite", "motion", "background"}),
    ],
)
def test_each_attribute_can_be_wrong(caption, wrong):
    result = check_clip(clip(OWL_LEFT), caption)
    assert {key for key, value in result.items() if not value} == (wrong | {"all"} if wrong else set())


def test_every_pair_of_pictures_is_told_apart():
    for name in sprites.SPRITES:
        (seen,) = inspect_sprites(damaged(clip((name, "still", 31.7, 30.2, 0), num_frames=1), 0.8, 6, 1))[1]
        assert seen.sprite == name
        assert seen.likeness > 0.8


@pytest.mark.parametrize("motion", ["left", "right", "up", "down", "still"])
def test_every_motion_is_measured_in_pixels(motion):
    right, down = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[motion]
    speed = 1.3 if motion != "still" else 0
    (seen,) = inspect_sprites(clip(("fish", motion, 32 - 10 * right, 32 - 10 * down, speed)))[1]
    assert seen.motion == motion
    assert seen.way == pytest.approx((16 * 1.3 * right, 16 * 1.3 * down), abs=0.3)


def test_two_sprites_are_told_apart():
    video = clip(OWL_LEFT, CAR_STILL)
    assert check_clip(video, "an owl moves left and a car stays still")["all"]
    assert check_clip(video, "a car stays still and an owl moves left")["all"]
    swapped = check_clip(video, "an owl stays still and a car moves left")
    assert swapped == {"count": True, "sprite": True, "motion": False, "all": False}
    one = check_clip(video, "an owl moves left")
    assert one == {"count": False, "sprite": True, "motion": True, "all": False}
    assert not check_clip(video, "an owl moves left and a star stays still")["sprite"]


def test_sprites_that_meet_in_time_keep_their_tracks():
    """They pass each other's column at a distance of two pixels."""
    video = clip(("owl", "right", 15, 17, 1.9), ("car", "left", 49, 45, 1.9))
    assert check_clip(video, "an owl moves right and a car moves left")["all"]
    assert not check_clip(video, "an owl moves left and a car moves right")["all"]


def test_two_equal_sprites_are_counted_as_two():
    twins = clip(OWL_LEFT, ("owl", "left", 48, 47, 1.5))
    assert inspect_sprites(twins)[2] == 2
    assert not check_clip(twins, "an owl moves left")["all"]
    assert check_clip(twins, "an owl and an owl move left")["all"]


def nothing(noise: float) -> np.ndarray:
    return damaged(clip(), 0, noise, 0)


def mostly_absent() -> np.ndarray:
    video = clip(OWL_LEFT)
    video[:9] = clip(num_frames=9)
    return video


def one_of_another_kind() -> np.ndarray:
    video = clip()
    video[:, 20:40, 20:40] = (220, 40, 40)
    return video


def diagonal() -> np.ndarray:
    return np.stack([np.roll(frame, round(1.5 * t), axis=0) for t, frame in enumerate(clip(OWL_LEFT, background="navy"))])


def random_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)


def sprite_of_other_size() -> np.ndarray:
    return clip(("owl", "left", 48, 17, 1.5, 6.0))


@pytest.mark.parametrize(
    ("video", "wrong"),
    [
        (lambda: nothing(0), {"count", "sprite", "motion"}),
        (lambda: nothing(6), {"count", "sprite", "motion"}),
        (mostly_absent, {"count", "sprite", "motion"}),
        (random_pixels, {"sprite", "motion"}),
        (one_of_another_kind, {"sprite", "motion"}),
        (diagonal, {"motion"}),
        (lambda: clip(("owl", "grows", 32, 32, 0, 8.0)), {"motion"}),
        (sprite_of_other_size, {"sprite"}),
        (lambda: clip(OWL_LEFT, CAR_STILL), {"count"}),
        (lambda: clip(OWL_LEFT, CAR_STILL, ("star", "still", 12, 30, 0, 6.0)), {"count"}),
    ],
)
def test_a_sprite_that_was_not_requested_is_wrong(video, wrong):
    result = check_clip(video(), "an owl moves left")
    assert not result["all"]
    assert wrong <= {key for key, value in result.items() if not value}


def test_shapes_are_not_taken_for_sprites_or_sprites_for_shapes():
    shapes = [SyntheticScenes(2, kinds=kind, num_frames=5).scene(i) for kind in ("shapes", "digits") for i in range(8)]
    assert not any(check_clip(render(scene), "an owl moves left")["all"] for scene in shapes)
    shown = [SyntheticScenes(2, kinds="sprites", share_two=0, num_frames=5).scene(i) for i in range(12)]
    assert not any(check_clip(render(scene), "a small red circle")["all"] for scene in shown)


@pytest.mark.parametrize("background", ["navy", "meadow"])
def test_likeness_is_the_best_correlation_with_a_drawn_picture(background):
    """The slow rule: draw every picture at every place on the ground, and compare the pixels that differ from the ground."""
    frame = damaged(clip(OWL_LEFT, background=background, num_frames=1), 0.5, 4, 0)[0]
    ground = ground_colours(background, 64).astype(np.float32)
    left, top, side = 33, 6, 26
    found = _likeness(frame, ground, (left + 1, top, left + side - 1, top + side), 1.0)
    centres = (np.arange(side, dtype=np.float32) + 0.5 - side / 2)[None]
    for index, name in enumerate(sprites.SPRITES):
        if name not in ("owl", "car", "bee", "tree"):
            continue
        picture = sprite_pixels(sprites.load(name), centres, centres, np.float32([[SPRITE_RADIUS]]))[0]
        best = -1.0
        for y in range(top - REACH, top + REACH + 1):
            for x in range(left - REACH, left + REACH + 1):
                under = ground[y : y + side, None]
                drawn = (255 * picture[..., :3] + (1 - picture[..., 3:]) * under) - under
                seen = frame[y : y + side, x : x + side] - under
                best = max(best, float((drawn * seen).sum() / np.linalg.norm(drawn) / np.linalg.norm(seen)))
        assert found[index] == pytest.approx(best, abs=1e-4)
    assert sprites.SPRITES[found.argmax()] == "owl"


def test_tolerance_of_a_sprite_place_scales_with_the_frame():
    """The size of a motion counts as a share of the frame, not in pixels."""
    for scale in (1, 2):
        radius = SPRITE_RADIUS * scale
        thing = SceneObject("sprite", "", "", "still", radius, radius, 30 * scale, 33 * scale, 0, sprite="owl")
        frame = render(Scene((thing,), "navy", "", 1, 8, 64 * scale, 64 * scale))[0].astype(np.float32)
        ground = ground_colours("navy", 64 * scale).astype(np.float32)
        middle = [round((at + offset) * scale) for at, offset in ((30, 2), (33, -2))]
        box = (*(at - 10 * scale for at in middle), *(at + 10 * scale for at in middle))
        found = _likeness(frame, ground, box, float(scale))
        assert (sprites.SPRITES[found.argmax()], found.max()) == ("owl", pytest.approx(1, abs=0.03))


def test_a_sprite_beside_a_shape_is_refused():
    with pytest.raises(UserError, match="a sprite beside a shape or digit cannot be checked"):
        check_clip(clip(OWL_LEFT), "an owl moves left and a red circle moves left")


@pytest.mark.parametrize("video", [np.zeros((64, 64, 3), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(video):
    with pytest.raises(UserError, match="uint8"):
        check_clip(video, "an owl")


def test_missing_pictures_are_explained(tmp_path, monkeypatch):
    video = clip(OWL_LEFT)
    assert check_clip(video, "an owl")["all"]
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path))
    with pytest.raises(UserError, match=r"is missing: .*unset it to use the pictures that come with Lumos"):
        check_clip(video, "an owl")


def test_missing_pictures_are_one_line_at_the_command_line(no_sprite_pictures, micro_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(["evaluate", "prompts", "--model", str(micro_folder), "--kinds", "sprites", "--count", "1", "--output", "x.json"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2
    assert len(errors) == 1
    assert "LUMOS_SPRITES names this folder: unset it" in errors[0]
    assert not (tmp_path / "x.json").exists()
