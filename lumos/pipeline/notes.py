"""Notes on a request that can be met, but whose result may be poor. Each function returns a note, or None if there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.request import Resolved
from lumos.video.frames import psnr

FAR = 2.0
"""A size is far from the sizes of the training if the areas, or the aspect ratios, differ by this factor or more."""
PSNR_MARGIN = 1.0
"""A given picture gets a note if its PSNR is lower by more than this, in dB, than the lowest PSNR of training pictures.

The lowest PSNR of other pictures of the same kind differs by some tenths of a dB.
"""
MAX_CHECKED = 4
"""The most given pictures of a batch that go through the video tokenizer to be checked."""


def size_note(clip: ClipDefaults, usual: ClipDefaults) -> str | None:
    """Return a note if the height or width of a clip is far from those of the training, which are the model's `usual` ones."""
    area = usual.height * usual.width if usual.target_size is None else usual.target_size**2
    is_far = abs(math.log(clip.height * clip.width / area)) >= math.log(FAR)
    if usual.target_size is None:
        is_far |= abs(math.log(clip.width * usual.height / (clip.height * usual.width))) >= math.log(FAR)
    if not is_far:
        return None
    return (
        f"the clip is {clip.width} x {clip.height}, far from the {usual.width} x {usual.height} that the model was trained on; it "
        "may repeat or distort things"
    )


def picture_note(pictures: Iterable[np.ndarray], lowest: float, through: Callable[[np.ndarray], np.ndarray]) -> str | None:
    """Return a note if a given picture is of another kind than those of the training.

    pictures: uint8 [H, W, 3]. lowest: the lowest PSNR, in dB, of pictures of the training after the video tokenizer. through: a
    function that encodes and decodes frames, uint8 [1, H, W, 3].
    """
    worst = min((psnr(picture, through(picture[None])[0]) for picture in pictures), default=math.inf)
    if worst >= lowest - PSNR_MARGIN:
        return None
    return (
        f"the given picture loses much in the model's video tokenizer (PSNR {worst:.1f} dB; pictures of its training keep "
        f"{lowest:.1f} dB or more): it is of another kind than the model was trained on, and the clip may not look like it"
    )


def given_pictures(resolved: Resolved) -> list[np.ndarray]:
    """Return the first given picture of each clip, and a picture of its last frame, at most MAX_CHECKED different ones."""
    last = resolved.clip.num_frames - 1
    ends = [frames[n] for frames in resolved.given if frames for n in sorted({min(frames), last} & frames.keys())]
    return list({id(picture): picture for picture in ends}.values())[:MAX_CHECKED]


def lowest_psnr(pictures: Sequence[np.ndarray], through: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the lowest PSNR, in dB, of pictures uint8 [H, W, 3] that go through the video tokenizer and back."""
    return round(min(psnr(picture, through(picture[None])[0]) for picture in pictures), 2)
