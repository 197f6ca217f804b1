"""A stream gives the frames of a call as soon as they are made, and stops working when its reader stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lumos import LumosPipeline
from lumos.errors import UserError


@pytest.fixture(scope="module")
def pipe(micro_folder) -> LumosPipeline:
    return LumosPipeline.from_pretrained(micro_folder)


def joined(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(clip) for clip in zip(*parts, strict=True)]


PICTURE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 13},
        {"num_frames": 1},
        {"num_frames": 9, "image": PICTURE},
        {"num_frames": 13, "video": np.stack([PICTURE] * 5), "history_mask_ratio": 0.0},
        {"num_frames": 17, "later_prompts": [(5, "x"), (13, "the digit 7 moves up")], "num_videos_per_prompt": 2},
        {"num_frames": 25, "history_frames": 2, "history_thinning": True, "later_prompts": [(21, "x")]},
        {"num_frames": 25, "history_frames": 1, "num_videos_per_prompt": 2, "height": 8, "width": 16},
    ],
)
def test_streamed_frames_are_those_of_a_call(pipe, options):
    parts = list(pipe.stream("a red circle", seed=3, **options))
    whole = pipe("a red circle", seed=3, output_type="uint8", **options).frames
    for streamed, clip in zip(joined(parts), whole, strict=True):
        assert streamed.dtype == np.uint8
        assert streamed.shape == clip.shape
        assert np.array_equal(streamed, clip)
    given = 1 + (len(options.get("video", ())) - 1) // 4 * 4 if "video" in options else 1
    assert [len(part[0]) for part in parts] == [given, *[4] * ((len(whole[0]) - given) // 4)]


def test_frames_come_as_soon_as_their_latent_frame_is_done(pipe):
    steps = []
    stream = pipe.stream("a red circle", num_frames=13, seed=0, on_step=lambda *step: steps.append(step))
    assert steps == []
    for latent_frame in range(4):
        next(stream)
        assert steps == [(frame, 4, step, 2) for frame in range(latent_frame + 1) for step in range(2)]
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_ends_the_work(pipe):
    steps = []
    stream = pipe.stream("a red circle", num_frames=17, seed=0, on_step=lambda *step: steps.append(step))
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert len(steps) == 2


def test_mistakes_are_told_before_the_first_frame(pipe):
    with pytest.raises(UserError, match="num_frames 6"):
        pipe.stream("x", num_frames=6)
    with pytest.raises(UserError, match="unexpected argument 'output_type'; LumosPipeline takes prompt, negative_prompt"):
        pipe.stream("x", output_type="pil")
    with pytest.raises(UserError, match="unexpected argument 'num_inference_step', did you mean num_inference_steps"):
        pipe.stream("x", num_inference_step=3)
