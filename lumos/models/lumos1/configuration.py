"""The configuration of a Lumos-1 model: its sizes, its token ids, its positions and its prompt template; named presets."""

from __future__ import annotations

import difflib
import string
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import AutoConfig

from lumos.errors import instead, shown
from lumos.files import check_model_config

POSITION_SCHEMES = ("mm_rope", "mm_rope_unscaled", "videorope", "m_rope", "rope_3d", "1d")
SCALED_SCHEMES = ("mm_rope", "videorope")
"""The schemes in which neighbouring codes are several positions apart; neighbouring text tokens are one apart."""
PATTERNS = ("none", "first", "prediction", "ends")
"""The names of the patterns of given frames, see `lumos.models.lumos1.patterns`."""
ATTENTION_IMPLEMENTATIONS = ("segmented", "dense", "flex")
PUBLISHED_TEMPLATE = (
    "Generate a video with a resolution of {width}x{height}, consisting of {num_frames} frames at {fps} frames per "
    "second, according to the following prompt:\n {prompt}"
)

MAX_PARAMETERS = 10**13
MAX_TEMPLATE_LENGTH = 10_000
_SHARED_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2048,
    "num_attention_heads": 2048,
    "num_key_value_heads": 2048,
    "model_parallel_size": 2048,
    "max_position_embeddings": 2**26,
    "visual_token_count": 2**24,
}
_SIZES = {
    **_SHARED_SIZES,
    "loss_chunk_size": 2**24,
    "number_token_count": 2**20,
    "temporal_compression": 1024,
    "spatial_compression": 1024,
    "pixels_per_size_unit": 2**16,
    "max_prompt_tokens": 2**20,
}
"""The largest value of each field of whole numbers; the smallest is 1.

The limits are far beyond any known model. They keep a damaged or hostile config from asking for numbers
so large that computing with them takes time or memory.
"""
_NUMBERS = {"rms_norm_eps": 1.0, "rope_theta": 1e15, "initializer_range": 100.0}
"""The largest value of each field of real numbers; all must be above 0."""
_CHAMELEON_FIELDS = (*_SHARED_SIZES, *_NUMBERS, "visual_token_start", "architectures", "dtype", "torch_dtype")
_SPECIAL = ("bos", "sep", "newline", "mask", "frame_start", "frame_end", "video_start", "video_end")
_CHAMELEON_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "swin_norm": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


