"""Pure functions that select the given frames of a clip in training, and the dropped conditions.

    none         nothing: text to video
    first        the first frame: text and image to video
    prediction   the first 1 + temporal compression frames, which are two latent frames
    ends         the first and the last frame: the frames between keyframes

Given frames are whole in the input and have no loss. The last frame is given as a picture of its own, right behind the
first latent frame of the sequence. Dropped means that all codes of the given frames are masked; they have no loss either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lumos.data.seeding import drawn_name
from lumos.errors import UserError
from lumos.models.lumos1.configuration import PATTERNS

BEGINS = {"none": 0, "first": 1, "prediction": 2, "ends": 1}
"""The number of latent frames that each pattern gives at the beginning of a clip."""


class Given(NamedTuple):
    """The given frames of a training clip: a name of PATTERNS, and whether their codes are masked (dropped)."""

    pattern: str
    is_dropped: bool

    @property
    def has_last(self) -> bool:
        """Whether the picture of the last frame is in the sequence."""
        return self.pattern == "ends"

    @property
    def frames(self) -> int:
        """The number of frames that the sequence begins with and that are given, with the picture of the last one."""
        return BEGINS[self.pattern] + self.has_last


def drawn_given(
    generator: Callable[[str], torch.Generator], shares: Mapping[str, float], image_dropout: float, frames: int
) -> Given:
    """Draw the given frames of a clip of `frames` latent frames.

    generator: returns the clip's generator for a purpose. Pattern and dropout have one each, so that other draws do not
    depend on them. A clip that is too short for its pattern, such as a picture, has none.
    """
    pattern = drawn_name(generator("pattern"), shares)
    if BEGINS[pattern] >= frames:
        return Given("none", False)
    is_dropped = bool(torch.rand((), generator=generator("image dropout")) < image_dropout)
    return Given(pattern, is_dropped and pattern != "none")


def trained_patterns(shares: Mapping[str, float]) -> list[str]:
    """Return the names of the patterns with a share above 0, in the order of PATTERNS."""
    return [name for name in PATTERNS if shares.get(name, 0) > 0]


def share_of(pattern: str, shares: Mapping[str, float]) -> float:
    """Return the share of clips that a pattern has, as a part of all shares."""
    return shares.get(pattern, 0) / sum(shares.values())


def given_share(shares: Mapping[str, float], frames: int) -> float:
    """Return the expected share of the latent frames of clips of `frames` latent frames that is given."""
    return sum(share_of(name, shares) * BEGINS[name] / frames for name in trained_patterns(shares) if BEGINS[name] < frames)


def check_long_enough(shares: Mapping[str, float], frames: int, num_frames: int) -> None:
    """Raise UserError for a pattern that gives all frames of clips of `frames` latent frames, `num_frames` frames."""
    for name in trained_patterns(shares):
        if name != "none" and BEGINS[name] >= frames:
            raise UserError(
                f"patterns.{name} gives all frames of a clip: data.num_frames is {num_frames}; raise it, or leave the pattern out"
            )
