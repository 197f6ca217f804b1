"""Layers of the video tokenizer: factorised causal convolutions, norms, attention and samplers.

All layers take [B, C, T, H, W] and are causal: no output depends on a later frame, so the codes of
the beginning of a clip do not depend on the rest. A clip can be processed in chunks. A layer that
needs earlier frames then reads them from the cache `past` and stores in it what the next chunk
needs. Without a cache, or with an empty one, x is the beginning of a clip. Parameter names are
those of the published Cosmos tokenizer, for example the submodule `conv3d` of a convolution.

`VIDEO_LAYERS` names the layers from which the network is built; `tokenizer.picture_layers` has those of
the network for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.configuration import Sampling

SPATIAL_KERNEL = (1, 3, 3)
TEMPORAL_KERNEL = (3, 1, 1)
POINT_KERNEL = (1, 1, 1)

Past = dict[nn.Module, Tensor]
"""A cache for a clip that is processed in chunks: what each layer stores of earlier frames."""


class Chain(nn.Sequential):
    """An nn.Sequential whose layers take a `past`."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for layer in self:
            x = layer(x, past)
        return x


class Conv3d(nn.Conv3d):
    """nn.Conv3d that draws no initial weights on the meta device, where drawing takes longer than loading the real ones."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class CausalConv3d(nn.Module):
    """A 3-D convolution that pads with zeros in space and with copies of the first frame before the clip.

    kernel and stride are (time, height, width). A spatial convolution with a stride is not padded
    here: `Downsample` pads its input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        spatial_padding = kernel[1] // 2 if stride[1] == 1 else 0
        self.frames_in_front = kernel[0] - stride[0]
        padding = (0, spatial_padding, spatial_padding)
        self.conv3d = Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        half = trains_in_half_on_cpu(x)
        if self.frames_in_front > 0:
            if past and self in past:
                front = [past[self]]
            elif half:
                front = [x[:, :, :1]] * self.frames_in_front  # concatenated in the memory format of x, unlike expanded frames
            else:
                front = [x[:, :, :1].expand(-1, -1, self.frames_in_front, -1, -1)]
            x = torch.cat([*front, x], dim=2)
            if past is not None:
                past[self] = x[:, :, -self.frames_in_front :].clone()  # a view would keep all of x
        conv = self.conv3d
        if conv.kernel_size[1:] == (1, 1) and conv.kernel_size[0] > 1:
            # A 2-D convolution over (T, H W) gives the same sums and is a quarter to a third faster on a CPU.
            rows = x.flatten(3)
            rows = rows.contiguous(memory_format=torch.channels_last) if half else rows
            h = F.conv2d(rows, conv.weight[..., 0], conv.bias, stride=(conv.stride[0], 1))
            return h.unflatten(3, x.shape[3:])
        if half and conv.kernel_size[0] == 1:
            frames = x.transpose(1, 2)
            pictures = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            h = F.conv2d(pictures, conv.weight[:, :, 0], conv.bias, conv.stride[1:], conv.padding[1:])
            return h.unflatten(0, frames.shape[:2]).transpose(1, 2)
        return conv(x)


def trains_in_half_on_cpu(x: Tensor) -> bool:
    """Return whether products of x are computed in bfloat16 on the CPU and have a gradient.

    There, torch 2.13 gives NaN as the gradient of the weight of some 3-D convolutions, such as 1x3x3 with 128 channels on
    32 x 32 places on a CPU with AMX. The gradient of a 2-D convolution is right, and channels in the last place are fastest.
    """
    is_half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and is_half and torch.is_grad_enabled()


def factorised_conv(in_channels: int, out_channels: int) -> Chain:
    """Return a spatial 1x3x3 convolution followed by a temporal 3x1x1 one, in place of a 3x3x3."""
    return Chain(
        CausalConv3d(in_channels, out_channels, SPATIAL_KERNEL),
        CausalConv3d(out_channels, out_channels, TEMPORAL_KERNEL),
    )


def point_conv(in_channels: int, out_channels: int) -> CausalConv3d:
    """Return a 1x1x1 convolution."""
    return CausalConv3d(in_channels, out_channels, POINT_KERNEL)


class FrameNorm(nn.Module):
    """GroupNorm with one group, over (C, H, W) of each frame. Statistics over time would not be causal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        return self.norm(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


@dataclass(frozen=True)
class Layers:
    """The layers from which an encoder and a decoder are built. Each entry makes a layer that takes (x, past)."""

    conv: Callable[[int, int], nn.Module]  # (in_channels, out_channels) -> convolution over neighbours
    point: Callable[[int, int], nn.Module]  # (in_channels, out_channels) -> convolution of kernel 1
    norm: Callable[[int], nn.Module]  # channels -> normalisation
    attention: Callable[[int, int | None], nn.Module]  # (channels, window) -> attention
    downsample: Callable[[int, Sampling, bool], nn.Module]  # (channels, axes to halve, unused convolutions exist)
    upsample: Callable[[int, Sampling, bool], nn.Module]  # (channels, axes to double, unused convolutions exist)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a residual connection.

    The residual connection has a convolution of kernel 1 if the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.conv(in_channels, out_channels)
        self.norm2 = layers.norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = layers.conv(out_channels, out_channels)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else layers.point(in_channels, out_channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), past)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))), past)
        return self.nin_shortcut(x) + h


class _Attention(nn.Module):
    """One-head attention with 1x1x1 projections and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.q = point_conv(channels, channels)
        self.k = point_conv(channels, channels)
        self.v = point_conv(channels, channels)
        self.proj_out = point_conv(channels, channels)

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x)
        return self.q(h), self.k(h), self.v(h)


