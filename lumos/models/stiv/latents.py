"""LatentSpace: frames to the latents that STIV models, and back.

A latent space has a network, a kind (see `LATENTS` in the configuration) and a mean and a standard deviation
for each channel, by which latents are normalised. Three networks serve:

- a video tokenizer with codes: latents are the values of the codes, and the nearest codes are decoded,
- a continuous video tokenizer,
- an image autoencoder of diffusers (AutoencoderKL), which needs the extra `diffusers`.

Shapes: B batch, T frames, t latent frames, C channels, H W pixels, h w rows and columns of latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from lumos.errors import NotFinite, NotFound, RunError, UserError, reason_of, shown
from lumos.files import read_json
from lumos.models.stiv.configuration import CAUSAL_LATENTS, EVERY_SECOND_FRAME, LATENTS, PATTERNS, StivConfig
from lumos.video.frames import from_uint8, to_uint8
from tokenizer import VideoTokenizer
from tokenizer.loading import SUBFOLDER
from tokenizer.pictures import picture_encoder

AUTOENCODER = "autoencoder"
AUTOENCODER_FOLDERS = (AUTOENCODER, "vae")
"""Places of an image autoencoder in a model folder; `vae` is its place in pipelines of diffusers."""
CODES, CONTINUOUS = ("per_frame", "causal"), ("continuous", "continuous_per_frame")
NEEDS_SINGLE_FRAMES = (*EVERY_SECOND_FRAME, "ends")
"""The patterns that give a frame without all frames before it, from which causal latents cannot be made."""
PIECE = 8
"""Frames, or latent frames, that the network takes at a time."""


def allows_pattern(latents: str, pattern: str) -> bool:
    """Return whether a pattern of given frames works with a kind of latents.

    With causal latents, a later latent depends on all frames before it, so only the beginning of a clip
    can be given. Raises UserError for an unknown kind or pattern.
    """
    _check_name("latents", latents, LATENTS)
    _check_name("pattern", pattern, PATTERNS)
    return latents not in CAUSAL_LATENTS or pattern not in NEEDS_SINGLE_FRAMES


def check_combination(latents: str, *, temporal_patch_size: int = 1, patterns: Iterable[str] = ()) -> None:
    """Raise UserError (a ValueError) unless the kind of latents works with the temporal patches and with all patterns."""
    _check_name("latents", latents, LATENTS)
    if latents in CAUSAL_LATENTS and temporal_patch_size != 1:
        raise UserError(
            f"temporal_patch_size {temporal_patch_size} does not work with {latents} latents, of which a clip has 1 + k; "
            "give 1, or latents of single frames"
        )
    if wrong := [pattern for pattern in patterns if not allows_pattern(latents, pattern)]:
        raise UserError(f"pattern {wrong[0]} needs latents of single frames; it does not work with {latents} latents")


def measure_statistics(latents: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel of latents [B, t, C, h, w].

    Sums are kept in float64, part by part. A channel that never varies has the standard deviation 1, so
    that latents can be divided by it. Raises UserError if there is no latent, and NotFinite for NaN and
    infinite numbers.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in latents:
        values = part.detach().double().cpu().movedim(2, 0).flatten(1)  # C, places
        if not torch.isfinite(values).all():
            raise NotFinite("latents hold values that are not finite; check the weights of the tokenizer, or use dtype float32")
        if not (places := values.shape[1]):
            continue
        here = values.mean(1)
        difference, total = here - mean, count + places
        squares = squares + (values - here[:, None]).square().sum(1) + difference.square() * (count * places / total)
        mean, count = mean + difference * (places / total), total
    if not count:
        raise UserError("there are no latents to measure; give at least one clip")
    std = (squares / count).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


class LatentSpace:
    """The latents of a model: `encode` gives latents [B, t, C, h, w], `decode` gives frames.

    Args:
        network: a VideoTokenizer, or an AutoencoderKL for the kind "autoencoder".
        latents: the kind, one of LATENTS.
        mean, std: a number for each channel; None is 0 and 1.

    Raises UserError (a ValueError) for a network that is not of the kind, and for a wrong mean or std.
    """

    def __init__(
        self, network: nn.Module, latents: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        _check_name("latents", latents, LATENTS)
        self.network, self.latents = network.eval().requires_grad_(False), latents
        is_tokenizer = isinstance(network, VideoTokenizer)
        if is_tokenizer == (latents == AUTOENCODER):
            kind = "a video tokenizer" if is_tokenizer else "an image autoencoder"
            raise UserError(f"latents {latents} cannot be made by {kind}; allowed with it: {', '.join(_kinds_of(network))}")
        if is_tokenizer and latents not in _kinds_of(network):
            has = "continuous latents" if network.is_continuous else "codes"
            raise UserError(
                f"latents {latents} cannot be made by this video tokenizer, which has {has}; allowed with it: "
                f"{', '.join(_kinds_of(network))}"
            )
        self.mean, self.std = mean, std
        self._picture_encoder: tuple[torch.device, Callable[[Tensor], Tensor]] | None = None
        self._shift = _by_channel("latent_mean", mean, self.channels, 0.0)
        self._scale = _by_channel("latent_std", std, self.channels, 1.0)

    @property
    def channels(self) -> int:
        """The number of channels of a latent."""
        return self.network.value_channels if self.has_tokenizer else self.network.config.latent_channels

    @property
    def has_tokenizer(self) -> bool:
        """Whether the network is a video tokenizer; otherwise it is an image autoencoder."""
        return self.latents != AUTOENCODER

    @property
    def has_codes(self) -> bool:
        """Whether latents are values of codes."""
        return self.latents in CODES

    @property
    def is_causal(self) -> bool:
        """Whether a latent stands for several frames and depends on earlier frames."""
        return self.latents in CAUSAL_LATENTS

    @property
    def spatial_compression(self) -> int:
        """The number of pixels of a latent along height and width."""
        if self.has_tokenizer:
            return self.network.spatial_compression
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def temporal_compression(self) -> int:
        """The number of frames of a latent after the first; 1 for latents of single frames."""
        return self.network.temporal_compression if self.is_causal else 1

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes. Latents are float32."""
        return next(self.network.parameters()).dtype

    def to(self, *args: Any, **options: Any) -> Self:
        """Move the network, in place, as `torch.nn.Module.to` does."""
        self.network.to(*args, **options)
        return self

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> LatentSpace:
        """Return this latent space with another mean and standard deviation of each channel."""
        return LatentSpace(self.network, self.latents, mean, std)

    def latents_of(self, num_frames: int) -> int:
        """Return the number of latent frames of a clip. Raises UserError for a number of frames that cannot be encoded."""
        step = self.temporal_compression
        if num_frames < 1 or (num_frames - 1) % step:
            below = max((num_frames - 1) // step * step + 1, 1)
            allowed = f"1 + {step} * k, such as {below} or {below + step}" if step > 1 else "at least 1"
            raise UserError(f"num_frames {num_frames} is not allowed; {self.latents} latents need {allowed}")
        return 1 + (num_frames - 1) // step

    @torch.no_grad()
    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """Encode frames to normalised latents float32 [B, t, C, h, w], on the device of the network.

        frames: floats [B, 3, T, H, W] in [-1, 1], or uint8 [B, T, H, W, 3].

        Raises UserError for another shape and for sizes that cannot be encoded, NotFinite if the network's
        numbers are NaN or infinite.
        """
        video = frames if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
        if video.dim() == 5 and video.dtype == torch.uint8 and video.shape[-1] == 3:
            video = from_uint8(video)
        elif video.dim() != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise UserError(
                f"frames {video.dtype} {list(video.shape)} cannot be encoded; give floats [batch, 3, frames, height, width] in "
                "[-1, 1], or uint8 [batch, frames, height, width, 3]"
            )
        batch, _, num_frames, height, width = video.shape
        self.latents_of(num_frames)
        stride = self.spatial_compression
        if not batch or not height or not width or height % stride or width % stride:
            raise UserError(f"{batch} clips of {width}x{height} pixels cannot be encoded; sides must be multiples of {stride}")
        video = video.to(self.device, self.dtype)
        if not self.has_tokenizer:
            values = self._encode_pictures(video)
        else:
            codes = self.network.encode(video) if self.is_causal else self._encode_frames(video)
            if self.has_codes:
                _check_finite(0 <= int(codes.min()) <= int(codes.max()) < self.network.num_codes)  # NaN gives other codes
            values = self.network.values(codes)
        _check_finite(bool(torch.isfinite(values).all()))
        return self._normalise(values)

    def from_codes(self, codes: Tensor | np.ndarray) -> Tensor:
        """Return the normalised latents float32 [B, t, C, h, w] of codes [B, t, h, w], on the device of the codes.

        The codes are those of the shards: of clips for "causal" latents, of single frames for "per_frame".
        Raises UserError if the latents are not values of codes, ValueError for codes out of range.
        """
        if not self.has_codes:
            raise UserError(f"{self.latents} latents are not made from codes; encode frames, or use latents {' or '.join(CODES)}")
        codes = torch.as_tensor(codes if isinstance(codes, Tensor) else codes.astype(np.int64))
        self.network.check_codes(codes)
        return self._normalise(self.network.values(codes))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents [B, t, C, h, w] to frames uint8 [B, T, H, W, 3].

        Values of codes are rounded to the nearest code first. The network takes one latent frame of a clip at
        a time, or PIECE causal ones. Raises UserError for another shape, NotFinite for numbers that are not
        finite.
        """
        if latents.dim() != 5 or not len(latents) or not latents.shape[1]:
            wanted = f"[batch, frames, {self.channels}, rows, columns]"
            raise UserError(f"latents {list(latents.shape)} cannot be decoded; give {wanted}")
        return np.stack([self.decoder()(clip) for clip in latents])

    def decoder(self) -> Callable[[Tensor], np.ndarray]:
        """Return a function that takes the next latents [n, C, h, w] of a clip and returns its next frames uint8 [T, H, W, 3].

        The function keeps the state of the clip between its calls, so each clip needs one of its own. Its
        memory does not grow with the clip, beyond the caches of the tokenizer.
        """
        past: dict[nn.Module, Tensor] = {}

        @torch.inference_mode()
        def push(latents: Tensor) -> np.ndarray:
            if latents.dim() != 4 or latents.shape[1] != self.channels or not len(latents):
                raise UserError(f"latents {list(latents.shape)} cannot be decoded; give [frames, {self.channels}, rows, columns]")
            if not torch.isfinite(latents).all():
                raise NotFinite("the latents hold values that are not finite; use dtype float32, or check the weights")
            # One frame at a time: with more, the last bit would depend on how a clip is cut into parts.
            size = PIECE if self.is_causal else 1
            return np.concatenate([to_uint8(self._decode(piece, past)) for piece in latents.split(size)])

        return push

    def _decode(self, latents: Tensor, past: dict[nn.Module, Tensor]) -> Tensor:
        """Decode the next latents [n, C, h, w] of a clip, n at most PIECE, to video [3, T, H, W]."""
        values = latents.float() * self._scale.to(latents.device) + self._shift.to(latents.device)
        values = values.to(self.device)
        if not self.has_tokenizer:
            return self.network.decode(values.to(self.dtype)).sample.transpose(0, 1)
        codes = self.network.nearest_codes(values.transpose(0, 1)[None])
        if not self.is_causal:
            return self.network.decode_frames(codes)[0]
        return self.network.decode_latent(self.network.values(codes), past)[0]

    def _encode_frames(self, video: Tensor) -> Tensor:
        """Return the codes or latents of single frames by the video tokenizer, twice as fast as `encode_frames` in float32."""
        if self.dtype != torch.float32:
            return self.network.encode_frames(video)
        if self._picture_encoder is None or self._picture_encoder[0] != self.device:
            self._picture_encoder = self.device, picture_encoder(self.network)
        return self._picture_encoder[1](video)

    def _encode_pictures(self, video: Tensor) -> Tensor:
        """Return the latents [B, C, T, h, w] of an image autoencoder, the means, of each frame of a video [B, 3, T, H, W]."""
        pictures = video.transpose(1, 2).flatten(0, 1)
        found = torch.cat([self.network.encode(piece).latent_dist.mode() for piece in pictures.split(PIECE)])
        return found.unflatten(0, (len(video), -1)).transpose(1, 2)

    def _normalise(self, values: Tensor) -> Tensor:
        """Return normalised latents [B, t, C, h, w] of values [B, C, t, h, w]."""
        values = values.transpose(1, 2).float()
        return (values - self._shift.to(values.device)) / self._scale.to(values.device)

    @classmethod
    def from_config(
        cls, folder: str | Path, config: StivConfig, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ) -> LatentSpace:
        """Load the latent space that a model's config describes; see `from_pretrained`.

        Raises UserError if the network has other channels or compressions than the config.
        """
        space = cls.from_pretrained(folder, config.latents, config.latent_mean, config.latent_std, dtype, device)
        theirs = {"latent_channels": space.channels, "spatial_compression": space.spatial_compression}
        if space.is_causal:
            theirs["temporal_compression"] = space.temporal_compression
        for name, value in theirs.items():
            if value != getattr(config, name):
                raise UserError(
                    f"the model expects {name} {getattr(config, name)}, the network of its latents in {folder} has {value}: they "
                    "do not belong together"
                )
        return space

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        latents: str = "per_frame",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> LatentSpace:
        """Load the network from its folder, or from a model folder with it in `video_tokenizer/` or `autoencoder/`.

        dtype None means float32. Raises NotFound if there is no network, UserError for one of another kind,
        RunError for a damaged one.
        """
        _check_name("latents", latents, LATENTS)
        if latents == AUTOENCODER:
            network = load_autoencoder(Path(folder)).to(device, dtype or torch.float32)
        else:
            network = VideoTokenizer.from_pretrained(folder, dtype, device)
        return cls(network, latents, mean, std)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network into a model folder, into `video_tokenizer/` or `autoencoder/`.

        Mean and std belong to the model's config.
        """
        self.network.save_pretrained(Path(folder) / (SUBFOLDER if self.has_tokenizer else AUTOENCODER))


def load_network(folder: str) -> nn.Module:
    """Return the image autoencoder of a folder or, if it has none, its video tokenizer."""
    for place in (Path(folder), *(Path(folder) / name for name in AUTOENCODER_FOLDERS)):
        config = read_json(place / "config.json", "the config of a network") if (place / "config.json").is_file() else None
        if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL":
            return load_autoencoder(place)
    return VideoTokenizer.from_pretrained(folder)


def load_autoencoder(folder: Path) -> nn.Module:
    """Return the AutoencoderKL of diffusers in a folder, in float32 on the CPU; only safetensors are read.

    Raises UserError if diffusers is not installed or the folder holds another class, NotFound if it holds
    none, RunError for missing or damaged weights.
    """
    place = next((p for p in (*(folder / name for name in AUTOENCODER_FOLDERS), folder) if (p / "config.json").is_file()), None)
    if place is None:
        raise NotFound(f"no image autoencoder in {folder}: give an AutoencoderKL folder (config.json and safetensors)")
    config = read_json(place / "config.json", "an autoencoder's config")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise UserError(f"{place} holds {shown(name)}, not an AutoencoderKL of diffusers; give the folder of one")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            "latents autoencoder need diffusers, which is not installed; pip install 'lumos-video[diffusers]'"
        ) from error
    try:
        model, found = AutoencoderKL.from_pretrained(
            place, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # of many kinds: of diffusers, safetensors and torch
        raise RunError(f"cannot read the image autoencoder in {place}: {reason_of(error)}") from error
    if found["missing_keys"] or found["unexpected_keys"] or found.get("mismatched_keys"):
        first = [*found["missing_keys"], *found["unexpected_keys"], *found.get("mismatched_keys", [])][0]
        raise RunError(f"the weights of the image autoencoder in {place} do not fit its config.json (first: {shown(first)})")
    return model


def _kinds_of(network: nn.Module) -> tuple[str, ...]:
    """Return the kinds of latents that a network can make."""
    if not isinstance(network, VideoTokenizer):
        return (AUTOENCODER,)
    if not network.is_continuous:
        return CODES
    return CONTINUOUS[1:] if network.config.is_image else CONTINUOUS


def _by_channel(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    """Return a number for each channel, float32 [C, 1, 1]; raise UserError for other values."""
    numbers = [default] * channels if values is None else list(values)
    is_scale = name == "latent_std"
    if len(numbers) != channels or not all(math.isfinite(n) and (n > 0 or not is_scale) for n in numbers):
        raise UserError(
            f"{name} {shown(values)} is not allowed; give null, or {channels} finite numbers{' above 0' if is_scale else ''}"
        )
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)


def _check_finite(is_finite: bool) -> None:
    if not is_finite:
        raise NotFinite("the numbers of the network that reads frames are not finite; check its weights, or use dtype float32")


def _check_name(what: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{what} {shown(value)} is unknown; allowed: {', '.join(allowed)}")
