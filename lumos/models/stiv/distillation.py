"""Recovery of a pruned transformer: what distillation asks of the training task of STIV.

The one-step result is x_t + (1 - t) v, the clip to which the predicted velocity v leads. To judge it, it is mixed with new
noise, and the frozen teacher reads the mixture.

Shapes: B clips, T latent frames, C channels, h w rows and columns; in tokens f frames, s places of a frame.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumos.compression.critic import time_of_noise
from lumos.compression.distillable import LEVEL, Distillable, Draws, Features, ForwardPass, Judged, Losses, bare, in_order
from lumos.compression.features import tapped
from lumos.compression.noising import MEAN, STD
from lumos.data.seeding import sample_generator
from lumos.errors import UserError
from lumos.models.stiv.attention import StivRMSNorm
from lumos.models.stiv.block import StivMLP
from lumos.models.stiv.flops import clip_flops
from lumos.models.stiv.flow import drawn_noise, interpolated, replaced
from lumos.models.stiv.losses import Inputs, inputs_by_size, places_of, weighted_losses
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.training import StivTask, UnencodedClips
from lumos.pipeline.acceleration import compile_parts

NOISE = "critic_noise"
"""Name of the rows of a batch with new noise [T, C, h, w] for the critic."""


class VelocityPrediction(NamedTuple):
    """The input of a network for clips of one size, and the velocity that it predicted [B, T, C, h, w]."""

    inputs: Inputs
    velocity: Tensor


class DistillableStiv(Distillable):
    """Distillation of `StivForVideoGeneration` by flow matching."""

    same = (
        "latents", "latent_channels", "latent_mean", "latent_std", "patch_size", "temporal_patch_size", "spatial_compression",
        "temporal_compression", "text_encoder", "given_time",
    )  # fmt: skip

    def __init__(self, task: StivTask):
        super().__init__(task)
        if ratio := task.settings.mask_ratio:
            raise UserError(f"mask_ratio is {ratio}, but distillation compares all places of a frame; set mask_ratio=0")

    def read_teacher(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        teacher = super().read_teacher(folder, dtype)
        if self.task.settings.training.compile:
            compile_parts(teacher, (StivMLP, StivRMSNorm))
        return teacher

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return bare(model).blocks

    def pooled_width(self, teacher: StivForVideoGeneration) -> int:
        return teacher.config.text_width

    def draws(self, step: int, positions: range, prepared: UnencodedClips) -> Draws:
        seed, noise, levels = self.task.settings.training.seed, [], []
        for position, of_batch in zip(positions, prepared.batch.rows["noise"], strict=True):
            level, new = (sample_generator(seed, step, position, f"critic {what}") for what in ("level", "noise"))
            levels.append(time_of_noise(torch.exp(MEAN + STD * torch.randn((), generator=level))))
            noise.append(drawn_noise([new], *of_batch.shape)[0])
        return Draws({LEVEL: torch.stack(levels)}, {NOISE: noise})

    def forward(self, model: nn.Module, micro: dict[str, Any], taps: Sequence[int]) -> ForwardPass:
        clips, places, features, predictions = [], defaultdict(list), [], []
        for inputs in inputs_by_size(micro):
            blocks = self.blocks(model)
            with tapped({tap: blocks[tap] for tap in taps}) as found:
                predictions.append(VelocityPrediction(inputs, inputs.velocity(model)))
            features.append(self._features(inputs, [found[tap] for tap in taps]))
            at = torch.tensor(inputs.at, device=inputs.times.device)
            clips.append(at[:, None].expand_as(inputs.supervised)[inputs.supervised])
            for group, place in places_of(inputs, micro).items():
                places[group].append(place)
        return ForwardPass(torch.cat(clips), {group: torch.cat(parts) for group, parts in places.items()}, features, predictions)

    def losses(self, student: ForwardPass, teacher: ForwardPass | None, task: float, kd: float) -> Losses:
        config, settings = self.task.config, self.task.settings
        found = torch.cat([
            weighted_losses(velocity, inputs, config, settings)[inputs.supervised] for inputs, velocity in student.prediction
        ])  # fmt: skip
        if teacher is None or kd == 0:
            return Losses(task * found, found.detach(), None)
        apart = torch.cat([
            velocity_distances(ours.velocity, theirs.velocity)[ours.inputs.supervised]
            for ours, theirs in zip(student.prediction, teacher.prediction, strict=True)
        ])
        return Losses(task * found + kd * apart, found.detach(), apart.detach())

    def teacher_flops(self, teacher: StivForVideoGeneration, prepared: UnencodedClips, blocks: int | None = None) -> float:
        config = copy.copy(teacher.config)
        config.num_hidden_layers = config.num_hidden_layers if blocks is None else blocks
        sizes, tokens = [noise.shape for noise in prepared.batch.rows["noise"]], prepared.text.mask.sum(1).tolist()
        return sum(clip_flops(config, *clip) for clip in zip(sizes, tokens, strict=True))

    def judged(self, teacher: StivForVideoGeneration, passed: ForwardPass, micro: dict[str, Any], taps: Sequence[int]) -> Judged:
        first, features, pooled = first_blocks(teacher, taps[-1] + 1), [], []
        for inputs, velocity in passed.prediction:
            times = micro[LEVEL][inputs.at]
            noise = torch.stack([micro[NOISE][i] for i in inputs.at])
            x = renoised(one_step_result(velocity, inputs), noise, times, inputs)
            with tapped({tap: first.blocks[tap] for tap in taps}) as found:
                first(x, times, **inputs.conditions)
            features.append(self._features(inputs, [found[tap] for tap in taps]))
            pooled.append((inputs.at, self._pooled(teacher, inputs)))
        return Judged(features, in_order(pooled))

    def _features(self, inputs: Inputs, blocks: Sequence[Tensor]) -> Features:
        """Return what blocks give, [B, f, s, d], by rows and columns of tokens."""
        _, rows, columns = self.task.config.grid(inputs.latents.shape[1], *inputs.latents.shape[3:])
        return Features(inputs.at, [x.unflatten(2, (rows, columns)) for x in blocks])

    @staticmethod
    @torch.no_grad()
    def _pooled(teacher: StivForVideoGeneration, inputs: Inputs) -> Tensor:
        """Return the pooled prompts [B, e]."""
        known = inputs.conditions
        return known["pooled"] if "pooled" in known else teacher.encode_text(known["text_ids"], known["text_mask"]).pooled


def velocity_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the velocities of each frame, float32 [B, T]."""
    return (student.float() - teacher.detach().float()).square().mean(dim=(2, 3, 4))


def one_step_result(velocity: Tensor, inputs: Inputs) -> Tensor:
    """Return x_t + (1 - t) v [B, T, C, h, w], with given frames as the network saw them."""
    left = (1 - inputs.times)[:, None, None, None, None]
    return replaced(inputs.noisy + left * velocity, inputs.seen, inputs.conditions["given"])


def renoised(result: Tensor, noise: Tensor, times: Tensor, inputs: Inputs) -> Tensor:
    """Return t' x + (1 - t') noise for one-step results x at times t' [B], with given frames as the network saw them."""
    return replaced(interpolated(result, noise, times), inputs.seen, inputs.conditions["given"])


def first_blocks(model: StivForVideoGeneration, count: int) -> StivForVideoGeneration:
    """Return a network that shares all weights with `model`, but has the first `count` blocks only."""
    first = copy.copy(model)
    first._modules = dict(model._modules)
    first.blocks = model.blocks[:count]
    return first
