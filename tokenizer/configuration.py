"""VideoTokenizerConfig: the sizes of a video tokenizer, with the published field names and defaults."""

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
}
"""The maximum of each whole-number field. All are far above the sizes of real tokenizers."""


class Sampling(NamedTuple):
    """The axes that a down- or upsampler between two levels halves or doubles."""

    spatial: bool
    temporal: bool


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """The sizes of a VideoTokenizer.

    The defaults are those of the published Cosmos DV4x8x8: 112,472,182 parameters, 64,000 codes.
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
    name: str = "DV"
    attention_window: int | None = None  # latest frames that temporal attention sees, incl. the current one; None: all (published)

    def __post_init__(self) -> None:
        for field in ("channels_mult", "attn_resolutions", "levels"):
            value = getattr(self, field)
            _require(
                isinstance(value, (list, tuple)) and len(value) <= MAX_ENTRIES and all(map(_is_positive, value)),
                field,
                value,
                f"a list of at most {MAX_ENTRIES} whole numbers above 0",
            )
            object.__setattr__(self, field, tuple(value))
        for field, most in _SIZES.items():
            value = getattr(self, field)
            _require(_is_positive(value) and value <= most, field, value, f"a whole number from 1 to {most:,}")
        widest = max(self.channels_mult, default=0) * self.channels
        _require(
            0 < widest <= MAX_CHANNELS,
            "channels_mult",
            self.channels_mult,
            f"a list of whole numbers above 0, one for each level; each times channels {self.channels} is at most {MAX_CHANNELS:,}",
        )
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
        for field in ("legacy_mode", "pointwise_ends"):
            _require(isinstance(getattr(self, field), bool), field, getattr(self, field), "true or false")
        fixed = {"num_groups": 1, "quantizer": "FSQ", "encoder": "FACTORIZED", "decoder": "FACTORIZED", "name": "DV"}
        for field, only in fixed.items():
            _require(getattr(self, field) == only, field, getattr(self, field), repr(only))
        for field in ("spatial_compression", "temporal_compression"):
            value = getattr(self, field)
            is_power = _is_positive(value) and value <= MAX_COMPRESSION and value & (value - 1) == 0
            _require(is_power, field, value, f"a power of two, at most {MAX_COMPRESSION:,}")
        self._check_compression("spatial")
        self._check_compression("temporal")

    def _check_compression(self, kind: str) -> None:
        """Raise UserError unless patches and samplers reach the compression, in the encoder and the decoder."""
        field = f"{kind}_compression"
        value = getattr(self, field)
        patch = self._patch(kind)
        _require(value >= patch, field, value, f"the patches' side ({patch}) or more")
        for side, samplers in (("encoder", self.downsamplers()), ("decoder", self.upsamplers())):
            reached = patch * 2 ** sum(getattr(sampler, kind) for sampler in samplers)
            if reached != value:
                raise UserError(
                    f"{field} {value} is not possible: the {side} with {len(self.channels_mult)} levels and patches of {patch} "
                    f"reaches {reached}; change the number of channels_mult, the patch sizes or the compressions"
                )

    @property
    def patch_channels(self) -> int:
        """The number of channels that one colour channel has after patching."""
        return self.spatial_patch_size**2 * self.patch_size**3

    def _patch(self, kind: str) -> int:
        """Return the side of the patches: in pixels for "spatial", in frames for "temporal"."""
        return self.patch_size * (self.spatial_patch_size if kind == "spatial" else 1)

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
        for level in range(1, len(self.channels_mult)):
            order = len(self.channels_mult) - 1 - level
            doubles_time = order < temporal if self.legacy_mode else 0 < order <= temporal
            doubles_space = doubles_time or (order < spatial and spatial > temporal)
            samplers.append(Sampling(doubles_space, doubles_time))
        return samplers

    def attention_levels(self) -> list[bool]:
        """Return for each level whether attention follows its residual blocks."""
        first = self.resolution // self._patch("spatial")
        return [first // 2**level in self.attn_resolutions for level in range(len(self.channels_mult))]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoTokenizerConfig:
        """Return the configuration from the contents of a config.json.

        Raises UserError (a ValueError) for an unknown key, with a list of the known keys.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [as_text(key, 60) for key in values if key not in known | BOOKKEEPING_KEYS]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            listed = ", ".join(sorted(unknown)[:3])
            raise UserError(f"unknown video tokenizer setting {listed}{more}: known are {', '.join(sorted(known))}")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json.

        Fields that the published config files do not have are left out where they have no effect.
        """
        values = dataclasses.asdict(self)
        for name, without in (("attention_window", None), ("spatial_patch_size", 1)):
            if values[name] == without:
                del values[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{field} {shown(value)} is not possible: allowed is {allowed}")
