"""Measurement of how well a model follows prompts about synthetic scenes.

The prompts are captions of scenes that training does not show. `lumos.evaluation.checker` judges
the clips by their pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos.data.synthetic.drawing import render
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError, instead, shown
from lumos.evaluation.captions import named_attributes
from lumos.evaluation.checker import check_clip, check_identity, identities
from lumos.runtime import check_memory

KINDS: dict[str, dict[str, Any]] = {
    "one": {"kinds": ("shapes",), "share_two": 0.0},
    "two": {"kinds": ("shapes",), "share_two": 1.0},
    "two_ways": {"kinds": ("shapes",), "share_two": 1.0, "share_two_ways": 1.0},
    "digits": {"kinds": ("digits",)},
    "sprites": {"kinds": ("sprites",), "share_two": 0.0},
    "two_sprites": {"kinds": ("sprites",), "share_two": 1.0},
    "held_out": {"kinds": ("shapes",), "share_two": 0.0, "split": "held_out"},
    "held_out_sprites": {"kinds": ("sprites",), "share_two": 0.0, "split": "held_out"},
    "paraphrased": {"kinds": ("shapes", "digits", "sprites"), "share_two": 0.0, "wording": "unseen"},
}
"""The settings of the synthetic scenes of each kind of prompts.

one               one object
two               two objects
two_ways          two objects that move in different directions
digits            a digit
sprites           one sprite
two_sprites       two sprites
held_out          one object in a combination of attributes that training never shows
held_out_sprites  one sprite in a combination of attributes that training never shows
paraphrased       one object, digit or sprite, with a caption in words that training never shows

The scenes of all kinds are new to the model. Their captions may not be: there are so few different
captions of one object that training shows many of them.
"""


MOVES = 0.5
"""The share of the change of a rendered clip, from its first to its last frame, from which a clip counts as moving."""
STILL = 0.5
"""The mean absolute difference of the first and the last frame, of 255, up to which a rendered clip stands still."""

PICTURES_OF = {"two_ways": "two", "held_out_sprites": "sprites"}
"""Kinds that differ from another kind only by their motions, with that other kind.

A picture has no motion.
"""


def check_kinds(kinds: Sequence[str], num_frames: int | None = None) -> None:
    """Raise UserError for a kind that is unknown or named twice, and for a kind that is not possible with this number of frames.

    A kind in PICTURES_OF is not possible with one frame. UserError also if the pictures of a kind's
    sprites are missing.
    """
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"kind {shown(kind)} is named twice; name it once")
        prompt_set(kind, 1, 0, num_frames=17)
        if num_frames == 1 and kind in PICTURES_OF:
            raise UserError(f"{shown(kind)} is about motions, which one frame cannot show; ask for {shown(PICTURES_OF[kind])}")


def prompt_set(kind: str, count: int, seed: int, **shape: int) -> list[tuple[str, np.ndarray, dict]]:
    """Return (prompt, rendered clip uint8 [T, H, W, 3], attributes that the prompt names) of `count` scenes.

    seed: must differ from the seed of training, so that the scenes are new. shape: num_frames,
    height and width of the clips. UserError for an unknown kind, and if the clips do not fit into
    memory.
    """
    if kind not in KINDS:
        raise UserError(f"prompt kind {shown(kind)} is unknown{instead(kind, KINDS)}")
    source = SyntheticScenes(seed=seed, **shape, **KINDS[kind])
    pixels = source.num_frames * source.height * source.width
    check_memory(3 * count * pixels, f"{count:,} clips of {source.num_frames} frames of {source.width}x{source.height} pixels")
    scenes = [source.scene(index) for index in range(count)]
    return [(scene.caption, render(scene), named_attributes(scene)) for scene in scenes]


def score(clips: Sequence[np.ndarray], wanted: Sequence[dict]) -> tuple[dict[str, float], list[dict[str, bool]]]:
    """Check clips, and return (share of right clips for each attribute, verdict on each clip).

    clips: uint8 [T, H, W, 3] each; wanted: for each clip the attributes that its prompt names. The
    share of an attribute counts only clips whose prompt names it. A verdict holds the keys of
    `check_clip` and

    colour_and_motion  both are right
    last_frame         the colours and shapes, digits or sprites of all objects are right in the last frame
    steady             the same attributes are equal in the first and in the last frame, right or wrong
    """
    verdicts = [check_clip(clip, ask) for clip, ask in zip(clips, wanted, strict=True)]
    for clip, ask, verdict in zip(clips, wanted, verdicts, strict=True):
        if "colour" in verdict and "motion" in verdict:
            verdict["colour_and_motion"] = verdict["colour"] and verdict["motion"]
        if len(clip) > 1:
            verdict["last_frame"] = check_identity(clip[-1], ask)["all"]
            verdict["steady"] = identities(clip[-1], ask) == identities(clip[0], ask)
    return shares(verdicts), verdicts


def shares(verdicts: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Return for each key the share of True among the verdicts that have the key."""
    found = defaultdict(list)
    for verdict in verdicts:
        for name, right in verdict.items():
            found[name].append(right)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def moved(clips: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Return the amount of motion in clips, divided by the amount of motion in the rendered clips `truth`.

    The amount of motion is the absolute change from frame to frame, averaged over pixels and clips.
    Decoded clips flicker, so the right amount of motion does not give 1, but the value of
    `--reference reconstruction`.
    """
    ours, theirs = (
        np.mean([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in of]) if len(of[0]) > 1 else 0.0
        for of in (clips, truth)
    )
    return round(float(ours / theirs), 4) if theirs else 0.0


def moving(clip: np.ndarray, truth: np.ndarray) -> dict[str, bool]:
    """Return {"moving": whether the clip changes from its first to its last frame at least half as much as the rendered one}.

    The change is the mean absolute difference of two frames, which the flicker of decoded clips adds to only once. Clips whose
    rendered scene stands still have no key.
    """
    ours, theirs = (float(np.abs(c[-1].astype(np.int16) - c[0]).mean()) for c in (clip, truth))
    return {"moving": ours >= MOVES * theirs} if theirs > STILL else {}


def generate_in_batches(
    make: Callable[..., list[np.ndarray]],
    seed: int,
    batch_size: int,
    prompts: Sequence[str],
    truth: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return the clips of all prompts, made by `make(prompts, seeds, truth or None)` batch by batch.

    Prompt i has the seed `seed` + i, whatever the batch size. truth: for each prompt the clip that
    frames are given from.
    """
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, min(start + batch_size, len(prompts)))
        seeds = [seed + i for i in range(part.start, part.stop)]
        clips += make(list(prompts[part]), seeds, truth and list(truth[part]))
    return clips
