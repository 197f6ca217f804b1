"""A discriminator of patches at several scales, which tells the frames of clips from their reconstructions.

Each scale has a small convolutional network of its own, which sees the frames at 1, 1/2, 1/4, ... of their size and scores
every patch (Isola et al. 2017, arXiv 1611.07004; several scales as in Wang et al. 2018, arXiv 1711.11585). The losses are
those of `lumos.training.adversarial`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = 3
LAYERS = 3
"""Layers of stride 2 of the network of a scale. A score sees about 46 x 46 pixels of its scale."""
SLOPE = 0.2
LEAST_SIDE = 8
"""A scale whose frames have a shorter side below this number of pixels is left out."""


class PatchNetwork(nn.Sequential):
    """Convolutions from frames [N, 3, H, W] to a score of each patch, [N, 1, h, w]."""

    def __init__(self, channels: int):
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for index in range(1, LAYERS):
            width = channels * 2**index
            layers += [nn.Conv2d(width // 2, width, 4, 2, 1), nn.GroupNorm(1, width), nn.LeakyReLU(SLOPE)]
        super().__init__(*layers, nn.Conv2d(channels * 2 ** (LAYERS - 1), 1, 3, 1, 1))


class Discriminator(nn.Module):
    """Scores of the patches of clips, by one `PatchNetwork` for each of SCALES scales."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.scales = nn.ModuleList(PatchNetwork(channels) for _ in range(SCALES))

    def forward(self, video: Tensor) -> list[Tensor]:
        """Return the scores of each scale, [B, n] with n patches of all frames, of a video [B, 3, T, H, W] in [-1, 1]."""
        frames, found = video.transpose(1, 2).flatten(0, 1), []
        for index, network in enumerate(self.scales):
            if index:
                frames = F.avg_pool2d(frames, 2)
            if not index or min(frames.shape[2:]) >= LEAST_SIDE:
                found.append(network(frames).float().view(len(video), -1))
        return found


def mean_loss(scores: list[Tensor]) -> Tensor:
    """Return the mean over scales of the mean over patches, [B], of losses by scale [B, n]."""
    return torch.stack([losses.mean(dim=1) for losses in scores]).mean(dim=0)
