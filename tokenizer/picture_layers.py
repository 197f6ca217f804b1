"""Layers of the network for pictures (the published Cosmos CI). They take pictures [N, C, H, W].

They have the interface of the video layers, with a `past` that a picture does not need. Parameter names
are those of the published network, whose convolutions and norms have no submodules.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.configuration import GROUPS_OF_PICTURES, Sampling
from tokenizer.layers import Layers, Past


class PictureConv(nn.Conv2d):
    """A 2-D convolution that keeps the size with kernel 1 or 3, and pads nothing with a stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return super().forward(x)


def picture_point(in_channels: int, out_channels: int) -> PictureConv:
    """Return a 1x1 convolution."""
    return PictureConv(in_channels, out_channels, kernel=1)


def picture_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with 32 groups."""
    return nn.GroupNorm(GROUPS_OF_PICTURES, channels, eps=1e-6)


class PictureAttention(nn.Module):
    """One-head attention of every position of a picture to all positions, with a residual connection."""

    def __init__(self, channels: int, window: int | None = None) -> None:
        super().__init__()
        self.norm = picture_norm(channels)
        self.q = picture_point(channels, channels)
        self.k = picture_point(channels, channels)
        self.v = picture_point(channels, channels)
        self.proj_out = picture_point(channels, channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))  # N, 1, H W, C
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class PictureDownsample(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2 over the picture with a zero row below and a zero column right."""

    def __init__(self, channels: int, axes: Sampling, unused: bool = False) -> None:
        super().__init__()
        self.conv = PictureConv(channels, channels, stride=2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class PictureUpsample(nn.Module):
    """Double height and width: repeat values, then a 3x3 convolution."""

    def __init__(self, channels: int, axes: Sampling, unused: bool = False) -> None:
        super().__init__()
        self.conv = PictureConv(channels, channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


PICTURE_LAYERS = Layers(PictureConv, picture_point, picture_norm, PictureAttention, PictureDownsample, PictureUpsample)