class LumosConfig(PreTrainedConfig):
    """Configuration of `LumosForVideoGeneration`. The defaults are those of the published 1B model.

    Names of sizes follow Llama. Ids default to the published vocabulary: 65,536 text ids, then 64,000
    video codes. Some fields have no counterpart in Llama:

        attention: implementation of attention over whole sequences, in training and in
            `model(input_ids)`: "segmented", "dense" or "flex". Generation has a cache and ignores it.
        max_position_embeddings: the longest sequence that the pipeline makes, in tokens.
        pixels_per_size_unit: pixels that one unit of a frame's two size tokens stands for.
        position_scheme: the rotary positions, one of POSITION_SCHEMES (lumos/models/lumos1/rope.py).
        position_strides: distances of neighbouring codes along time, rows and columns. None: the
            compression of the video tokenizer. A model that was resized after training keeps its
            earlier distances here.
        prompt_template: the text that the decoder reads. It may use {width} {height} {num_frames} {fps}
            and must contain {prompt}.
        loss_chunk_size: positions whose logits exist at the same time in the loss.
        patterns: the patterns of given frames that the model was trained on, some of PATTERNS; None:
            ["none"]. Every model makes clips from their first frames. A last frame needs "ends".

    Raises ValueError for values of a wrong type and for sizes that cannot work: a head dimension that
    is not a multiple of 32, ids outside the vocabulary, or more than MAX_PARAMETERS weights.
    """

    model_type = "lumos"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["position_loss"]

    vocab_size: int = 129_536
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 65_536
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    model_parallel_size: int = 1
    tie_word_embeddings: bool = False

    position_scheme: str = "mm_rope"
    position_strides: list[int] | None = None
    attention: str = "segmented"
    loss_chunk_size: int = 256
    patterns: list[str] | None = None

    bos_token_id: int | None = 0
    pad_token_id: int | None = 0
    eos_token_id: int | None = None
    sep_token_id: int = 8710
    newline_token_id: int = 8803
    mask_token_id: int = 9003
    frame_start_token_id: int = 8197
    frame_end_token_id: int = 8196
    video_start_token_id: int = 9004
    video_end_token_id: int = 9005
    number_token_start: int = 8804
    number_token_count: int = 199
    visual_token_start: int = 65_536
    visual_token_count: int = 64_000

    temporal_compression: int = 4
    spatial_compression: int = 8
    pixels_per_size_unit: int = 32
    max_prompt_tokens: int = 2048
    prompt_template: str = PUBLISHED_TEMPLATE

    def __post_init__(self, **kwargs: Any) -> None:
        if len(kwargs) > 1000 or not _is_whole(kwargs.get("num_labels", 0), 0, 1000):  # transformers names each label
            raise ValueError("more than 1,000 unknown fields, or num_labels over 1,000: that is no config of this model")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.patterns is None:
            self.patterns = ["none"]
        for key in kwargs:
            if close := difflib.get_close_matches(key, [f.name for f in fields(self)], n=1, cutoff=0.9):
                raise ValueError(f"unknown config field {shown(key)}; did you mean {shown(close[0])}?")
        self._check_types()  # before super().__post_init__, which computes with some of the values
        super().__post_init__(**kwargs)
        self._check()

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names of the presets."""
        return tuple(PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LumosConfig:
        """Return the config of a preset, with `overrides` of its fields.

        name: tiny (the shipped model), 0.5b, 1b or 3b (reference, section 1.3).
        Raises ValueError for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {shown(name)}{instead(name, PRESETS, 'known presets:')}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a config as in transformers; the config of a released Lumos-1 folder is translated.

        Raises UserError if config.json is too large, is not valid JSON, or holds no object.
        """
        check_model_config(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "chameleon":
            config_dict = from_chameleon(config_dict)
        return config_dict, kwargs

    @property
    def special_token_ids(self) -> dict[str, int]:
        """The ids of the special tokens by name. Text never encodes to one of these ids."""
        return {name: getattr(self, f"{name}_token_id") for name in _SPECIAL}

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the decoder and its head."""
        c, head_norms = self.hidden_size, 4 * self.model_parallel_size * self.head_dim
        matrices = 2 * c * c + 2 * c * self.num_key_value_heads * self.head_dim + 3 * c * self.intermediate_size
        return self.num_hidden_layers * (matrices + 2 * c + head_norms) + 2 * self.vocab_size * c + c

    def is_reserved(self, token: int) -> bool:
        """Return whether an id is a special token, a number token or a visual code, and so never text."""
        number = 0 <= token - self.number_token_start < self.number_token_count
        visual = 0 <= token - self.visual_token_start < self.visual_token_count
        return number or visual or token in self.special_token_ids.values()

    def reserved_ids(self, end: int) -> list[int]:
        """Return the ids below `end` that are reserved, in order; see `is_reserved`."""
        numbers = range(self.number_token_start, min(end, self.number_token_start + self.number_token_count))
        visual = range(self.visual_token_start, min(end, self.visual_token_start + self.visual_token_count))
        return sorted({*numbers, *visual, *(i for i in self.special_token_ids.values() if i < end)})

    def _check_ids(self) -> None:
        ids = self.special_token_ids
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"special tokens must have different ids; given: {ids}")
        numbers = range(self.number_token_start, self.number_token_start + self.number_token_count)
        visual = range(self.visual_token_start, self.visual_token_start + self.visual_token_count)
        for name, value in {**ids, "first number": numbers.start, "last number": numbers.stop - 1}.items():
            if not 0 <= value < self.vocab_size or value in visual:
                raise ValueError(f"{name} token has id {value}: outside the vocabulary of {self.vocab_size}, or a visual code")
        if inside := [name for name, value in ids.items() if value in numbers]:
            raise ValueError(f"special tokens {', '.join(inside)} lie among the number tokens {numbers.start}..{numbers.stop - 1}")

    def _check_types(self) -> None:
        ids = ("visual_token_start", "number_token_start", *(f"{name}_token_id" for name in _SPECIAL))
        whole = {**{name: (1, most) for name, most in _SIZES.items()}, **dict.fromkeys(ids, (-(2**31), 2**31))}
        for name, (least, most) in whole.items():
            if not _is_whole(value := getattr(self, name), least, most):
                raise ValueError(f"{name} {shown(value)} is not allowed; give a whole number from {least:,} to {most:,}")
        for name, most in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{name} {shown(value)} is not allowed; give a number above 0, at most {most:g}")
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, 0, self.vocab_size - 1):
                raise ValueError(f"{name} {shown(value)} is not allowed; give null, or an id below vocab_size {self.vocab_size}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings {shown(self.tie_word_embeddings)} is not allowed; give false")

    def _check(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        if self.head_dim % 32:
            raise ValueError(
                f"head dimension {self.head_dim} (hidden_size {self.hidden_size} / {heads} heads) is not a multiple of "
                "32: MM-RoPE shares channels among the axes in groups of 16 frequencies; choose 32, 64, 96 or 128"
            )
        if heads % kv_heads or heads % self.model_parallel_size or kv_heads % self.model_parallel_size:
            raise ValueError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}, and both of "
                f"model_parallel_size {self.model_parallel_size}"
            )
        for name, value, allowed in (
            ("position_scheme", self.position_scheme, POSITION_SCHEMES),
            ("attention", self.attention, ATTENTION_IMPLEMENTATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {shown(value)} is unknown; allowed: {', '.join(allowed)}")
        patterns = self.patterns
        if not isinstance(patterns, list | tuple) or not patterns or any(p not in PATTERNS for p in patterns):
            raise ValueError(f"patterns {shown(patterns)} is not allowed; give some of {', '.join(PATTERNS)}")
        strides = self.position_strides
        if strides is not None:
            if not isinstance(strides, list | tuple) or len(strides) != 3 or not all(_is_whole(s, 1, 2**16) for s in strides):
                raise ValueError(
                    f"position_strides {shown(strides)} is not allowed; give three whole numbers above 0 (time, rows, columns)"
                )
            if self.position_scheme not in SCALED_SCHEMES:
                raise ValueError(f"position_strides has no effect with position_scheme {shown(self.position_scheme)}; leave it out")
        if self.visual_token_start + self.visual_token_count > self.vocab_size:
            raise ValueError(
                f"visual tokens {self.visual_token_start}..{self.visual_token_start + self.visual_token_count - 1} "
                f"do not fit into vocab_size {self.vocab_size}"
            )
        self._check_ids()
        if self.pixels_per_size_unit % self.spatial_compression:
            raise ValueError(
                f"pixels_per_size_unit {self.pixels_per_size_unit} is not a multiple of spatial_compression "
                f"{self.spatial_compression}"
            )
        self._check_template()
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(f"a model of these sizes has {self.num_parameters:,} weights; allowed: at most {MAX_PARAMETERS:,}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; the head of this model is untied")


    def _check_template(self) -> None:
        template, names = self.prompt_template, ("prompt", "width", "height", "num_frames", "fps")
        try:
            if not isinstance(template, str) or len(template) > MAX_TEMPLATE_LENGTH:
                raise ValueError(f"it must be a text of at most {MAX_TEMPLATE_LENGTH:,} characters")
            holes = [hole for _, *hole in string.Formatter().parse(template) if hole[0] is not None]
            if wrong := [name for name, spec, how in holes if name not in names or spec or how]:
                # A format specification is refused too: {prompt:>1000000000} would fill the memory.
                raise ValueError(f"it asks for {shown(wrong[0])}, or for a format of it")
        except ValueError as error:
            allowed = " ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"prompt_template {shown(template)} is not usable ({error}); it may hold {allowed}") from error
        if ["prompt", "", None] not in holes:
            raise ValueError(f"prompt_template {shown(template)} has no {{prompt}} in it")


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def from_chameleon(published: dict[str, Any]) -> dict[str, Any]:
    """Translate the config.json of a released Lumos-1 folder into fields of LumosConfig.

    The special ids are those of the published sequence layout (reference, section 2.1). The bos, eos and
    pad fields of the released file are class defaults that the layout does not use, so they are ignored.
    Raises ValueError for variants of Chameleon that Lumos-1 does not use: biases, swin_norm, RoPE
    scaling, or a tied head.
    """
    for key, value in _CHAMELEON_FIXED.items():
        if published.get(key, value) != value:
            raise ValueError(f"config.json has {key} = {shown(published[key])}; a Lumos-1 checkpoint has {shown(value)}")
    config = {key: published[key] for key in _CHAMELEON_FIELDS if key in published}
    rope = published.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_parameters = {shown(rope)}; it must be an object")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json has rope_parameters = {shown(rope)}; a Lumos-1 checkpoint has no RoPE scaling")
    config.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    if "rope_theta" not in published and "rope_theta" not in rope:
        warnings.warn("config.json states no rope_theta; the published class default 10,000 is used")
    if "mm_rope" not in published:
        warnings.warn("config.json states no mm_rope; the published class default, plain 1-D RoPE, is used")
    config["position_scheme"] = "mm_rope" if published.get("mm_rope", False) else "1d"
    return {"model_type": "lumos", **config}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 5399,
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "sep_token_id": 1,
        "newline_token_id": 2,
        "mask_token_id": 3,
        "frame_start_token_id": 4,
        "frame_end_token_id": 5,
        "video_start_token_id": 6,
        "video_end_token_id": 7,
        "number_token_start": 8,
        "number_token_count": 247,
        "visual_token_start": 1024,
        "visual_token_count": 4375,
        "pixels_per_size_unit": 8,
        "max_prompt_tokens": 256,
        "prompt_template": "{prompt}",
    },
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "1b": {},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
}

AutoConfig.register(LumosConfig.model_type, LumosConfig)
