"""VideoTokenizerConfig: the sizes of a video tokenizer, with the published field names and defaults.

A tokenizer has one of three names: DV encodes video to codes, CV encodes video to continuous latents, CI
encodes pictures to continuous latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumos.errors import UserError, as_text, shown
from tokenizer.wavelet import PATCH_METHODS

BOOKKEEPING_KEYS = frozenset(
    (
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "persistent_quantizer",
    )
)
"""Keys of published config files that do not describe the network."""


MAX_ENTRIES = 16
"""The maximum length of channels_mult, attn_resolutions and levels."""
MAX_CHANNELS = 2**16
MAX_CODES = 2**24
MAX_WINDOW = 2**20
MAX_COMPRESSION = 1024
_SIZES = {
    "in_channels": 1024,
    "out_channels": 1024,
    "channels": 2**14,
    "num_res_blocks": 64,
    "resolution": 2**20,
    "z_channels": 2**14,
    "z_factor": 64,
    "latent_channels": 2**14,
}
"""The maximum of each whole-number field. All are far above the sizes of real tokenizers."""


DISCRETE_FIELDS = {"quantizer": ("FSQ", ""), "embedding_dim": (6, 0), "levels": ((8, 8, 8, 5, 5, 5), ())}
"""The fields that a continuous tokenizer (CV, CI) does not have: (default, value in a continuous tokenizer)."""
CONTINUOUS_FIELDS = {"latent_channels": (0, 16), "formulation": ("", "AE")}
"""The fields that only a continuous tokenizer has: (value in a discrete tokenizer, default)."""
DERIVED_FIELDS = ("decoder_channels_mult", "unused_samplers")
"""The fields that published configs lack, because the weights tell them (`loading.fitted`)."""
PRUNED_FIELDS = {
    "decoder_num_res_blocks": None, "decoder_mid": True, "decoder_idle": True, "decoder_channels": None, "codes_of": None,
}  # fmt: skip
"""The fields of a tokenizer whose decoder was made smaller, with their values in a complete one."""
_VIDEO_ONLY = {
    "legacy_mode": False, "spatial_patch_size": 1, "pointwise_ends": False, "attention_window": None, "num_groups": 1,
    "temporal_compression": 1, "decoder_channels_mult": None, "unused_samplers": False,
}  # fmt: skip
"""The fields of a picture tokenizer (CI) that have only one possible value."""
GROUPS_OF_PICTURES = 32
"""The groups of the normalisations of a picture tokenizer."""


class Sampling(NamedTuple):
    """The axes that a down- or upsampler between two levels halves or doubles."""

    spatial: bool
    temporal: bool


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """The sizes of a VideoTokenizer.

    The defaults are those of the published Cosmos DV4x8x8: 112,472,182 parameters, 64,000 codes. A
    continuous tokenizer (name CV or CI) has `latent_channels` and `formulation` instead of `quantizer`,
    `embedding_dim` and `levels`, which become empty. `from_dict` knows the published defaults of a name.
    A value that is not allowed raises UserError (a ValueError) with the allowed values.
    """

    in_channels: int = 3  # colour channels of the input
    out_channels: int = 3  # colour channels of the output
    channels: int = 128  # width of the first level before its multiplier
    channels_mult: tuple[int, ...] = (2, 4, 4)  # width multiplier per level; its length is the number of levels
    num_res_blocks: int = 2  # residual blocks per encoder level; a decoder level has one more
    attn_resolutions: tuple[int, ...] = (32,)  # levels whose nominal side length is listed have attention
    dropout: float = 0.0  # dropout probability inside residual blocks
    resolution: int = 1024  # nominal input side in pixels; its only use is to apply attn_resolutions
    patch_size: int = 4  # side of a patch in pixels and in frames: 1, 2, 4 or 8
    patch_method: str = "haar"  # haar or rearrange
    z_channels: int = 16  # encoder output channels
    z_factor: int = 1  # multiplies z_channels at the encoder's output
    num_groups: int = 1  # groups of the normalisations; the factorised network supports only 1
    legacy_mode: bool = False  # the decoder upsamples time from its first sampler on (True) or its second (False)
    spatial_compression: int = 8  # pixels per code along height and width
    temporal_compression: int = 4  # frames per latent frame after the first
    spatial_patch_size: int = 1  # 2: extra 2 x 2 pixel patches first, for twice the height and width (not published)
    pointwise_ends: bool = False  # 1x1x1 convolutions next to the patches; halves a narrow network's FLOPs (not published)
    quantizer: str = "FSQ"
    embedding_dim: int = 6  # quantized channels, one for each entry of levels
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)  # values per quantized channel; their product is the number of codes
    encoder: str = "FACTORIZED"
    decoder: str = "FACTORIZED"
    name: str = "DV"  # DV: codes of video; CV: continuous latents of video; CI: continuous latents of pictures
    latent_channels: int = 0  # channels of a continuous latent; 0: the tokenizer has codes
    formulation: str = ""  # of a continuous latent: AE (the encoder's output) or VAE (mean and log variance); "": codes
    decoder_channels_mult: tuple[int, ...] | None = None  # width multipliers of the decoder; None: channels_mult
    unused_samplers: bool = True  # samplers have the convolutions that they do not use too (first generation)
    attention_window: int | None = None  # latest frames that temporal attention sees, incl. the current one; None: all (published)
    decoder_num_res_blocks: tuple[int, ...] | None = None  # residual blocks per decoder level; None: num_res_blocks + 1 in each
    decoder_mid: bool = True  # the decoder has a middle
    decoder_idle: bool = True  # the decoder has the samplers and convolutions that no pixel depends on, if unused_samplers is set
    decoder_channels: int | None = None  # width of the decoder's first level before its multiplier; None: channels
    codes_of: tuple[str, str] | None = None  # fingerprints of the encoder, and of the tokenizer that makes the same codes

    def __post_init__(self) -> None:
        _require(self.name in ("DV", "CV", "CI"), "name", self.name, "'DV', 'CV' or 'CI'")
        for field in ("channels_mult", "attn_resolutions", "levels", "decoder_channels_mult"):
            value = getattr(self, field)
            if field == "decoder_channels_mult" and value is None:
                continue
            _require(
                isinstance(value, (list, tuple)) and len(value) <= MAX_ENTRIES and all(map(_is_positive, value)),
                field,
                value,
                f"a list of at most {MAX_ENTRIES} whole numbers above 0",
            )
            object.__setattr__(self, field, tuple(value))
        self._set_latent()
        for field, most in _SIZES.items():
            value = getattr(self, field)
            if field == "latent_channels" and not self.is_continuous:
                continue
            _require(_is_positive(value) and value <= most, field, value, f"a whole number from 1 to {most:,}")
        for field in ("channels_mult", "decoder_channels_mult"):
            value = getattr(self, field)
            widest = max(self.channels_mult if value is None else value, default=0) * self.channels
            _require(
                0 < widest <= MAX_CHANNELS,
                field,
                value,
                f"a list of whole numbers above 0, one for each level; each times channels {self.channels} is at most "
                f"{MAX_CHANNELS:,}",
            )
        if not self.is_continuous:
            self._check_levels()
        _require(
            self.attention_window is None or (_is_positive(self.attention_window) and self.attention_window <= MAX_WINDOW),
            "attention_window",
            self.attention_window,
            f"a whole number from 1 to {MAX_WINDOW:,}, or null for all earlier frames",
        )
        for field, sizes in (("patch_size", (1, 2, 4, 8)), ("spatial_patch_size", (1, 2))):
            value = getattr(self, field)
            _require(_is_positive(value) and value in sizes, field, value, f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}")
        _require(self.patch_method in PATCH_METHODS, "patch_method", self.patch_method, " or ".join(PATCH_METHODS))
        is_number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        _require(is_number and 0 <= self.dropout < 1, "dropout", self.dropout, "0 up to, not including, 1")
        for field in ("legacy_mode", "pointwise_ends", "unused_samplers", "decoder_mid", "decoder_idle"):
            _require(isinstance(getattr(self, field), bool), field, getattr(self, field), "true or false")
        network = "Default" if self.is_image else "FACTORIZED"
        for field, only in {"num_groups": 1, "encoder": network, "decoder": network}.items():
            _require(getattr(self, field) == only, field, getattr(self, field), repr(only))
        for field in ("spatial_compression", "temporal_compression"):
            value = getattr(self, field)
            is_power = _is_positive(value) and value <= MAX_COMPRESSION and value & (value - 1) == 0
            _require(is_power, field, value, f"a power of two, at most {MAX_COMPRESSION:,}")
        if self.is_image:
            self._check_image()
        self._check_pruned()
        self._check_compression("spatial")
        self._check_compression("temporal")

    def _set_latent(self) -> None:
        """Check and complete the fields that describe codes or continuous latents."""
        for field, (default, empty) in DISCRETE_FIELDS.items():
            value = getattr(self, field)
            if self.is_continuous:
                _require(value in (default, empty), field, value, f"nothing: {self.name} has no quantizer; leave it out")
                object.__setattr__(self, field, empty)
        for field, (empty, default) in CONTINUOUS_FIELDS.items():
            value = getattr(self, field)
            if not self.is_continuous:
                is_empty = type(value) is type(empty) and value == empty
                _require(is_empty, field, value, f"nothing: {self.name} has codes; leave it out")
            elif value == empty:
                object.__setattr__(self, field, default)
        if self.is_continuous:
            _require(self.formulation in ("AE", "VAE"), "formulation", self.formulation, "'AE' or 'VAE'")
            factor = 2 if self.formulation == "VAE" else 1
            _require(self.z_factor == factor, "z_factor", self.z_factor, f"{factor} for the formulation {self.formulation}")
        else:
            _require(self.quantizer == "FSQ", "quantizer", self.quantizer, "'FSQ'")
            for field, only in (("decoder_channels_mult", None), ("unused_samplers", True)):
                _require(getattr(self, field) == only, field, getattr(self, field), f"{only} for a tokenizer with codes")

    def _check_levels(self) -> None:
        """Raise UserError for levels that the quantizer cannot have."""
        _require(
            all(level >= 2 for level in self.levels) and 1 < math.prod(self.levels) <= MAX_CODES,
            "levels",
            self.levels,
            f"a list of whole numbers of 2 or more, whose product, the number of codes, is at most {MAX_CODES:,}",
        )
        _require(
            self.embedding_dim == len(self.levels),
            "embedding_dim",
            self.embedding_dim,
            f"{len(self.levels)}, the length of levels",
        )

    def _check_pruned(self) -> None:
        """Raise UserError for settings that a smaller decoder cannot have."""
        width, counts, origin = self.decoder_channels, self.decoder_num_res_blocks, self.codes_of
        fits = width is None or (_is_positive(width) and width <= self.channels and not self.is_image)
        _require(fits, "decoder_channels", width, f"null, or for videos a whole number from 1 to channels {self.channels}")
        if counts is not None:
            widths = self.decoder_widths
            least = [int(width != inner) for width, inner in zip(widths, (*widths[1:], widths[-1]), strict=True)]
            most = self.num_res_blocks + 1
            fits = isinstance(counts, (list, tuple)) and len(counts) == len(least) and all(
                type(count) is int and low <= count <= most for count, low in zip(counts, least, strict=True)
            )  # fmt: skip
            allowed = f"null, or a whole number up to {most} for each level, at least {least}"
            _require(fits, "decoder_num_res_blocks", counts, allowed)
            object.__setattr__(self, "decoder_num_res_blocks", tuple(counts))
        if origin is not None:
            fits = isinstance(origin, (list, tuple)) and len(origin) == 2 and all(isinstance(part, str) for part in origin)
            _require(fits, "codes_of", origin, "null, or two fingerprints")
            object.__setattr__(self, "codes_of", tuple(origin))

    def _check_image(self) -> None:
        """Raise UserError for settings that the picture network does not have."""
        for field, only in {**_VIDEO_ONLY, "patch_method": "haar"}.items():
            _require(getattr(self, field) == only, field, getattr(self, field), f"{only} for the name CI")
        for mult in (1, *self.channels_mult):
            fits = self.channels * mult % GROUPS_OF_PICTURES == 0
            _require(fits, "channels", self.channels, f"widths that are multiples of {GROUPS_OF_PICTURES}")
        _require(
            not any(self.attention_levels()),
            "attn_resolutions",
            self.attn_resolutions,
            f"a list without the sides of the {len(self.channels_mult)} levels for the name CI",
        )

    def _check_compression(self, kind: str) -> None:
        """Raise UserError unless patches and samplers reach the compression, in the encoder and the decoder."""
        field = f"{kind}_compression"
        value = getattr(self, field)
        patch = self._patch(kind)
        _require(value >= patch, field, value, f"the patches' side ({patch}) or more")
        for side, samplers in (("encoder", self.encoder_samplers()), ("decoder", self.decoder_samplers())):
            reached = patch * 2 ** sum(getattr(sampler, kind) for sampler in samplers if sampler)
            if reached != value:
                raise UserError(
                    f"{field} {value} is not possible: the {side} with {len(samplers)} levels and patches of {patch} "
                    f"reaches {reached}; change the number of channels_mult, the patch sizes or the compressions"
                )

    @property
    def is_continuous(self) -> bool:
        """Whether the tokenizer makes continuous latents instead of codes."""
        return self.name != "DV"

    @property
    def is_image(self) -> bool:
        """Whether the network is one for pictures, which encodes each frame of a clip separately."""
        return self.name == "CI"

    @property
    def value_channels(self) -> int:
        """The number of channels of code values or of a continuous latent."""
        return self.latent_channels if self.is_continuous else self.embedding_dim

    @property
    def encoder_outputs(self) -> int:
        """The number of channels that the encoder gives: `value_channels`, twice as many for the formulation VAE."""
        return self.value_channels * (self.z_factor if self.is_continuous else 1)

    @property
    def decoder_mult(self) -> tuple[int, ...]:
        """The width multipliers of the decoder's levels."""
        return self.channels_mult if self.decoder_channels_mult is None else self.decoder_channels_mult

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The channels of the decoder's levels."""
        return tuple((self.decoder_channels or self.channels) * mult for mult in self.decoder_mult)

    @property
    def decoder_blocks(self) -> tuple[int, ...]:
        """The number of residual blocks of the decoder's levels."""
        if self.decoder_num_res_blocks is not None:
            return self.decoder_num_res_blocks
        return (self.num_res_blocks + 1,) * len(self.decoder_mult)

    @property
    def patch_channels(self) -> int:
        """The number of channels that one colour channel has after patching."""
        return self.spatial_patch_size**2 * self.patch_size ** (2 if self.is_image else 3)

    def _patch(self, kind: str) -> int:
        """Return the side of the patches: in pixels for "spatial", in frames for "temporal"."""
        if kind == "temporal":
            return 1 if self.is_image else self.patch_size
        return self.patch_size * self.spatial_patch_size

    def _num_halvings(self, kind: str) -> int:
        return getattr(self, f"{kind}_compression").bit_length() - self._patch(kind).bit_length()

    def downsamplers(self) -> list[Sampling]:
        """Return the axes that the encoder halves after each level except the last."""
        spatial, temporal = self._num_halvings("spatial"), self._num_halvings("temporal")
        return [Sampling(level < spatial, level < temporal) for level in range(len(self.channels_mult) - 1)]

    def upsamplers(self) -> list[Sampling]:
        """Return the axes that the decoder doubles after levels 1, 2, ...

        Level 0 has no sampler. The decoder runs from the last level down to level 0. In the
        published network, the first sampler that runs doubles space only, unless legacy_mode is set.
        """
        spatial, temporal = self._num_halvings("spatial"), self._num_halvings("temporal")
        samplers = []
        for level in range(1, len(self.decoder_mult)):
            order = len(self.decoder_mult) - 1 - level
            doubles_time = order < temporal if self.legacy_mode else 0 < order <= temporal
            doubles_space = doubles_time or (order < spatial and spatial > temporal)
            samplers.append(Sampling(doubles_space, doubles_time))
        return samplers

    def encoder_samplers(self) -> list[Sampling | None]:
        """Return what the sampler after each level of the encoder halves; None: the level has no sampler."""
        if self.is_image:
            halvings = self._num_halvings("spatial")
            return [Sampling(True, False) if level < halvings else None for level in range(len(self.channels_mult))]
        return self._kept([*self.downsamplers(), None])

    def decoder_samplers(self) -> list[Sampling | None]:
        """Return what the sampler after each level of the decoder doubles; None: the level has no sampler."""
        if self.is_image:
            return self.encoder_samplers()[::-1]
        return self._kept([None, *self.upsamplers()], self.decoder_idle)

    def _kept(self, samplers: list[Sampling | None], idle: bool = True) -> list[Sampling | None]:
        """Return the samplers that the network has: all of them, or only those in use."""
        unused = self.unused_samplers and idle
        return [sampler if unused or (sampler and any(sampler)) else None for sampler in samplers]

    def attention_levels(self, count: int | None = None) -> list[bool]:
        """Return for each of `count` levels (None: those of the encoder) whether attention follows its residual blocks."""
        first = self.resolution // self._patch("spatial")
        return [first // 2**level in self.attn_resolutions for level in range(count or len(self.channels_mult))]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoTokenizerConfig:
        """Return the configuration from the contents of a config.json.

        Raises UserError (a ValueError) for an unknown key, with a list of the known keys.
        """
        name = values.get("name", "DV")
        not_here = DISCRETE_FIELDS if name in ("CV", "CI") else (*CONTINUOUS_FIELDS, *DERIVED_FIELDS)
        known = {field.name for field in dataclasses.fields(cls)}.difference(not_here)
        unknown = [as_text(key, 60) for key in values if key not in known | BOOKKEEPING_KEYS]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            listed = ", ".join(sorted(unknown)[:3])
            raise UserError(f"unknown video tokenizer setting {listed}{more}: known are {', '.join(sorted(known))}")
        of_name = _IMAGE_DEFAULTS if name == "CI" else {}
        return cls(**of_name | {key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json.

        Fields that the published config files do not have are left out where they have no effect.
        """
        values = dataclasses.asdict(self)
        left_out = {"attention_window": None, "spatial_patch_size": 1, "decoder_channels_mult": None, "unused_samplers": True}
        left_out |= PRUNED_FIELDS
        left_out |= {field: values[field] for field in (DISCRETE_FIELDS if self.is_continuous else CONTINUOUS_FIELDS)}
        left_out |= _VIDEO_ONLY if self.is_image else {}
        values = {name: value for name, value in values.items() if name not in left_out or value != left_out[name]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


_IMAGE_DEFAULTS = {"temporal_compression": 1, "spatial_compression": 16, "encoder": "Default", "decoder": "Default",
                   "unused_samplers": False}  # fmt: skip


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{field} {shown(value)} is not possible: allowed is {allowed}")
