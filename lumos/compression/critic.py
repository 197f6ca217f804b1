"""The critic of motion: spatial and temporal heads on features of a frozen network, and their losses.

The heads judge whether features come from the teacher (real) or the student (fake). Published in outline
(arXiv 2411.18375; heads after SF-V, arXiv 2406.04324); the heads' form is ours.

Shapes: B clips, T frames, h w rows and columns, C channels, E channels of pooled prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8
SLOPE = 0.2
SINUSOIDS = 64


def time_of_noise(level: Tensor) -> Tensor:
    """Return the time 1 / (1 + s) of a noise level s, the standard deviation of the noise over that of the data."""
    return 1 / (1 + level)


def critic_taps(blocks: int, count: int = 4) -> list[int]:
    """Return the blocks behind which heads stand: `count` of them, or fewer, evenly over the first half of the blocks."""
    half = max(1, blocks // 2)
    count = min(count, half)
    return [math.ceil((i + 1) * half / count) - 1 for i in range(count)]


class CriticHead(nn.Module):
    """Convolution, GroupNorm, LeakyReLU, and a score of each place; the condition is projected on the normed features.

    The convolution is that of `pictures` or of `lines`.
    """

    def __init__(self, convolution: nn.Module, width: int):
        super().__init__()
        self.convolution = convolution
        self.norm = nn.GroupNorm(GROUPS, width)
        self.score = nn.Linear(width, 1)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the mean score over places, [n], of convolved x [n, width, *places] under condition [n, width]."""
        mean = F.leaky_relu(self.norm(x), SLOPE).flatten(2).mean(2)  # the scores are linear in the normed features
        return self.score(mean)[:, 0] + (self.project(condition) * mean).sum(1)


def pictures(x: Tensor, convolution: nn.Module) -> Tensor:
    """Return each frame of features [B, T, h, w, C] behind a 3 x 3 convolution, [B T, width, h', w'].

    Its stride is 2, but 1 along a side below 4.
    """
    strides = tuple(2 if side >= 4 else 1 for side in x.shape[2:4])
    x = x.permute(0, 1, 4, 2, 3).flatten(0, 1)
    return F.conv2d(x, convolution.weight, convolution.bias, stride=strides, padding=1)


def lines(x: Tensor, convolution: nn.Module) -> Tensor:
    """Return each place of features [B, T, h, w, C] behind a convolution over 3 frames, [B h w, width, T].

    The convolution is one matrix product: torch takes twice as long for many short lines.
    """
    before, at, after = F.linear(x, convolution.weight.permute(2, 0, 1).flatten(0, 1)).chunk(3, dim=-1)  # [B, T, h, w, width]
    y = at + F.pad(before[:, :-1], (0, 0) * 3 + (1, 0)) + F.pad(after[:, 1:], (0, 0) * 3 + (0, 1)) + convolution.bias
    return y.permute(0, 2, 3, 4, 1).flatten(0, 2)


class Critic(nn.Module):
    """A spatial and a temporal head behind each of several blocks of a network; `channels` has the channels behind each.

    The spatial head judges each frame by a 3 x 3 convolution of stride 2 (1 along a side below 4), the temporal head each
    place by a convolution over 3 frames. The score D of a clip is the mean over blocks of (spatial + temporal) / 2.
    Both are conditioned on the noise level and on the pooled prompt of `pooled` channels by a projection
    (arXiv 1802.05637).
    """

    def __init__(self, channels: Sequence[int], pooled: int, width: int = 64):
        super().__init__()
        self.spatial = nn.ModuleList(CriticHead(nn.Conv2d(count, width, 3), width) for count in channels)
        self.temporal = nn.ModuleList(CriticHead(nn.Conv1d(count, width, 3), width) for count in channels)
        self.pooled_norm = nn.LayerNorm(pooled, elementwise_affine=False)
        self.condition = nn.Sequential(nn.Linear(SINUSOIDS + pooled, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Sequence[Tensor], level: Tensor, pooled: Tensor) -> Tensor:
        """Return D of each clip, float32 [B].

        features: for each block [B, T, h, w, C]. level: [B], in [0, 1]. pooled: [B, E].
        """
        condition = self._conditions(level, pooled)
        scores = [self._score(i, x, condition) for i, x in enumerate(features)]
        return torch.stack(scores).mean(0).float()

    def _score(self, tap: int, x: Tensor, condition: Tensor) -> Tensor:
        x = x.to(condition.dtype)
        batch, frames, rows, columns, _ = x.shape
        over_places, over_time = self.spatial[tap], self.temporal[tap]
        spatial = over_places(pictures(x, over_places.convolution), condition.repeat_interleave(frames, 0))
        temporal = over_time(lines(x, over_time.convolution), condition.repeat_interleave(rows * columns, 0))
        return (spatial.view(batch, -1).mean(1) + temporal.view(batch, -1).mean(1)) / 2

    def _conditions(self, level: Tensor, pooled: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(SINUSOIDS // 2, device=level.device) * (-math.log(10_000.0) / (SINUSOIDS // 2)))
        angles = 1000.0 * level.float()[:, None] * frequencies
        known = torch.cat([angles.cos(), angles.sin(), self.pooled_norm(pooled.float())], dim=1)
        return self.condition(known.to(self.condition[0].weight.dtype))


def with_penalty(
    critic: nn.Module, features: Sequence[Tensor], level: Tensor, pooled: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return D of real clips, and gamma / 2 times the squared norm of its gradient for the features (R1), both [B].

    The penalty has a gradient for the critic. Source: arXiv 1801.04406.
    """
    if gamma == 0:
        real = critic(features, level, pooled)
        return real, torch.zeros_like(real)
    features = [x.detach().requires_grad_() for x in features]
    real = critic(features, level, pooled)
    gradients = torch.autograd.grad(real.sum(), features, create_graph=True)
    return real, gamma / 2 * sum(g.float().square().flatten(1).sum(1) for g in gradients)
