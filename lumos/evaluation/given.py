"""Evaluation of clips of which some frames are given: whether those are kept, and how near the others come to the truth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from lumos.errors import UserError, instead, shown
from lumos.evaluation.quality import MAX_PSNR
from lumos.video.frames import psnr

GIVEN = ("first", "prediction", "ends", "interpolation")
"""The names of the patterns of given frames.

first          the first frame
prediction     the first frames: four, or 1 + the temporal compression where latent frames hold several frames
ends           the first and the last frame
interpolation  every second frame, from the first to the last
"""
TOLERANCE = 2.0
"""The mean absolute difference, of 255, up to which two frames count as equal."""


def given_numbers(pattern: str, num_frames: int, temporal_compression: int = 1) -> list[int]:
    """Return the numbers of the frames that a pattern gives, in order. UserError for clips that are too short for it."""
    if pattern not in GIVEN:
        raise UserError(f"pattern of given frames {shown(pattern)} is unknown{instead(pattern, GIVEN)}")
    if pattern == "interpolation" and num_frames % 2 == 0:
        raise UserError(f"num_frames {num_frames} is even; where every second frame is given, the first and the last one are too")
    numbers = {
        "first": [0],
        "prediction": list(range(4 if temporal_compression == 1 else 1 + temporal_compression)),
        "ends": [0, num_frames - 1],
        "interpolation": list(range(0, num_frames, 2)),
    }[pattern]
    if len(set(numbers)) < len(numbers) or len(numbers) >= num_frames:
        raise UserError(f"clips of {num_frames} frames are too short for the pattern {pattern}; set a larger num_frames")
    return numbers


def arguments_of(pattern: str, clips: Sequence[np.ndarray], numbers: Sequence[int]) -> dict[str, list[Any]]:
    """Return the arguments of a pipeline's call that give the frames `numbers` of the clips, uint8 [T, H, W, 3]."""
    if pattern == "first":
        return {"image": [clip[0] for clip in clips]}
    if pattern == "prediction":
        return {"video": [clip[: len(numbers)] for clip in clips]}
    return {"given_frames": [{number: clip[number] for number in numbers} for clip in clips]}


def reconstructed(reconstruct: Callable[[np.ndarray], np.ndarray], clip: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Return the frames `numbers` of a clip, uint8 [T, H, W, 3], as the tokenizer reconstructs them: uint8 [n, H, W, 3].

    reconstruct: returns the reconstruction of a clip. Frames at the beginning are one clip, other frames are pictures.
    """
    if list(numbers) == list(range(len(numbers))):
        return reconstruct(clip[: len(numbers)])
    return np.concatenate([reconstruct(clip[n : n + 1]) for n in numbers])


def is_kept(frame: np.ndarray, picture: np.ndarray) -> bool:
    """Return whether a frame of a clip equals the given picture as the tokenizer reconstructs it, both uint8 [H, W, 3].

    They count as equal if their mean absolute difference is at most TOLERANCE.
    """
    return float(np.abs(frame.astype(np.int16) - picture).mean()) <= TOLERANCE


def blended(clip: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Return a clip, uint8 [T, H, W, 3], whose frames between given ones are linear mixtures of the two nearest.

    Frames before the first given frame and after the last one are copies of it.
    """
    frames = clip.astype(np.float32)
    mixed = np.empty_like(frames)
    for t in range(len(clip)):
        before = max((n for n in numbers if n <= t), default=numbers[0])
        after = min((n for n in numbers if n >= t), default=numbers[-1])
        share = (t - before) / (after - before) if after > before else 0.0
        mixed[t] = (1 - share) * frames[before] + share * frames[after]
    return np.rint(mixed).astype(np.uint8)


def made_quality(
    clips: Sequence[np.ndarray], truth: Sequence[np.ndarray], numbers: Sequence[int], reconstructions: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return the PSNR in dB of the frames that are not given, {"psnr", "psnr_blend", "psnr_reconstruction"}.

    psnr_blend is that of `blended`, which a model must exceed; psnr_reconstruction is that of the truth as the latents
    reconstruct it, which a model can hardly exceed.
    """
    open_ = [t for t in range(len(truth[0])) if t not in set(numbers)]
    of = {"psnr": clips, "psnr_blend": [blended(clip, numbers) for clip in truth], "psnr_reconstruction": reconstructions}
    return {name: pooled_psnr(made, truth, open_) for name, made in of.items()}


def pooled_psnr(clips: Sequence[np.ndarray], truth: Sequence[np.ndarray], frames: Collection[int]) -> float:
    """Return the PSNR in dB of some frames of all clips together, at most MAX_PSNR.

    The squared errors are averaged, not the decibels: a clip that stands still, of which a mixture of given frames is exact,
    would outweigh all others.
    """
    numbers = list(frames)
    ours, theirs = (np.concatenate([clip[numbers] for clip in of]) for of in (clips, truth))
    return round(min(psnr(ours, theirs), MAX_PSNR), 3)
