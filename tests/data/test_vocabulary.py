"""The vocabulary of synthetic scenes has all words and objects of captions with every choice, and of drawn scenes."""

from __future__ import annotations

import numpy as np
import pytest

from lumos.data.synthetic import captions
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.scene import BACKGROUNDS, DIGIT_MOTIONS, GRADIENTS, MOTIONS, SHAPES, SIZES, SPRITE_MOTIONS, SceneObject
from lumos.data.synthetic.vocabulary import caption_words, drawn_kinds, drawn_things
from lumos.data.trained_on import words_of


class Every:
    """A stand-in for a random generator whose runs go through every choice, one run each."""

    def __init__(self):
        self.path, self.limits, self.place = [], [], 0

    def integers(self, high: int) -> int:
        if self.place == len(self.path):
            self.path.append(0)
            self.limits.append(high)
        self.place += 1
        return self.path[self.place - 1]

    def random(self, count: int | None = None):
        drawn = [(0.0, 0.999)[self.integers(2)] for _ in range(count or 1)]
        return drawn[0] if count is None else np.array(drawn)

    def runs(self):
        while True:
            self.place = 0
            yield self
            while self.path and self.path[-1] + 1 == self.limits[-1]:
                self.path.pop()
                self.limits.pop()
            if not self.path:
                return
            self.path[-1] += 1


def every_motion(motion: str, wording: str) -> set[str]:
    return {captions._motion(motion, rng, wording) for rng in Every().runs()}


@pytest.mark.parametrize("wording", captions.WORDINGS)
def test_the_phrases_of_motions_are_those_of_every_choice(wording):
    for motion in MOTIONS:
        ways = ([], [motion]) if motion in ("left", "right", "up", "down") else ([motion], [])
        assert set(captions.motion_phrases(wording, *ways)) == every_motion(motion, wording)


@pytest.mark.parametrize("wording", ["plain", "unseen"])
@pytest.mark.parametrize("kind", ["shapes", "digits", "sprites"])
def test_the_words_are_those_of_captions_with_every_choice(kind, wording):
    said, options = set(), {"wording": wording, "share_size": 0.5, "share_background": 0.5}
    make = {
        "shapes": lambda motion: SceneObject(SHAPES[0], "red", "small", motion),
        "digits": lambda motion: SceneObject("digit", "white", "", motion, digit=7),
        "sprites": lambda motion: SceneObject("sprite", "", "", motion, sprite="owl"),
    }[kind]
    motions = {"shapes": MOTIONS, "digits": DIGIT_MOTIONS, "sprites": SPRITE_MOTIONS}[kind]
    for moving in (False, True):
        for motion in motions:
            ask = {"wording": wording, "moving": moving, "share_size": 0.5, "share_background": 0.5}
            said |= {captions.caption([make(motion)], "navy", rng, **ask) for rng in Every().runs()}
    found = caption_words(SyntheticScenes(kinds=(kind,), share_two=0.0, **options))
    varies = {"shapes": {*SHAPES, *SIZES}, "digits": set("0123456789"), "sprites": set()}[kind]
    spoken = {word for text in said for word in words_of(text)}
    things = drawn_things(SyntheticScenes(kinds=(kind,)))
    names = {name for values in things.values() for name in values} | varies | {"a", "an"} | {*BACKGROUNDS, *GRADIENTS}
    assert found - names == spoken - names


def test_drawn_scenes_say_no_other_word_and_show_nothing_else():
    scenes = SyntheticScenes(seed=3, kinds=("shapes", "digits", "sprites"), share_two=0.1, wording="varied")
    words, things = caption_words(scenes), drawn_things(scenes)
    for index in range(300):
        scene = scenes.scene(index)
        assert set(words_of(scene.caption)) <= words
        assert scene.background in things["backgrounds"]
        for thing in scene.objects:
            place = {"sprite": ("emoji", thing.sprite), "digit": ("digits", str(thing.digit))}
            name, value = place.get(thing.shape, ("shapes", thing.shape))
            assert value in things[name]
            assert thing.motion in things["motions"]


def test_options_leave_words_out():
    words = caption_words(SyntheticScenes(kinds=("shapes",), share_two=0.0, share_size=0.0, share_background=0.0))
    assert "red" in words
    assert not words & {"and", "small", "background", "digit", "owl", "sky"}
    assert {"and", "small", "background"} <= caption_words(SyntheticScenes(kinds=("shapes",)))
    assert not caption_words(SyntheticScenes(kinds=("solids",), num_frames=7))


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"kinds": ("shapes", "digits"), "share_digits": 0.0}, {"shapes"}),
        ({"kinds": ("shapes", "digits"), "share_digits": 1.0}, {"digits"}),
        ({"kinds": ("digits",), "share_digits": 0.0}, {"digits"}),
        ({"kinds": ("shapes", "sprites", "digits"), "share_sprites": 0.5}, {"shapes", "sprites", "digits"}),
    ],
)
def test_kinds_that_are_drawn(options, kinds):
    scenes = SyntheticScenes(**options)
    assert drawn_kinds(scenes) == kinds
    assert {scenes._kind(np.random.default_rng(n)) for n in range(200)} == kinds
