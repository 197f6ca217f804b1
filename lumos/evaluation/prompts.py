"""Does a model do what prompts of the small worlds say? Held-out scenes give the prompts, `checker` judges the pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos.data.synthetic.render import Worlds, render
from lumos.errors import UserError, shown
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
"""one: an object; two: two objects; two_ways: two objects that move, each its own way; digits; sprites; two_sprites; held_out,
held_out_sprites: one object or sprite in a combination that training never shows; paraphrased: one thing of any kind, said in
ways that training never hears. Scenes are new in all kinds; of one thing there are so few sentences that training has read many."""


PICTURES_OF = {"two_ways": "two", "held_out_sprites": "sprites"}
"""Kinds that differ from others by their motions, which a picture has not."""


def check_kinds(kinds: Sequence[str], num_frames: int | None = None) -> None:
    """UserError for kinds that are unknown, named twice, without their pictures, or no kind of their own in one frame."""
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"kind {shown(kind)} is named twice; name it once")
        prompt_set(kind, 1, 0, num_frames=17)
        if num_frames == 1 and kind in PICTURES_OF:
            raise UserError(f"{shown(kind)} is told by its motions, which one frame has not; ask for {shown(PICTURES_OF[kind])}")


def prompt_set(kind: str, count: int, seed: int, **shape: int) -> list[tuple[str, np.ndarray, dict]]:
    """(prompt, rendered truth, attributes that the prompt names) of scenes.

    `seed` must differ from that of training, whose scenes are of another stream.
    """
    if kind not in KINDS:
        raise UserError(f"prompt kind {shown(kind)} is unknown; allowed: {', '.join(KINDS)}")
    worlds = Worlds(seed=seed, **shape, **KINDS[kind])
    pixels = worlds.num_frames * worlds.height * worlds.width
    check_memory(3 * count * pixels, f"{count:,} clips of {worlds.num_frames} frames of {worlds.width}x{worlds.height} pixels")
    scenes = [worlds.scene(index) for index in range(count)]
    return [(scene.caption, render(scene), named_attributes(scene)) for scene in scenes]


def score(clips: Sequence[np.ndarray], wanted: Sequence[dict]) -> tuple[dict[str, float], list[dict[str, bool]]]:
    """(share right of each attribute among the clips of which it is wanted, verdict of each clip).

    Beside the attributes and "all" of `check_clip`: colour_and_motion; last_frame: colour and shape, digit or sprite, of all things
    are right in the last frame; steady: they are there what they are in the first, right or wrong.
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
    """Share of True of each key, among the verdicts that have it."""
    found = defaultdict(list)
    for verdict in verdicts:
        for name, right in verdict.items():
            found[name].append(right)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def moved(clips: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Change from frame to frame, mean over pixels and clips, over that of the rendered truth.

    A tokenizer flickers, so that clips with as much motion as was asked for have what `--reference reconstruction` gives, not 1.
    """
    ours, theirs = (
        np.mean([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in of]) if len(of[0]) > 1 else 0.0
        for of in (clips, truth)
    )
    return round(float(ours / theirs), 4) if theirs else 0.0


def is_kept(frame: np.ndarray, picture: np.ndarray) -> bool:
    """A clip's first frame is the given picture as the tokenizer gives it back, both uint8 [H, W, 3], to 2 of 255 on average."""
    return float(np.abs(frame.astype(np.int16) - picture).mean()) <= 2


def generate_in_batches(
    make: Callable[..., list[np.ndarray]],
    seed: int,
    batch_size: int,
    prompts: Sequence[str],
    pictures: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Clips of all prompts, prompt i with seed + i, whatever the batch size: `make(prompts, seeds, pictures or None)`."""
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, min(start + batch_size, len(prompts)))
        seeds = [seed + i for i in range(part.start, part.stop)]
        clips += make(list(prompts[part]), seeds, pictures and list(pictures[part]))
    return clips
