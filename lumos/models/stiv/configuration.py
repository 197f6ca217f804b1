"""The configuration of a STIV model: its sizes, its latents, its conditions and its positions; named presets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import AutoConfig

from lumos.errors import UserError, instead, shown
from lumos.files import check_model_config
from lumos.settings import is_finite, is_number, is_whole

HEAD_DIM = 64
AXES = ("time", "rows", "columns")
LATENTS = ("per_frame", "causal", "continuous", "continuous_per_frame", "autoencoder")
"""The kinds of latents:

per_frame               values of the codes of the video tokenizer; each frame is encoded as a picture
causal                  values of the codes of the video tokenizer; 1 + 4k frames become 1 + k latents
continuous              latents of a video tokenizer without quantisation; 1 + 4k frames become 1 + k latents
continuous_per_frame    latents of such a tokenizer; each frame is encoded as a picture
autoencoder             latents of an image autoencoder (diffusers); each frame is encoded as a picture
"""
CAUSAL_LATENTS = ("causal", "continuous")
GIVEN_TIMES = ("clean", "same")
TEXT_ENCODERS = ("small", "folder")
PREDICTIONS = ("velocity", "noise")
PATTERNS = ("none", "first", "prediction", "ends", "interpolation", "views")
"""The names of the patterns of given frames, see `lumos.models.stiv.patterns`."""
EVERY_SECOND_FRAME = ("interpolation", "views")
"""The patterns that need latents of single frames."""

MAX_PARAMETERS = 10**13
_SIZES = {
    "latent_channels": 4096, "patch_size": 64, "temporal_patch_size": 64, "hidden_size": 2**17, "num_hidden_layers": 2048,
    "num_attention_heads": 2048, "mlp_ratio": 64, "unmasked_layers": 2048, "text_width": 2**16, "text_layers": 2048,
    "text_vocab_size": 2**24, "max_prompt_tokens": 2**20, "spatial_compression": 1024, "temporal_compression": 1024,
    "micro_stride": 2**16,
}  # fmt: skip
"""The largest value of each field of whole numbers; the smallest is 1."""
_SWITCHES = ("temporal_attention", "causal_in_time", "adaln_table", "qk_norm", "sandwich_norm", "condition_norm")
OMITTED = {"qk_norm": True, "sandwich_norm": True, "condition_norm": True, "prediction": "velocity"}
"""Fields that a config leaves out where they have these values, so that older folders and newer ones agree."""
PARTS = ("spatial", "temporal", "cross", "mlp")
"""The parts of a block, in their order; all but the first can be removed."""


class StivConfig(PreTrainedConfig):
    """Configuration of `StivForVideoGeneration`.

    Sizes:
        latent_channels, patch_size, temporal_patch_size: a token is a patch of temporal_patch_size latent frames
            of patch_size x patch_size places.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: the transformer; a head has 64 channels.
        unmasked_layers: the last blocks, which see all tokens in training with dropped tokens (MaskDiT).
        text_width: channels of the text states, and of the pooled text.

    Kinds:
        temporal_attention: False for a model of pictures only.
        without: parts that blocks lack, such as "3.temporal" for block 3; each is one of temporal, cross and mlp. None:
            every block is complete. Compression removes parts.
        causal_in_time: a frame attends to itself and to earlier frames only.
        adaln_table: each block adds a table of its own to the shared modulation.
        qk_norm: queries and keys have an RMSNorm. sandwich_norm: a norm stands behind each unit too, not only before it.
        condition_norm: each condition is normalised before the conditions are added. The published model has all three.
        prediction: "velocity", or "noise": the network's last layer gives the noise, from which the velocity follows.
        given_time: "clean" gives the frames of a condition their own time, "same" the time of the clip.
        position_scale: {time, rows, columns}; a position is multiplied by it before RoPE. Below 1 after a
            conversion to larger clips.
        trained_grid: {time, rows, columns}, the tokens of the clips of the training; None before the training.

    Latents:
        latents: one of LATENTS.
        latent_mean, latent_std: one number for each channel; None stands for 0 and 1.
        spatial_compression, temporal_compression: the pixels of a side, and the frames, that a latent stands for. They give
            the default micro conditions.
        micro_stride: the sampling stride that generation states as a condition.
        patterns: the patterns of given frames that the model was trained on.

    Text:
        text_encoder: "small", a causal transformer that is part of the model, or "folder", a frozen one beside it.
        text_layers, text_vocab_size, max_prompt_tokens: of the small text encoder.

    Raises ValueError for values of a wrong type and for sizes that cannot work.
    """

    model_type = "stiv"

    latent_channels: int = 8
    latents: str = "per_frame"
    patch_size: int = 2
    temporal_patch_size: int = 1
    hidden_size: int = 1152
    num_hidden_layers: int = 28
    num_attention_heads: int | None = None
    mlp_ratio: int = 4
    temporal_attention: bool = True
    causal_in_time: bool = False
    adaln_table: bool = True
    qk_norm: bool = True
    sandwich_norm: bool = True
    condition_norm: bool = True
    prediction: str = "velocity"
    without: list[str] | None = None
    unmasked_layers: int = 2
    given_time: str = "clean"
    position_scale: dict[str, float] | None = None
    trained_grid: dict[str, int] | None = None

    latent_mean: list[float] | None = None
    latent_std: list[float] | None = None
    spatial_compression: int = 8
    temporal_compression: int = 4
    micro_stride: int = 1
    patterns: list[str] | None = None

    text_encoder: str = "small"
    text_width: int = 1280
    text_layers: int = 4
    text_vocab_size: int = 1024
    max_prompt_tokens: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        if len(kwargs) > 1000 or not (is_whole(labels := kwargs.get("num_labels", 0)) and 0 <= labels <= 1000):
            raise ValueError("more than 1,000 unknown fields, or num_labels over 1,000: that is no config of this model")
        for key in kwargs:
            if close := difflib.get_close_matches(key, [f.name for f in fields(self)], n=1, cutoff=0.9):
                raise ValueError(f"unknown config field {shown(key)}; did you mean {shown(close[0])}?")
        if self.num_attention_heads is None and is_whole(self.hidden_size):
            self.num_attention_heads = max(1, self.hidden_size // HEAD_DIM)
        if self.position_scale is None:
            self.position_scale = dict.fromkeys(AXES, 1.0)
        if self.patterns is None:
            self.patterns = ["none"]
        self._check_types()  # before super().__post_init__, which computes with some of the values
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names of the presets."""
        return tuple(PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> StivConfig:
        """Return the config of a preset, with `overrides` of its fields.

        name: stiv-nano, stiv-tiny, stiv-small or stiv-base (ours), stiv-xl, stiv-xxl or stiv-m (published); the
        prefix may be left out. A stack for pictures (temporal_attention False) has temporal patches of 1.
        Raises ValueError for an unknown name.
        """
        full = f"stiv-{name}" if f"stiv-{name}" in PRESETS else name
        if full not in PRESETS:
            raise ValueError(f"unknown preset {shown(name)}{instead(full, PRESETS, 'known presets:')}")
        pictures = {"temporal_patch_size": 1} if overrides.get("temporal_attention") is False else {}
        return cls(**{**PRESETS[full], **pictures, **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a config as in transformers. Raises UserError if config.json is too large, no JSON, or no object."""
        check_model_config(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; those of OMITTED, and `without` of a complete model, are left out."""
        values = super().to_dict()
        values = {name: value for name, value in values.items() if name not in OMITTED or value != OMITTED[name]}
        if not values.get("without"):
            values.pop("without", None)
        return values

    def parts_of(self, block: int) -> frozenset[str]:
        """Return the parts of a block, some of PARTS."""
        missing = {name.partition(".")[2] for name in self.without or () if name.partition(".")[0] == str(block)}
        return frozenset(PARTS) - missing - (set() if self.temporal_attention else {"temporal"})

    @property
    def patch_channels(self) -> int:
        """The number of values of a token: latent channels x patch_size^2 x temporal_patch_size."""
        return self.latent_channels * self.patch_size**2 * self.temporal_patch_size

    @property
    def latents_are_causal(self) -> bool:
        """Whether a latent frame stands for several frames and depends on earlier ones."""
        return self.latents in CAUSAL_LATENTS

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the tokens (time, rows, columns) of latents [frames, C, height, width].

        Raises UserError for sizes that are no multiple of the patch.
        """
        sizes = {"time": (frames, self.temporal_patch_size), "rows": (height, self.patch_size), "columns": (width, self.patch_size)}
        for axis, (size, patch) in sizes.items():
            if size < 1 or size % patch:
                raise UserError(f"{size} latents along {axis} are no multiple of the patch of {patch}; give another clip size")
        return tuple(size // patch for size, patch in sizes.values())

    def latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of a clip of `num_frames` frames. Raises UserError for a number that causal latents lack."""
        if not self.latents_are_causal:
            return num_frames
        if (num_frames - 1) % self.temporal_compression:
            raise UserError(f"num_frames {num_frames} is not allowed; {self.latents} latents need 1 + {self.temporal_compression}k")
        return 1 + (num_frames - 1) // self.temporal_compression

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the frames of a clip of `latent_frames` latent frames."""
        return 1 + (latent_frames - 1) * self.temporal_compression if self.latents_are_causal else latent_frames

    def _check_types(self) -> None:
        for name, most in _SIZES.items():
            if not is_whole(value := getattr(self, name)) or not 1 <= value <= most:
                raise ValueError(f"{name} {shown(value)} is not allowed; give a whole number from 1 to {most:,}")
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} {shown(value)} is not allowed; give true or false")
        choices = (("latents", LATENTS), ("given_time", GIVEN_TIMES), ("text_encoder", TEXT_ENCODERS), ("prediction", PREDICTIONS))
        for name, allowed in choices:
            if not isinstance(value := getattr(self, name), str) or value not in allowed:
                raise ValueError(f"{name} {shown(value)} is unknown; allowed: {', '.join(allowed)}")
        scale = self.position_scale
        if not _is_by_axis(scale) or not all(is_number(v) and 0 < v <= 1024 for v in scale.values()):
            raise ValueError(f"position_scale {shown(scale)} is not allowed; give a number above 0 for each of {', '.join(AXES)}")
        grid = self.trained_grid
        if grid is not None and (not _is_by_axis(grid) or not all(is_whole(v) and 1 <= v <= 2**20 for v in grid.values())):
            raise ValueError(f"trained_grid {shown(grid)} is not allowed; give null, or whole numbers for {', '.join(AXES)}")
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is not None and not _are_finite(values, self.latent_channels, above=0 if name == "latent_std" else None):
                raise ValueError(f"{name} {shown(values)} is not allowed; give null, or {self.latent_channels} finite numbers"
                                 + (" above 0" if name == "latent_std" else ""))  # fmt: skip
        known = {f"{i}.{part}" for i in range(self.num_hidden_layers) for part in PARTS[1:]}
        removed = self.without
        if removed is not None and (
            not isinstance(removed, list | tuple) or not all(isinstance(name, str) and name in known for name in removed)
            or len(set(removed)) < len(removed)
        ):  # fmt: skip
            raise ValueError(
                f"without {shown(removed)} is not allowed; give null, or different parts such as 3.temporal: one of "
                f"{', '.join(PARTS[1:])} of a block from 0 to {self.num_hidden_layers - 1}"
            )
        patterns = self.patterns
        if not isinstance(patterns, list | tuple) or not patterns or any(p not in PATTERNS for p in patterns):
            raise ValueError(f"patterns {shown(patterns)} is not allowed; give some of {', '.join(PATTERNS)}")

    def _check(self) -> None:
        if self.num_attention_heads * HEAD_DIM != self.hidden_size:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not {HEAD_DIM} x num_attention_heads {self.num_attention_heads}; a head "
                f"has {HEAD_DIM} channels"
            )
        if self.text_encoder == "small" and self.text_width % HEAD_DIM:
            raise ValueError(f"text_width {self.text_width} is no multiple of {HEAD_DIM}, the channels of a head")
        if self.latents_are_causal and self.temporal_patch_size != 1:
            raise ValueError(
                f"temporal_patch_size {self.temporal_patch_size} does not work with {self.latents} latents, of "
                "which there are 1 + k; give 1, or latents per_frame"
            )
        if self.latents_are_causal and (wrong := [p for p in self.patterns if p in EVERY_SECOND_FRAME]):
            raise ValueError(f"pattern {wrong[0]} needs latents of single frames; it does not work with {self.latents} latents")
        if not self.temporal_attention and (wrong := [name for name in self.without or () if name.endswith(".temporal")]):
            raise ValueError(f"without {wrong[0]} has no effect without temporal_attention; leave it out")
        if not self.temporal_attention and self.causal_in_time:
            raise ValueError("causal_in_time has no effect without temporal_attention; leave it out")
        if not self.temporal_attention and self.temporal_patch_size != 1:
            raise ValueError(f"temporal_patch_size {self.temporal_patch_size} does not work without temporal attention; give 1")
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(f"a model of these sizes has {self.num_parameters:,} weights; allowed: at most {MAX_PARAMETERS:,}")

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the transformer, without those of the text encoder."""
        d, e, p = self.hidden_size, self.text_width, self.patch_channels
        attention = 4 * d * d + 4 * d + 2 * HEAD_DIM * self.qk_norm
        mlp = 2 * self.mlp_ratio * d * d + (self.mlp_ratio + 1) * d
        sizes = {"spatial": attention, "temporal": attention + d, "cross": attention, "mlp": mlp}
        missing = [name.partition(".")[2] for name in self.without or ()]
        missing += ["temporal"] * (0 if self.temporal_attention else self.num_hidden_layers)
        blocks = sum(size * (self.num_hidden_layers - missing.count(part)) for part, size in sizes.items())
        ends = 8 * d * d + 8 * d + 5 * d * d + 1802 * d + 2 * (e + 1) * d + d * d + d + (p + 1) * d + (d + 1) * p + d
        return blocks + self.num_hidden_layers * 6 * d * self.adaln_table + ends


def _is_by_axis(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == set(AXES)


def _are_finite(values: object, count: int, above: float | None) -> bool:
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count
        and all(is_finite(v) and (above is None or v > above) for v in values)
    )  # fmt: skip


def _ours(layers: int, width: int, text_layers: int) -> dict[str, Any]:
    return {
        "latent_channels": 5, "hidden_size": width, "num_hidden_layers": layers, "text_width": width, "text_layers": text_layers,
    }  # fmt: skip


def _published(layers: int, width: int) -> dict[str, Any]:
    return {
        "latents": "autoencoder", "latent_channels": 8, "temporal_patch_size": 2, "hidden_size": width, "num_hidden_layers": layers,
        "text_encoder": "folder", "text_width": 1280,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "stiv-nano": _ours(4, 128, 2),
    "stiv-tiny": _ours(8, 256, 4),
    "stiv-small": _ours(12, 384, 4),
    "stiv-base": _ours(12, 768, 6),
    "stiv-xl": _published(28, 1152),
    "stiv-xxl": _published(38, 1536),
    "stiv-m": _published(46, 3072),
}

AutoConfig.register(StivConfig.model_type, StivConfig)
