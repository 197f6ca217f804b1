"""VideoTokenizer: encode frames to integer codes and decode them, with the architecture of the published Cosmos DV.

    pixels -> Haar patches -> causal encoder -> finite scalar quantization -> codes
    codes  -> values       -> causal decoder -> inverse Haar patches       -> pixels

A picture is a clip of one frame. The first latent frame depends on the first frame only.

A continuous tokenizer (the published CV) is the same without quantization: `encode` returns latents and
`decode` takes them. That of pictures (CI) has a 2-D network, which encodes each frame separately.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lumos.errors import UserError
from tokenizer import loading, streaming
from tokenizer.configuration import VideoTokenizerConfig
from tokenizer.fsq import FiniteScalarQuantizer, NoQuantizer
from tokenizer.layers import VIDEO_LAYERS, CausalConv3d, Layers, Past, ResidualBlock
from tokenizer.picture_layers import PICTURE_LAYERS
from tokenizer.pruning import PrunableDecoder
from tokenizer.wavelet import (
    patchify,
    picture_patchify,
    picture_unpatchify,
    spatial_patchify,
    spatial_unpatchify,
    unpatchify,
)

PIECE = 8
"""Latent frames per piece in `encode` and `decode`. Larger pieces need more memory, smaller ones are slower."""


MAX_LOG_VARIANCE, MIN_LOG_VARIANCE = 20.0, -30.0
"""The range of the log variance of the formulation VAE, as in the published network."""


def layers_of(config: VideoTokenizerConfig) -> Layers:
    """Return the layers from which the network of a configuration is built."""
    return PICTURE_LAYERS if config.is_image else VIDEO_LAYERS


class Middle(nn.Module):
    """A residual block, attention and a residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VideoTokenizerConfig) -> None:
        super().__init__()
        layers = layers_of(config)
        self.block_1 = ResidualBlock(channels, channels, config.dropout, layers)
        self.attn_1 = layers.attention(channels, config.attention_window)
        self.block_2 = ResidualBlock(channels, channels, config.dropout, layers)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, past), past), past)


