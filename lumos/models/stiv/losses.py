"""Losses of STIV on a micro-batch: what the network sees of clips of one size, and the loss of each of their frames.

Shapes: B clips, T latent frames, C channels, h w rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.flow import (
    clamped_time,
    frame_losses,
    given_latents,
    interpolated,
    kept_values,
    masked_frame_losses,
    min_snr_weights,
    replaced,
    target_velocity,
)
from lumos.models.stiv.modeling import Micro
from lumos.models.stiv.training_settings import StivTrainingSettings

TIME_BINS = 10
"""Number of equal ranges of times by which the log sorts losses."""
TEXT = ("text_states", "text_mask", "pooled", "text_ids")


@dataclass(frozen=True)
class Inputs:
    """The inputs of the network for the clips `at` of a micro-batch, which have one size.

    latents, noise  [B, T, C, h, w]
    noisy           their mixture x_t at `times` [B]
    seen            x_t with given frames in it
    supervised      bool [B, T], the frames that have a loss
    conditions      further arguments of the network: text, given frames, micro conditions, places that are kept
    """

    at: list[int]
    latents: Tensor
    noise: Tensor
    noisy: Tensor
    seen: Tensor
    times: Tensor
    supervised: Tensor
    conditions: dict[str, Any]

    def velocity(self, model: nn.Module) -> Tensor:
        """Return what a network predicts, [B, T, C, h, w]."""
        return model(self.seen, self.times, **self.conditions).sample


def alike(keys: list[Any]) -> list[list[int]]:
    """Return the indices of equal keys, group by group, in the order of their first places."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def inputs_by_size(micro: dict[str, Any]) -> list[Inputs]:
    """Return what the network sees of a micro-batch, by the sizes of the clips."""
    return [_inputs(micro, at) for at in alike([latents.shape for latents in micro["latents"]])]


def _inputs(micro: dict[str, Any], at: list[int]) -> Inputs:
    latents, noise, given = (torch.stack([micro[name][i] for i in at]) for name in ("latents", "noise", "given"))
    keep = None if micro["keep"][at[0]] is None else torch.stack([micro["keep"][i] for i in at])
    times, levels = micro["times"][at], micro["levels"][at]
    supervised = ~given & micro["counts"][at, None]
    given = given if given.any() else None
    noisy = interpolated(latents, noise, times)
    seen = noisy if given is None else replaced(noisy, given_latents(latents, noise, levels), given)
    text = {name: micro[name][at] for name in TEXT if name in micro}
    facts = Micro(*(micro[name][at] for name in ("original_size", "crop", "stride", "num_frames")))
    conditions = {**text, "given": given, "given_time": 1 - levels, "micro": facts, "keep": keep}
    return Inputs(at, latents, noise, noisy, seen, times, supervised, conditions)


def weighted_losses(prediction: Tensor, inputs: Inputs, config: StivConfig, settings: StivTrainingSettings) -> Tensor:
    """Return the weighted loss of each frame [B, T] of a predicted velocity; 0 at given frames."""
    target, given, keep = target_velocity(inputs.latents, inputs.noise), inputs.conditions["given"], inputs.conditions["keep"]
    if keep is None:
        losses = frame_losses(prediction, target, given)
    else:
        _, rows, columns = config.grid(inputs.latents.shape[1], *inputs.latents.shape[3:])
        kept = kept_values(keep, rows, columns, config.patch_size)
        losses = masked_frame_losses(prediction, target, inputs.noisy, kept, given, settings.masked_loss_weight)
    if config.prediction == "noise":  # the squared error of the noise, which is t^2 times that of the velocity
        losses = losses * clamped_time(inputs.times, 2).square()
    if settings.flow.weighting == "min_snr":
        losses = losses * min_snr_weights(inputs.times, settings.flow.gamma)[:, None]
    return losses


def time_bins(times: Tensor) -> Tensor:
    """Return the tenth, 0 to 9, of each time in [0, 1]."""
    return (times * TIME_BINS).long().clamp(max=TIME_BINS - 1)


def places_of(inputs: Inputs, micro: dict[str, Any]) -> dict[str, Tensor]:
    """Return the places [N] by group of the losses of supervised frames: the tenth of the time, and the pattern."""
    of_clips = {"time": time_bins(inputs.times), "pattern": micro["patterns"][inputs.at]}
    return {name: place[:, None].expand_as(inputs.supervised)[inputs.supervised] for name, place in of_clips.items()}
