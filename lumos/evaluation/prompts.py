"""Does a model do what prompts of the small worlds say? Held-out scenes give the prompts, `checker` judges the pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lumos.data.worlds import Worlds
from lumos.errors import UserError
from lumos.evaluation.checker import check_clip

KINDS: dict[str, dict[str, Any]] = {
    "one": {"kinds": ("shapes",), "share_two": 0.0},
    "two": {"kinds": ("shapes",), "share_two": 1.0},
    "digits": {"kinds": ("digits",)},
    "held_out": {"kinds": ("shapes",), "share_two": 0.0, "split": "held_out"},
}
"""one: an object; two: two objects; digits; held_out: one object in a combination that training never shows."""


def prompt_set(kind: str, count: int, seed: int, **shape: int) -> list[tuple[str, np.ndarray]]:
    """(prompt, rendered truth) pairs. `seed` must differ from that of training, whose scenes are of another stream."""
    if kind not in KINDS:
        raise UserError(f"prompt kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    worlds = Worlds(seed=seed, **shape, **KINDS[kind])
    pairs = []
    for index in range(count):
        video, caption = worlds[index]
        pairs.append((caption, video))
    return pairs


def score(clips: Sequence[np.ndarray], prompts: Sequence[str]) -> tuple[dict[str, float], list[dict[str, bool]]]:
    """(share right of each attribute among the prompts that name it, verdict of each clip); "colour_and_motion" too."""
    verdicts = [check_clip(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    for verdict in verdicts:
        if "colour" in verdict and "motion" in verdict:
            verdict["colour_and_motion"] = verdict["colour"] and verdict["motion"]
    found = defaultdict(list)
    for verdict in verdicts:
        for name, right in verdict.items():
            found[name].append(right)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}, verdicts


def generate_in_batches(
    make: Callable[[list[str], list[int]], list[np.ndarray]], prompts: Sequence[str], seed: int, batch_size: int
) -> list[np.ndarray]:
    """Clips of all prompts, prompt i with seed + i, whatever the batch size."""
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        clips += make(part, [seed + start + i for i in range(len(part))])
    return clips
