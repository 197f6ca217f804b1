"""The random draws of training for a clip: a pure function of the settings, the step and the clip's position in the step.

Each draw has a generator of its own, so that a change of one setting leaves the other draws as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, drawn_name, sample_generator
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.flow import drawn_noise, drawn_times
from lumos.models.stiv.patterns import Dropped, drawn_dropout, drawn_places, given_frames, given_mask
from lumos.models.stiv.training_settings import StivTrainingSettings


class Drawn(NamedTuple):
    """The random draws for a clip of T latent frames.

    pattern   name of the pattern of given frames; "none" if they are dropped
    no_text   whether the clip has the empty text
    given     bool [T]
    time      in [0, 1]
    level     the noise level of the given frames
    noise     [T, C, h, w]
    keep      int64 [k], the places that the main blocks see; None: all
    stride    the sampling stride that the model is told; 1 for a picture
    """

    pattern: str
    no_text: bool
    given: Tensor
    time: float
    level: float
    noise: Tensor
    keep: Tensor | None
    stride: int


def drawn_clip(
    settings: StivTrainingSettings, config: StivConfig, step: int, position: int, size: tuple[int, int, int], dropout: bool
) -> Drawn:
    """Return the random draws for the clip at a position of a step.

    size: latent frames, rows and columns. dropout: False keeps the text, the given frames and all places.
    """
    seed = VALIDATION_SEED if step == VALIDATION_STEP else settings.training.seed
    frames, rows, columns = size

    def generator(purpose: str) -> torch.Generator:
        return sample_generator(seed, step, position, purpose)

    pattern = drawn_name(generator("pattern"), settings.patterns) if frames > 1 else "none"
    dropped = Dropped(False, False)
    if dropout:
        shares = settings.dropout
        dropped = drawn_dropout(generator("dropout"), shares.text, shares.image, shares.joint)
    pattern = "none" if dropped.image else pattern
    flow = settings.flow
    time = drawn_times([generator("time")], flow.times, flow.mean, flow.std, flow.shift)
    level = settings.given_noise * torch.rand((), generator=generator("given noise"))
    keep = None
    if dropout and settings.mask_ratio:
        keep = drawn_places(generator("places"), rows * columns // config.patch_size**2, settings.mask_ratio)
    noise = drawn_noise([generator("noise")], frames, config.latent_channels, rows, columns)[0]
    given = given_mask([given_frames(pattern, frames, config.latents)], frames)[0] if pattern != "none" else torch.zeros(frames) > 0
    stride = int(drawn_name(generator("stride"), settings.strides)) if frames > 1 else 1
    return Drawn(pattern, dropped.text, given, float(time), float(level), noise, keep, stride)
