"""The losses and outputs of the transformer that compression compares, sorted by frames and times."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.losses import TIME_BINS, inputs_by_size, time_bins, weighted_losses
from lumos.models.stiv.training_settings import StivTrainingSettings
from lumos.training.task import Forward, Output

GROUPS = {
    "frames": ("first frame", "later frames"),
    "level": tuple(f"time {k / TIME_BINS:.1f} to {(k + 1) / TIME_BINS:.1f}" for k in range(TIME_BINS)),
}


def forward(config: StivConfig, settings: StivTrainingSettings, model: nn.Module, micro: dict[str, Any]) -> Forward:
    """Return the losses and outputs of a micro-batch. An output is the velocity of the frames of a clip that are not given."""
    losses, found = [], []
    for inputs in inputs_by_size(micro):
        velocity = inputs.velocity(model)
        of_frames = weighted_losses(velocity, inputs, config, settings)
        for row, time in enumerate(inputs.times):
            frames = inputs.supervised[row].nonzero().squeeze(1)
            losses.append(of_frames[row, frames])
            found.append(Output(velocity[row, frames].flatten(1), frames, time_bins(time).expand(len(frames))))
    groups = {"frames": torch.cat([part.frames.clamp(max=1) for part in found]), "level": torch.cat([p.levels for p in found])}
    return Forward(torch.cat(losses), groups, lambda: iter(found))
