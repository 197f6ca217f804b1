"""Pure functions that select the given frames of a clip, and the conditions that training drops.

    none            nothing: text to video
    first           the first frame: text and image to video
    prediction      the first four frames; with causal latents the first five, which are two latents
    ends            the first and the last frame: the frames between keyframes
    interpolation   every second frame
    views           the first of several views of an object

Dropped image means that the frames of the pattern are noised like the others and have a loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumos.errors import UserError, shown
from lumos.models.stiv.configuration import CAUSAL_LATENTS, EVERY_SECOND_FRAME, PATTERNS
from lumos.settings import is_finite


def given_frames(pattern: str, frames: int, latents: str = "per_frame") -> frozenset[int]:
    """Return the latent frames that a pattern gives in a clip of `frames` latent frames.

    Raises UserError for an unknown pattern, for one that needs latents of single frames, and for a clip so short that
    all frames would be given.
    """
    if pattern not in PATTERNS:
        raise UserError(f"pattern {shown(pattern)} is unknown; allowed: {', '.join(PATTERNS)}")
    causal = latents in CAUSAL_LATENTS
    if causal and pattern in EVERY_SECOND_FRAME:
        raise UserError(f"pattern {pattern} needs latents of single frames; it does not work with {latents} latents")
    found = {
        "none": range(0), "first": range(1), "views": range(1), "prediction": range(2 if causal else 4),
        "ends": {0, frames - 1}, "interpolation": range(0, frames, 2),
    }[pattern]  # fmt: skip
    given = frozenset(found)
    if len(given) >= frames or (given and max(given) >= frames):
        raise UserError(f"pattern {pattern} gives {len(given)} frames; a clip of {frames} latent frames is too short for it")
    return given


def given_mask(given: Sequence[Collection[int]], frames: int) -> Tensor:
    """Return which frames are given, bool [B, frames], for the given frames of each clip.

    Raises UserError for a frame outside the clip.
    """
    mask = torch.zeros(len(given), frames, dtype=torch.bool)
    for row, of_clip in zip(mask, given, strict=True):
        if wrong := [frame for frame in of_clip if not 0 <= frame < frames]:
            raise UserError(f"frame {wrong[0]} is given; the clip has {frames} latent frames, 0 to {frames - 1}")
        row[sorted(of_clip)] = True
    return mask


def check_shares(shares: Mapping[str, float], frames: int, latents: str = "per_frame") -> None:
    """Raise UserError unless `shares` are numbers from 0 by name of a pattern that works here, with a sum above 0."""
    if not shares:
        raise UserError(f"patterns is empty; give shares by name, some of {', '.join(PATTERNS)}")
    for name, share in shares.items():
        if not is_finite(share) or share < 0:
            raise UserError(f"patterns.{name} {shown(share)} is not allowed; give a number from 0")
        given_frames(name, frames, latents)
    if not sum(shares.values()) > 0:
        raise UserError(f"patterns {shown(dict(shares))} has no share above 0; give at least one")


class Dropped(NamedTuple):
    """The conditions of a clip that are dropped."""

    text: bool
    image: bool


def drawn_dropout(
    generator: torch.Generator, text_dropout: float = 0.10, image_dropout: float = 0.08, joint_dropout: float = 0.0
) -> Dropped:
    """Draw which conditions are dropped: both with `joint_dropout`, else each on its own. Uses three draws of the generator."""
    joint, text, image = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    both = joint < joint_dropout
    return Dropped(both or text < text_dropout, both or image < image_dropout)


def drawn_places(generator: torch.Generator, places: int, ratio: float) -> Tensor:
    """Return the places that stay when round(places * ratio) are dropped (MaskDiT), ascending, int64 [k], k at least 1.

    Raises ValueError for a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {shown(ratio)} is not allowed; give a number from 0 to below 1")
    stay = max(1, places - round(places * ratio))
    return torch.randperm(places, generator=generator)[:stay].sort().values