class SpatialAttention(_Attention):
    """Attention of every position of a frame to all positions of the same frame."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        b, c, t, height, width = x.shape
        q, k, v = (p.permute(0, 2, 3, 4, 1).reshape(b * t, 1, height * width, c) for p in self._projections(x))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.view(b, t, height, width, c).permute(0, 4, 1, 2, 3))


class TemporalAttention(_Attention):
    """Causal attention of every position to the same position in the current and earlier frames.

    `window` limits it to that many frames, the current one included. None: all earlier frames.
    """

    def __init__(self, channels: int, window: int | None) -> None:
        super().__init__(channels)
        self.window = window

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        b, c, t, height, width = x.shape
        q, k, v = (p.permute(0, 3, 4, 2, 1).reshape(b * height * width, 1, t, c) for p in self._projections(x))
        if past is not None:
            k, v = kept = torch.stack([k, v]) if self not in past else torch.cat([past[self], torch.stack([k, v])], dim=3)
            past[self] = kept if self.window is None else kept[:, :, :, max(kept.shape[3] - self.window + 1, 0) :].clone()
        frame = torch.arange(k.shape[2], device=x.device)
        age = frame[-t:, None] - frame
        seen = age >= 0 if self.window is None else (age >= 0) & (age < self.window)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return x + self.proj_out(h.view(b, height, width, t, c).permute(0, 4, 3, 1, 2))


def attention_pair(channels: int, window: int | None) -> Chain:
    """Return spatial attention followed by temporal attention."""
    return Chain(SpatialAttention(channels), TemporalAttention(channels, window))


def average_pool(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return the means of blocks of `size` of x [B, C, t, h, w]. PyTorch pools half precision on a GPU only."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return F.avg_pool3d(x.float(), size).to(x.dtype)
    return F.avg_pool3d(x, size)


class Downsample(nn.Module):
    """Halve space, time, both or neither: a strided convolution plus average pooling, then a 1x1x1 convolution.

    T = 1 + 2 k frames become 1 + k. If it halves neither, the layer is an identity. With `unused`, the
    layer has the convolutions that it does not use too, as in the published network of the first
    generation.
    """

    def __init__(self, channels: int, axes: Sampling, unused: bool = True) -> None:
        super().__init__()
        self.spatial, self.temporal = axes
        if self.spatial or unused:
            self.conv1 = CausalConv3d(channels, channels, SPATIAL_KERNEL, stride=(1, 2, 2))
        if self.temporal or unused:
            self.conv2 = CausalConv3d(channels, channels, TEMPORAL_KERNEL, stride=(2, 1, 1))
        self.conv3 = point_conv(channels, channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if not (self.spatial or self.temporal):
            return x
        if self.spatial:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.conv1(x) + average_pool(x, (1, 2, 2))
        if self.temporal:
            if not past or self.conv2 not in past:
                x = torch.cat([x[:, :, :1], x], dim=2)
            x = self.conv2(x, past) + average_pool(x, (2, 1, 1))
        return self.conv3(x)


class Upsample(nn.Module):
    """Double space, time, both or neither: repeat values, add a convolution of them, then a 1x1x1 convolution.

    t frames become 2 t - 1, because the first latent frame stands for one frame only. If it doubles
    neither, the layer is an identity. `unused` is as in `Downsample`.
    """

    def __init__(self, channels: int, axes: Sampling, unused: bool = True) -> None:
        super().__init__()
        self.spatial, self.temporal = axes
        if self.temporal or unused:
            self.conv1 = CausalConv3d(channels, channels, TEMPORAL_KERNEL)
        if self.spatial or unused:
            self.conv2 = CausalConv3d(channels, channels, SPATIAL_KERNEL)
        self.conv3 = point_conv(channels, channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if not (self.spatial or self.temporal):
            return x
        if self.temporal:
            x = x.repeat_interleave(2, dim=2)
            if not past or self.conv1 not in past:
                x = x[:, :, 1:]
            x = x + self.conv1(x, past)
        if self.spatial:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.conv2(x)
        return self.conv3(x)


VIDEO_LAYERS = Layers(factorised_conv, point_conv, FrameNorm, attention_pair, Downsample, Upsample)
