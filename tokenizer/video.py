"""VideoTokenizer: frames to integer codes and back, with the architecture of the published Cosmos DV tokenizer.

    pixels -> Haar patches -> causal encoder -> finite scalar quantization -> codes
    codes  -> values       -> causal decoder -> inverse Haar patches       -> pixels

A picture is a clip of one frame. The first latent frame depends on the first frame only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer import loading, streaming
from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.fsq import FiniteScalarQuantizer
from tokenizer.layers import (
    CausalConv3d,
    Downsample,
    FrameNorm,
    Past,
    ResidualBlock,
    Upsample,
    attention_pair,
    factorised_conv,
    point_conv,
)
from tokenizer.wavelet import patchify, spatial_patchify, spatial_unpatchify, unpatchify

PIECE = 8
"""Latent frames that encode and decode work on at a time: memory is that of so many, and smaller pieces would be slower."""


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config.dropout)
        self.attn_1 = attention_pair(channels, config.attention_window)
        self.block_2 = ResidualBlock(channels, channels, config.dropout)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, past), past), past)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the configuration asks for it, then a sampler."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, config: VideoTokenizerConfig
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, config.dropout) for a, b in pairwise(widths))
        pairs = num_blocks if attention else 0
        self.attn = nn.ModuleList(attention_pair(out_channels, config.attention_window) for _ in range(pairs))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x, past)
            if len(self.attn) > 0:
                x = self.attn[index](x, past)
        return x


class Encoder(nn.Module):
    """Patches [B, P C, T', H', W'] -> latent [B, z, t, h, w]."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in (1, *config.channels_mult)]
        end_conv = point_conv if config.pointwise_ends else factorised_conv
        self.conv_in = end_conv(config.in_channels * config.patch_channels, config.channels)
        self.down = nn.ModuleList()
        for index, (wanted_attention, sampler) in enumerate(
            zip(config.attention_levels(), [*config.downsamplers(), None], strict=True)
        ):
            level = Level(widths[index], widths[index + 1], config.num_res_blocks, wanted_attention, config)
            if sampler is not None:
                level.downsample = Downsample(widths[index + 1], spatial=sampler.spatial, temporal=sampler.temporal)
            self.down.append(level)
        self.mid = Middle(widths[-1], config)
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = factorised_conv(widths[-1], config.z_factor * config.z_channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv_in(x, past)
        for level in self.down:
            h = level(h, past)
            if hasattr(level, "downsample"):
                h = level.downsample(h, past)
        h = self.norm_out(self.mid(h, past))
        return self.conv_out(nn.functional.silu(h), past)


class Decoder(nn.Module):
    """Latent [B, z, t, h, w] -> patches [B, P C, T', H', W']. `up` is numbered like the encoder's levels and runs backwards."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channels_mult]
        inner = [*widths[1:], widths[-1]]
        self.conv_in = factorised_conv(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for index, (wanted_attention, sampler) in enumerate(
            zip(config.attention_levels(), [None, *config.upsamplers()], strict=True)
        ):
            level = Level(inner[index], widths[index], config.num_res_blocks + 1, wanted_attention, config)
            if sampler is not None:
                level.upsample = Upsample(widths[index], spatial=sampler.spatial, temporal=sampler.temporal)
            self.up.append(level)
        self.norm_out = FrameNorm(widths[0])
        end_conv = point_conv if config.pointwise_ends else factorised_conv
        self.conv_out = end_conv(widths[0], config.out_channels * config.patch_channels)

    def features(self, z: Tensor, past: Past | None = None) -> Tensor:
        """What the last layer is given: [B, C, T', H', W']."""
        h = self.mid(self.conv_in(z, past), past)
        for level in reversed(self.up):
            h = level(h, past)
            if hasattr(level, "upsample"):
                h = level.upsample(h, past)
        return nn.functional.silu(self.norm_out(h))

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        return self.conv_out(self.features(z, past), past)


class VideoTokenizer(nn.Module):
    """Encodes video [B, 3, T, H, W] in [-1, 1] to codes [B, t, h, w] and decodes them again.

    T must be 1 + temporal_compression * k; H and W multiples of spatial_compression. A clip may be longer than memory allows:
    `encode_stream` and `decode_stream` take it in chunks, and `encode` and `decode` work through a given one in pieces.
    """

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = point_conv(config.z_factor * config.z_channels, config.embedding_dim)
        self.post_quant_conv = point_conv(config.embedding_dim, config.z_channels)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self._start_as_image_network()

    @property
    def num_codes(self) -> int:
        """Number of different codes; they are 0 .. num_codes - 1."""
        return self.quantizer.num_codes

    @property
    def spatial_compression(self) -> int:
        """Pixels per code along height and width."""
        return self.config.spatial_compression

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame after the first."""
        return self.config.temporal_compression

    def forward(self, video: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] -> what comes back, of the same shape, with straight-through gradient: for training."""
        values, _ = self.quantize(self.encode_latent(video))
        return self.decode_latent(values)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] -> int64 codes [B, t, h, w]. ValueError for sizes that do not divide."""
        self.check_size(video)
        self.check_num_frames(video.shape[2])
        step = self.temporal_compression
        pieces = video.tensor_split(list(range(1 + step * (PIECE - 1), video.shape[2], step * PIECE)), dim=2)
        past: Past = {}
        return torch.cat([self.quantize(self.encode_latent(piece, past))[1] for piece in pieces], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, t, h, w] -> video [B, 3, T, H, W], about [-1, 1] and not clamped. ValueError for codes out of range."""
        self.check_codes(codes)
        past: Past = {}
        return torch.cat([self.decode_latent(piece, past) for piece in self.values(codes).split(PIECE, dim=2)], dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks [B, 3, T, H, W] of a clip, of any lengths -> codes [B, 1, h, w], each as soon as its last frame has come.

        See :class:`tokenizer.streaming.StreamEncoder`, which is pushed instead of pulled. ValueError at the end if the clip has
        frames that fill no latent frame.
        """
        return streaming.encode(self, chunks)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks [B, t, h, w] of a clip's codes, of any lengths -> the frames of each latent frame, [B, 3, T, H, W].

        T is 1 for the first latent frame, then the temporal compression. See :class:`tokenizer.streaming.StreamDecoder`.
        """
        return streaming.decode(self, chunks)

    def encode_latent(self, video: Tensor, past: Past | None = None) -> Tensor:
        """Video [B, 3, T, H, W] -> latent [B, C, t, h, w] before quantization.

        With a `past`, a chunk: of 1 + temporal_compression * k frames while it is empty, then of temporal_compression * k.
        """
        self.check_size(video)
        self.check_num_frames(video.shape[2] + (1 if past else 0))
        video = spatial_patchify(video, self.config.spatial_patch_size)
        patches = patchify(video, self.config.patch_size, self.config.patch_method, starts=not past)
        return self.quant_conv(self.encoder(patches, past))

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, C, t, h, w] -> (code values with straight-through gradient, int64 codes [B, t, h, w])."""
        return self.quantizer(latent)

    def values(self, codes: Tensor) -> Tensor:
        """Codes [B, t, h, w] -> code values [B, C, t, h, w] in the network's dtype. ValueError for codes out of range."""
        return self.quantizer.values(codes, self.post_quant_conv.conv3d.weight.dtype)

    def decode_latent(self, values: Tensor, past: Past | None = None) -> Tensor:
        """Code values [B, C, t, h, w] -> video [B, 3, T, H, W]; with a `past`, of the clip's next latent frames."""
        starts = not past
        patches = self.decoder(self.post_quant_conv(values), past)
        video = unpatchify(patches, self.config.patch_size, self.config.patch_method, starts=starts)
        return spatial_unpatchify(video, self.config.spatial_patch_size)

    def check_size(self, video: Tensor) -> None:
        """ValueError unless the shape of the video, its number of frames aside, can be encoded."""
        channels, stride = self.config.in_channels, self.spatial_compression
        if video.dim() != 5 or video.shape[1] != channels:
            raise ValueError(f"video must have the shape [batch, {channels}, frames, height, width], got {tuple(video.shape)}")
        height, width = video.shape[3:]
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"height and width must be multiples of {stride}, got {height} x {width}")

    def check_num_frames(self, num_frames: int) -> None:
        """ValueError unless a whole clip can have so many frames."""
        step = self.temporal_compression
        if num_frames < 1 or (num_frames - 1) % step:
            below = max((num_frames - 1) // step * step + 1, 1)
            raise ValueError(f"num_frames must be 1 + {step} * k, got {num_frames}; use {below} or {below + step}")

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless the shape of the codes is that of a clip or a part of one."""
        if codes.dim() != 4:
            raise ValueError(f"codes must have the shape [batch, frames, rows, columns], got {tuple(codes.shape)}")

    @torch.no_grad()
    def _start_as_image_network(self) -> None:
        """Initial weights: PyTorch's own, except that a temporal convolution starts near "keep the current frame".

        Two plain linear convolutions in a row would shrink the signal of every block. The last convolution starts small,
        because the inverse wavelet adds up all its channels.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d) and module.frames_in_front == 2:
                weight = module.conv3d.weight
                weight.mul_(0.5)
                weight[:, :, -1, 0, 0] += torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        last = self.decoder.conv_out if self.config.pointwise_ends else self.decoder.conv_out[0]
        last.conv3d.weight.mul_(0.1)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> VideoTokenizer:
        """Load a tokenizer folder: config.json + model.safetensors, or the published encoder.jit + decoder.jit / autoencoder.jit.

        `folder` may also be a model folder that holds the tokenizer in `video_tokenizer/`. dtype None means float32.
        Raises lumos.errors.NotFound, UserError (configuration, missing or unexpected keys) or RunError (damaged file).
        """
        folder = loading.find_tokenizer_folder(Path(folder))
        config = loading.read_config(folder)
        with torch.device("meta"):
            model = cls(config)
        tensors = loading.read_tensors(folder)
        loading.check_layout(model.state_dict(), tensors, folder)
        target = dtype or torch.float32
        tensors = {key: tensor.to(device=device, dtype=target) for key, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors (weights in their present dtype, published key names) into `folder`."""
        loading.write_folder(Path(folder), self.config, self.state_dict())