class ResolutionLevel(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attention` is set.

    The encoder and the decoder add a sampler to it, as `downsample` or `upsample`.

    skipped: numbers of blocks that the forward pass leaves out, each with its attention.
    """

    skipped: frozenset[int] = frozenset()

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, config: VideoTokenizerConfig
    ) -> None:
        super().__init__()
        layers, widths = layers_of(config), [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, config.dropout, layers) for a, b in pairwise(widths))
        pairs = num_blocks if attention else 0
        self.attn = nn.ModuleList(layers.attention(out_channels, config.attention_window) for _ in range(pairs))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for index, block in enumerate(self.block):
            if index in self.skipped:
                continue
            x = block(x, past)
            if len(self.attn) > 0:
                x = self.attn[index](x, past)
        return x


class Encoder(nn.Module):
    """The network from patches [B, P C, T', H', W'] (P channels a patch) to a latent [B, z, t, h, w]."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        layers, widths = layers_of(config), [config.channels * mult for mult in (1, *config.channels_mult)]
        end_conv = layers.point if config.pointwise_ends else layers.conv
        self.conv_in = end_conv(config.in_channels * config.patch_channels, config.channels)
        self.down = nn.ModuleList()
        for index, (wanted_attention, sampler) in enumerate(
            zip(config.attention_levels(), config.encoder_samplers(), strict=True)
        ):
            level = ResolutionLevel(widths[index], widths[index + 1], config.num_res_blocks, wanted_attention, config)
            if sampler is not None:
                level.downsample = layers.downsample(widths[index + 1], sampler, config.unused_samplers)
            self.down.append(level)
        self.mid = Middle(widths[-1], config)
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.z_factor * config.z_channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv_in(x, past)
        for level in self.down:
            h = level(h, past)
            if hasattr(level, "downsample"):
                h = level.downsample(h, past)
        h = self.norm_out(self.mid(h, past))
        return self.conv_out(nn.functional.silu(h), past)


class Decoder(nn.Module):
    """The network from a latent [B, z, t, h, w] to patches [B, P C, T', H', W'] (P channels a patch).

    `up[i]` has the resolution of the encoder's level i, so the decoder runs from the last entry to the first.

    skips_middle: the forward pass leaves out the middle.
    """

    skips_middle: bool = False

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        layers, widths = layers_of(config), config.decoder_widths
        inner = [*widths[1:], widths[-1]]
        self.conv_in = layers.conv(config.z_channels, widths[-1])
        if config.decoder_mid:
            self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for index, (wanted_attention, sampler) in enumerate(
            zip(config.attention_levels(len(widths)), config.decoder_samplers(), strict=True)
        ):
            level = ResolutionLevel(inner[index], widths[index], config.decoder_blocks[index], wanted_attention, config)
            if sampler is not None:
                level.upsample = layers.upsample(widths[index], sampler, config.unused_samplers and config.decoder_idle)
            self.up.append(level)
        self.norm_out = layers.norm(widths[0])
        end_conv = layers.point if config.pointwise_ends else layers.conv
        self.conv_out = end_conv(widths[0], config.out_channels * config.patch_channels)

    def features(self, z: Tensor, past: Past | None = None) -> Tensor:
        """Return the input [B, C, T', H', W'] of the last layer."""
        h = self.conv_in(z, past)
        if hasattr(self, "mid") and not self.skips_middle:
            h = self.mid(h, past)
        for level in reversed(self.up):
            h = level(h, past)
            if hasattr(level, "upsample"):
                h = level.upsample(h, past)
        return nn.functional.silu(self.norm_out(h))

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        return self.conv_out(self.features(z, past), past)


class VideoTokenizer(PrunableDecoder, nn.Module):
    """Encode video [B, 3, T, H, W] in [-1, 1] to codes [B, t, h, w] and decode codes to video.

    T must be 1 + temporal_compression * k; H and W must be multiples of spatial_compression. `encode`
    and `decode` take a whole clip and process it in pieces. For a clip that does not fit into memory,
    `encode_stream` and `decode_stream` take it in chunks.

    If `is_continuous`, all methods have latents [B, C, t, h, w], in the dtype of the network, where they
    otherwise have codes [B, t, h, w].
    """

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        point = layers_of(config).point
        self.quant_conv = point(config.z_factor * config.z_channels, config.encoder_outputs)
        self.post_quant_conv = point(config.value_channels, config.z_channels)
        self.quantizer = NoQuantizer() if config.is_continuous else FiniteScalarQuantizer(config.levels)
        if not config.is_image and not next(self.parameters()).is_meta:
            self._start_as_image_network()

    @property
    def is_continuous(self) -> bool:
        """Whether the tokenizer makes continuous latents instead of codes."""
        return self.config.is_continuous

    @property
    def value_channels(self) -> int:
        """The number of channels of code values or of continuous latents."""
        return self.config.value_channels

    @property
    def num_codes(self) -> int:
        """The number of different codes. Codes are 0 .. num_codes - 1. A continuous tokenizer has 0."""
        return self.quantizer.num_codes

    @property
    def spatial_compression(self) -> int:
        """The number of pixels per code along height and width."""
        return self.config.spatial_compression

    @property
    def temporal_compression(self) -> int:
        """The number of frames per latent frame; the first latent frame stands for one frame."""
        return self.config.temporal_compression

    def forward(self, video: Tensor) -> Tensor:
        """Return the reconstruction of video [B, 3, T, H, W], with a straight-through gradient, for training."""
        values, _ = self.quantize(self.encode_latent(video))
        return self.decode_latent(values)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode video [B, 3, T, H, W] in [-1, 1] to int64 codes [B, t, h, w], or to latents [B, C, t, h, w].

        Latents of the formulation VAE are the means; `encode_moments` gives the log variances too. Raises
        ValueError unless T is 1 + temporal_compression * k and H and W are multiples of
        spatial_compression.
        """
        past: Past = {}
        pieces = self._pieces(video)
        return torch.cat([self.quantize(self.encode_latent(piece, past))[1] for piece in pieces], dim=-3)

    @torch.no_grad()
    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode video [B, 3, T, H, W] to the means and log variances, both [B, C, t, h, w], of the formulation VAE.

        The published `encode` returns a sample, mean + exp(log variance / 2) * noise. Raises ValueError
        for another formulation and for sizes that `encode` refuses.
        """
        if self.config.formulation != "VAE":
            raise ValueError(f"{self.config.name} {self.config.formulation} has no log variance; only the formulation VAE has one")
        past: Past = {}
        found = torch.cat([self._encoded(piece, past) for piece in self._pieces(video)], dim=2)
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    @torch.no_grad()
    def encode_frames(self, video: Tensor) -> Tensor:
        """Encode each frame of a video [B, 3, T, H, W] as a picture, to codes [B, T, h, w] or to latents [B, C, T, h, w].

        Raises ValueError unless H and W are multiples of spatial_compression.
        """
        self.check_size(video)
        if not video.shape[2]:
            raise ValueError("num_frames must be at least 1, got 0")
        pictures = video.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # B T, 3, 1, H, W
        found = torch.cat([self.encode(piece) for piece in pictures.split(PIECE)])
        return found.squeeze(-3).unflatten(0, (-1, video.shape[2])).transpose(1, -3)

    def _pieces(self, video: Tensor) -> tuple[Tensor, ...]:
        """Return the pieces of a whole clip [B, 3, T, H, W] that `encode` encodes one after the other."""
        self.check_size(video)
        self.check_num_frames(video.shape[2])
        step = self.temporal_compression
        return video.tensor_split(list(range(1 + step * (PIECE - 1), video.shape[2], step * PIECE)), dim=2)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, t, h, w], or latents [B, C, t, h, w], to video [B, 3, T, H, W], about [-1, 1] and not clamped.

        Raises ValueError for codes out of range.
        """
        self.check_codes(codes)
        past: Past = {}
        return torch.cat([self.decode_latent(piece, past) for piece in self.values(codes).split(PIECE, dim=2)], dim=2)

    def decode_frames(self, codes: Tensor) -> Tensor:
        """Decode codes [B, T, h, w], or latents [B, C, T, h, w], of single frames to video [B, 3, T, H, W].

        The inverse of `encode_frames`: each latent frame is decoded as a picture.
        """
        self.check_codes(codes)
        frames = codes.transpose(1, -3).flatten(0, 1).unsqueeze(-3)
        found = torch.cat([self.decode(piece) for piece in frames.split(PIECE)])
        return found.squeeze(2).unflatten(0, (len(codes), -1)).transpose(1, 2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a clip from chunks [B, 3, T, H, W] of any lengths; yield the codes [B, 1, h, w] of each latent frame.

        A latent frame is yielded as soon as its last frame has arrived. Raises ValueError at the end if
        the last frames do not fill a latent frame. :class:`tokenizer.streaming.StreamEncoder` does the
        same for a caller that pushes chunks.
        """
        return streaming.encode(self, chunks)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode a clip from chunks [B, t, h, w] of codes of any lengths; yield the frames of each latent frame.

        The frames are [B, 3, T, H, W]. T is 1 for the first latent frame and temporal_compression for
        the others. :class:`tokenizer.streaming.StreamDecoder` does the same for a caller that pushes
        chunks.
        """
        return streaming.decode(self, chunks)

    def encode_latent(self, video: Tensor, past: Past | None = None) -> Tensor:
        """Encode video [B, 3, T, H, W] to a latent [B, C, t, h, w] before quantization.

        The latent of the formulation VAE is the mean. With a cache `past`, the video is a chunk of a clip:
        1 + temporal_compression * k frames if the cache is empty, temporal_compression * k frames
        otherwise.
        """
        self.check_size(video)
        self.check_num_frames(video.shape[2] + (1 if past else 0))
        return self._encoded(video, past)[:, : self.value_channels]

    def _encoded(self, video: Tensor, past: Past | None) -> Tensor:
        """Return what the encoder gives for a chunk of a clip: a latent, or mean and log variance [B, 2 C, t, h, w]."""
        if self.config.is_image:
            return by_frame(lambda x: self.quant_conv(self.encoder(x)), picture_patchify(video, self.config.patch_size))
        video = spatial_patchify(video, self.config.spatial_patch_size)
        patches = patchify(video, self.config.patch_size, self.config.patch_method, starts=not past)
        return self.quant_conv(self.encoder(patches, past))

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a latent [B, C, t, h, w]; return (code values with straight-through gradient, int64 codes [B, t, h, w])."""
        return self.quantizer(latent)

    def values(self, codes: Tensor) -> Tensor:
        """Return the code values [B, C, t, h, w] of codes [B, t, h, w], in the dtype of the network.

        Latents are their own values. Raises ValueError for codes out of range.
        """
        return self.quantizer.values(codes, next(self.post_quant_conv.parameters()).dtype)

    def nearest_codes(self, values: Tensor) -> Tensor:
        """Return the codes [B, t, h, w] whose values are nearest to values [B, C, t, h, w]; latents are returned as they are.

        Raises ValueError for NaN.
        """
        return self.quantizer.nearest(values)

    def decode_latent(self, values: Tensor, past: Past | None = None) -> Tensor:
        """Decode code values [B, C, t, h, w] to video [B, 3, T, H, W].

        With a cache `past`, the code values are the next latent frames of a clip.
        """
        if self.config.is_image:
            patches = by_frame(lambda x: self.decoder(self.post_quant_conv(x)), values)
            return picture_unpatchify(patches, self.config.patch_size)
        starts = not past
        patches = self.decoder(self.post_quant_conv(values), past)
        video = unpatchify(patches, self.config.patch_size, self.config.patch_method, starts=starts)
        return spatial_unpatchify(video, self.config.spatial_patch_size)

    def check_has_codes(self, purpose: str) -> None:
        """Raise UserError if the tokenizer is continuous; `purpose` says what needs codes."""
        if self.is_continuous:
            raise UserError(f"{purpose} needs a video tokenizer with codes; this one is continuous ({self.config.name})")

    def check_size(self, video: Tensor) -> None:
        """Raise ValueError unless channels, height and width of the video can be encoded."""
        channels, stride = self.config.in_channels, self.spatial_compression
        if video.dim() != 5 or video.shape[1] != channels:
            raise ValueError(f"video must have the shape [batch, {channels}, frames, height, width], got {tuple(video.shape)}")
        height, width = video.shape[3:]
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"height and width must be multiples of {stride}, got {height} x {width}")

    def check_num_frames(self, num_frames: int) -> None:
        """Raise ValueError unless a whole clip can have this number of frames."""
        step = self.temporal_compression
        if num_frames < 1 or (num_frames - 1) % step:
            below = max((num_frames - 1) // step * step + 1, 1)
            raise ValueError(f"num_frames must be 1 + {step} * k, got {num_frames}; use {below} or {below + step}")

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes have the shape [B, t, h, w], or latents [B, C, t, h, w]."""
        channels = self.value_channels
        if self.is_continuous:
            if codes.dim() != 5 or codes.shape[1] != channels or not codes.is_floating_point():
                raise ValueError(
                    f"latents must be floats of the shape [batch, {channels}, frames, rows, columns], got {codes.dtype} "
                    f"{tuple(codes.shape)}"
                )
        elif codes.dim() != 4:
            raise ValueError(f"codes must have the shape [batch, frames, rows, columns], got {tuple(codes.shape)}")

    @torch.no_grad()
    def _start_as_image_network(self) -> None:
        """Change PyTorch's initial weights so that a temporal convolution is close to an identity for the current frame.

        Otherwise the spatial and the temporal convolution, with no nonlinearity between them, would
        shrink the signal in every block. The last convolution starts with small weights, because the
        inverse wavelet adds up all of its channels.
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
        """Load a tokenizer from a folder.

        The folder holds config.json and model.safetensors, or the published encoder.jit and decoder.jit,
        or autoencoder.jit. It may also be a model folder with the tokenizer in `video_tokenizer/`. dtype
        None means float32. Raises lumos.errors.NotFound if there is no tokenizer, UserError for a wrong
        configuration or for missing or unexpected weights, RunError for a damaged file.
        """
        folder = loading.find_tokenizer_folder(Path(folder))
        config = loading.read_config(folder)
        tensors = loading.read_tensors(folder)
        config = loading.fitted(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        with torch.device("meta"):
            model = cls(config)
        loading.check_layout(model.state_dict(), tensors, folder)
        target = dtype or torch.float32
        tensors = {key: tensor.to(device=device, dtype=target) for key, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into `folder`: weights in their current dtype, with published key names."""
        loading.write_folder(Path(folder), self.config, self.state_dict())


def by_frame(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a network for pictures [N, C, H, W] to each frame of x [B, C, T, H, W]."""
    return network(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
