"""Which clips a training step sees, and what its batches are.

Everything here is a pure function of (seed, step, position in the step): a resumed run, another number of threads,
processes or micro-batches sees the same clips with the same random numbers, and no loader state has to be stored
beside the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lumos.data.curriculum import StepShape


@dataclass(frozen=True)
class Clip:
    """frames uint8 [T, H, W, 3], or in their place `codes` uint16 [t, h, w] made earlier; `name` finds the clip again."""

    frames: np.ndarray | None
    caption: str
    fps: int
    name: str
    codes: np.ndarray | None = None
    num_frames: int | None = None  # what text and header tell, if that is not what is there


def cut(clip: Clip, first_frames: int, temporal_compression: int) -> Clip:
    """The first frames of a clip, which still tells of the whole; one that is no longer stays as it is."""
    codes = clip.codes
    if codes is None:
        return replace(clip, frames=clip.frames[:first_frames], num_frames=len(clip.frames))
    latent = (first_frames - 1) // temporal_compression + 1
    return replace(clip, codes=codes[:latent], num_frames=(len(codes) - 1) * temporal_compression + 1)


class StepSource(Protocol):
    """How much a step has. `most_codes` holds the codes of the largest clip of each kind, where steps count codes."""

    most_codes: dict[str, int]

    def clips_in(self, shape: StepShape) -> int:
        """How many clips a step has, over all processes."""
        ...


class Source(StepSource, Protocol):
    """Where clips come from.

    `usual_shape` holds num_frames, height, width and fps of most of its clips, `identity` what must be the same, beside the
    settings, for a resumed run to see the same clips.
    """

    usual_shape: dict[str, int]
    identity: dict[str, Any]

    def clips(self, step: int, shape: StepShape, positions: range) -> list[Clip]:
        """The clips at `positions` of a step, the same at every call; all with frames or all with codes."""
        ...


