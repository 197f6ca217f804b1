"""A fast encoder of single pictures: the network of a video tokenizer for clips of one frame, as a 2-D network.

In a clip of one frame the padding before the clip repeats that frame, so a convolution over time is a product with the
sum of its weights, temporal attention gives its values, and all temporal differences of the Haar patches are 0. Layers
without a nonlinearity between them are joined. The results are those of `VideoTokenizer.encode_frames` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.layers import CausalConv3d, Chain, Downsample, FrameNorm, ResidualBlock
from tokenizer.video import VideoTokenizer
from tokenizer.wavelet import patchify, spatial_patchify

PIECE = 64
"""Pictures that the network takes at a time."""


class Conv(NamedTuple):
    """A 2-D convolution that keeps the size: weight [O, I, k, k], bias [O]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride, self.weight.shape[-1] // 2 if stride == 1 else 0)

    def then(self, point: Conv, skip: bool = False) -> Conv:
        """Return this convolution followed by one of kernel 1, to which `skip` adds its input."""
        matrix = point.weight[:, :, 0, 0]
        matrix = matrix + torch.eye(len(matrix), device=matrix.device) if skip else matrix
        return Conv(torch.einsum("om,mikl->oikl", matrix, self.weight), matrix @ self.bias + point.bias)


def conv_of(layer: CausalConv3d | Chain) -> Conv:
    """Return what a convolution, or a chain of a spatial and a temporal one, does to a clip of one frame."""
    if isinstance(layer, Chain):
        first, *others = map(conv_of, layer)
        for other in others:
            first = first.then(other)
        return first
    return Conv(layer.conv3d.weight.detach().float().sum(2), layer.conv3d.bias.detach().float())


def norm_of(layer: FrameNorm) -> Callable[[Tensor], Tensor]:
    weight, bias, eps = layer.norm.weight.detach().float(), layer.norm.bias.detach().float(), layer.norm.eps
    return lambda x: F.group_norm(x, 1, weight, bias, eps)


def residual_block(block: ResidualBlock) -> Callable[[Tensor], Tensor]:
    norm1, norm2, conv1, conv2 = norm_of(block.norm1), norm_of(block.norm2), conv_of(block.conv1), conv_of(block.conv2)
    shortcut = nn.Identity() if isinstance(block.nin_shortcut, nn.Identity) else conv_of(block.nin_shortcut)
    return lambda x: shortcut(x) + conv2(F.silu(norm2(conv1(F.silu(norm1(x))))))


def attention(pair: Chain) -> Callable[[Tensor], Tensor]:
    """Return spatial attention, then temporal attention of the one frame to itself."""
    space, time = pair
    norm, q, k, v, out = norm_of(space.norm), *(conv_of(layer) for layer in (space.q, space.k, space.v, space.proj_out))
    time_norm, value = norm_of(time.norm), conv_of(time.v).then(conv_of(time.proj_out))

    def run(x: Tensor) -> Tensor:
        h = norm(x)
        parts = (p(h).flatten(2).mT.unsqueeze(1) for p in (q, k, v))  # N, 1, H W, C
        x = x + out(F.scaled_dot_product_attention(*parts).squeeze(1).mT.reshape(x.shape))
        return x + value(time_norm(x))

    return run


def downsample(layer: Downsample) -> Callable[[Tensor], Tensor]:
    if not (layer.spatial or layer.temporal):
        return nn.Identity()
    last = conv_of(layer.conv3)
    after = conv_of(layer.conv2).then(last) if layer.temporal else last
    if layer.temporal:  # the mean over time of copies of the frame is the frame
        after = Conv(after.weight + last.weight, after.bias)
    if not layer.spatial:
        return after
    conv = conv_of(layer.conv1)

    def run(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return after(conv(x, stride=2) + F.avg_pool2d(x, 2))

    return run


def first_layer(tokenizer: VideoTokenizer) -> Callable[[Tensor], Tensor]:
    """Return a function from pictures [N, 3, H, W] to the output of the encoder's first convolution, patches included."""
    config, conv = tokenizer.config, conv_of(tokenizer.encoder.conv_in)

    def patches(pictures: Tensor) -> Tensor:
        pictures = spatial_patchify(pictures.unsqueeze(2), config.spatial_patch_size)
        return patchify(pictures, config.patch_size, config.patch_method).squeeze(2)

    if conv.weight.shape[-1] > 1:
        return lambda x: conv(patches(x).contiguous(memory_format=torch.channels_last))
    side = config.spatial_patch_size * config.patch_size  # patches and a product with them are one strided convolution
    places = torch.eye(3 * side**2, device=conv.weight.device).view(-1, 3, side, side)
    weight = (conv(patches(places)) - conv.bias[:, None, None]).flatten(1).T.reshape(-1, 3, side, side)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda x: F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, conv.bias, stride=side)


def picture_encoder(tokenizer: VideoTokenizer) -> Callable[[Tensor], Tensor]:
    """Return a function from video [B, 3, T, H, W] to codes [B, T, h, w], or latents [B, C, T, h, w], of its single frames.

    The function holds copies of the weights, in float32 on their device: it does not see later changes of the tokenizer.
    """
    config, encoder = tokenizer.config, tokenizer.encoder
    if config.is_image:
        return tokenizer.encode_frames
    layers: list[Callable[[Tensor], Tensor]] = [first_layer(tokenizer)]
    for level in encoder.down:
        for index, block in enumerate(level.block):
            layers.append(residual_block(block))
            if len(level.attn) > 0:
                layers.append(attention(level.attn[index]))
        if hasattr(level, "downsample"):
            layers.append(downsample(level.downsample))
    middle = encoder.mid
    layers += [residual_block(middle.block_1), attention(middle.attn_1), residual_block(middle.block_2)]
    layers += [norm_of(encoder.norm_out), F.silu, conv_of(encoder.conv_out).then(conv_of(tokenizer.quant_conv))]

    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        tokenizer.check_size(video)
        found = torch.cat([encoded(piece.float()) for piece in video.transpose(1, 2).flatten(0, 1).split(PIECE)])
        return found.squeeze(-3).unflatten(0, (len(video), -1)).transpose(1, -3)

    def encoded(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return tokenizer.quantize(x[:, : tokenizer.value_channels].unsqueeze(2))[1]

    return encode
