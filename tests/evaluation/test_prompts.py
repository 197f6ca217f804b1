from __future__ import annotations

import numpy as np
import pytest

from lumos.data.synthetic.sampling import sample_scene
from lumos.data.synthetic.scene import is_held_out
from lumos.errors import UserError
from lumos.evaluation.prompts import KINDS, generate_in_batches, moved, prompt_set, score


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_truth_is_judged_right_and_a_wrong_clip_wrong(kind):
    _, truth, wanted = zip(*prompt_set(kind, 8, seed=77), strict=True)
    shares, verdicts = score(truth, wanted)
    assert (shares["all"], shares["last_frame"], shares["steady"]) == (1.0, 1.0, 1.0)
    assert len(verdicts) == 8
    shares, _ = score([np.full_like(t, 10) for t in truth], wanted)
    assert (shares["all"], shares["last_frame"]) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "digits", "sprites"])
def test_an_object_that_changes_into_another_is_not_steady(kind):
    """The second half of each clip is replaced by a part of a clip with another object."""
    _, truth, wanted = zip(*prompt_set(kind, 12, seed=78), strict=True)
    named = [tuple(ask["objects"][0].get(key) for key in ("colour", "shape", "digit", "sprite")) for ask in wanted]
    other = [next(j for j in range(12) if named[j] != mine) for mine in named]
    turned = [np.concatenate([truth[i][:9], truth[j][9:]]) for i, j in enumerate(other)]
    found, _ = score(turned, wanted)
    assert (found["last_frame"], found["steady"]) == (0.0, 0.0)
    found, _ = score([truth[j] for j in other], wanted)
    assert (found["last_frame"], found["steady"]) == (0.0, 1.0)


def test_motion_is_measured_relative_to_the_truth():
    _, truth, _ = zip(*prompt_set("one", 6, seed=77), strict=True)
    assert moved(truth, truth) == 1.0
    assert moved([clip[:1].repeat(17, 0) for clip in truth], truth) == 0.0
    assert moved([clip[::2] for clip in truth], truth) > 1.2


def test_each_kind_of_prompt_has_its_scenes():
    assert all(" and " in prompt for prompt, _, _ in prompt_set("two", 8, seed=1))
    assert all("digit" in prompt for prompt, _, _ in prompt_set("digits", 8, seed=1))
    scenes = [sample_scene(1, i, **KINDS["held_out"]) for i in range(20)]
    assert all(any(is_held_out(thing) for thing in scene.objects) for scene in scenes)
    scenes = [sample_scene(1, i, **KINDS["held_out_sprites"]) for i in range(20)]
    assert all(len(scene.objects) == 1 and is_held_out(scene.objects[0]) and scene.objects[0].sprite for scene in scenes)
    scenes = [sample_scene(1, i, **KINDS["one"]) for i in range(200)]
    assert not any(is_held_out(thing) for scene in scenes for thing in scene.objects)
    with pytest.raises(UserError, match="allowed: one, two, two_ways, digits, sprites, two_sprites, held_out, held"):
        prompt_set("three", 1, seed=0)


def test_batches_do_not_change_prompts_or_seeds():
    calls = []

    def make(prompts, seeds, pictures):
        calls.append(len(prompts))
        return list(zip(prompts, seeds, strict=True)) if pictures is None else list(zip(prompts, pictures, strict=True))

    prompts = [str(i) for i in range(7)]
    expected = [(str(i), 100 + i) for i in range(7)]
    assert generate_in_batches(make, 100, 3, prompts) == expected
    assert calls == [3, 3, 1]
    assert generate_in_batches(make, 100, 50, prompts) == expected
    assert generate_in_batches(make, 100, 3, prompts, prompts) == [(text, text) for text in prompts]
