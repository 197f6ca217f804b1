"""The interface of sources of training clips.

The clips of a step are a pure function of (seed, step, position in the step). A resumed run and a run
with another number of threads, processes or micro-batches therefore see the same clips with the same
random numbers, and a checkpoint stores no loader state except the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lumos.data.curriculum import StepShape
from lumos.data.trained_on import TrainedOn


@dataclass(frozen=True)
class TrainingClip:
    """A training clip: either `frames` uint8 [T, H, W, 3], or `codes` uint16 [t, h, w] encoded earlier.

    `fps` is in frames per second. `name` identifies the clip within its source.
    """

    frames: np.ndarray | None
    caption: str
    fps: int
    name: str
    codes: np.ndarray | None = None
    num_frames: int | None = None  # length of the whole clip if this is a part of it; prompt and header state it
    original_size: tuple[int, int] | None = None  # height and width before it was scaled and cropped; None: not known
    stride: float | None = None  # frames of its source from one of its frames to the next; None: not known
    last: np.ndarray | None = None  # its last frame as a picture: uint8 [H, W, 3] with frames, uint16 [h, w] with codes


def cut(clip: TrainingClip, first_frames: int, temporal_compression: int) -> TrainingClip:
    """Return a clip with only the first `first_frames` frames of `clip`.

    The fields `num_frames` and `last` of the result are those of the whole clip. A shorter clip keeps all its frames.
    """
    codes = clip.codes
    if codes is None:
        return replace(clip, frames=clip.frames[:first_frames], num_frames=len(clip.frames), last=clip.frames[-1])
    latent = (first_frames - 1) // temporal_compression + 1
    return replace(clip, codes=codes[:latent], num_frames=(len(codes) - 1) * temporal_compression + 1)


class StepSource(Protocol):
    """The part of a source that tells the size of steps.

    `most_codes` holds the number of codes of the largest clip of each kind ("image", "video"). It is
    used only if steps count codes.
    """

    most_codes: dict[str, int]

    def clips_in(self, shape: StepShape) -> int:
        """Return the number of clips of a step, summed over all processes."""
        ...


class Source(StepSource, Protocol):
    """A source of training clips.

    usual_shape  num_frames, height, width and fps of most of the clips
    identity     values that, besides the settings, must be equal for a resumed run to see the same clips
    """

    usual_shape: dict[str, int]
    identity: dict[str, Any]

    def clips(self, step: int, shape: StepShape, positions: range) -> list[TrainingClip]:
        """Return the clips at `positions` of a step: all with frames, or all with codes.

        Every call with the same arguments returns the same clips.
        """
        ...

    def trained_on(self) -> TrainedOn:
        """Return the words of the captions of all clips, and what the clips show if it is known."""
        ...


