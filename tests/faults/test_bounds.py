"""Values of any type and size in configs and settings are refused in one line, before memory or time is spent."""

from __future__ import annotations

import dataclasses
import typing
from itertools import product

import pytest

from lumos import LumosConfig
from lumos.errors import SHOWN_LENGTH, UserError
from lumos.models.lumos1.settings import GenerationSettings
from lumos.models.lumos1.training_cost import meta_model
from lumos.pipeline.defaults import ClipDefaults
from lumos.runtime import check_memory, parameter_count
from lumos.training.settings import TrainingSettings, build_settings, load_settings
from lumos.training.tokenizer.settings import TokenizerTrainingSettings
from tokenizer import VideoTokenizerConfig

HUGE = (10**9, 10**30, 10**400, 10**5000)
ODD = (
    *HUGE, -1, 0, 0.5, float("nan"), float("inf"), True, None, "x", "9" * 5000, "\x1b[2J", [], [1], [[]], [10**30] * 3,
    ["x"] * 10**5, {}, {"a": 1}, {1: 2}, {"x" * 5000: 1},
)  # fmt: skip


def settings_of(cls: type, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], typing.Any]]:
    """(path of keys, type) of every setting of a run."""
    hints, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        path, kind = (*prefix, field.name.rstrip("_")), hints[field.name]
        found += settings_of(kind, path) if dataclasses.is_dataclass(kind) else [(path, kind)]
    return found


def refused(make, *what) -> str | None:
    """Return the message if `make` refuses the value, None if it accepts it; other errors fail the test."""
    try:
        make()
    except (UserError, ValueError) as error:
        message = " ".join(str(error).split())
        assert len(message) < SHOWN_LENGTH + 1200, (what, len(message))  # some list what is allowed
        assert "9" * (SHOWN_LENGTH + 1) not in message, what
        assert "x" * (SHOWN_LENGTH + 1) not in message, what
        assert message.isprintable(), what
        return message
    return None


@pytest.mark.parametrize("path", [path for path, _ in settings_of(TrainingSettings)], ids=".".join)
@pytest.mark.filterwarnings("ignore")
def test_a_run_takes_or_refuses_any_value(path: tuple[str, ...]):
    for value in ODD:
        raw: dict = {"model": {"preset": "tiny"}}
        node = raw
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
        refused(lambda raw=raw: build_settings(raw), path, type(value))


@pytest.mark.parametrize("path", [path for path, kind in settings_of(TrainingSettings) if int in (kind, *typing.get_args(kind))],
                         ids=".".join)  # fmt: skip
def test_every_count_of_a_run_has_a_bound(path: tuple[str, ...]):
    if path[-1] == "seed":  # has the whole range of 63 bits
        return
    least = 2**32
    message = refused(lambda: build_settings({"model": {"preset": "tiny"}, path[0]: {path[1]: least}}))
    assert message is not None
    assert ".".join(path) in message


@pytest.mark.parametrize("cls", [LumosConfig, VideoTokenizerConfig, TokenizerTrainingSettings, GenerationSettings, ClipDefaults])
@pytest.mark.filterwarnings("ignore")
def test_a_config_takes_or_refuses_any_value(cls: type):
    own = LumosConfig.__annotations__ if cls is LumosConfig else [field.name for field in dataclasses.fields(cls)]
    make = cls.from_dict if hasattr(cls, "from_dict") and cls is not LumosConfig else lambda values: cls(**values)
    for name, value in product(own, ODD):
        if name not in ("model_type", "keys_to_ignore_at_inference"):
            refused(lambda name=name, value=value: make({name: value}), name, type(value))


@pytest.mark.parametrize(("cls", "name"), [
    *((LumosConfig, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
      "max_position_embeddings", "visual_token_count", "loss_chunk_size", "number_token_count", "temporal_compression",
      "spatial_compression", "pixels_per_size_unit", "max_prompt_tokens", "num_labels", "pad_token_id")),
    *((VideoTokenizerConfig, name) for name in ("in_channels", "channels", "num_res_blocks", "resolution", "z_channels", "z_factor",
      "attention_window", "spatial_compression", "temporal_compression")),
    *((TokenizerTrainingSettings, name) for name in ("steps", "fit_batches", "processes", "height", "width", "num_frames",
      "batch_size", "pictures_per_batch", "validation_clips", "validate_every", "log_every", "warmup_steps")),
    *((GenerationSettings, name) for name in ("num_inference_steps", "top_k", "later_steps", "history_frames")),
    *((ClipDefaults, name) for name in ("num_frames", "height", "width", "fps", "target_size")),
])  # fmt: skip
def test_every_size_of_a_config_has_a_bound(cls: type, name: str):
    make = cls.from_dict if cls is TokenizerTrainingSettings else lambda values: cls(**values)
    message = refused(lambda: make({name: 2**32}))
    assert message is not None
    assert name in message


def test_lists_and_products_have_bounds():
    assert "at most 16,777,216" in refused(lambda: VideoTokenizerConfig(levels=(10**4,) * 3, embedding_dim=3))
    assert "at most 65,536" in refused(lambda: VideoTokenizerConfig(channels=2**14, channels_mult=(8, 8, 8)))
    assert "at most 16" in refused(lambda: VideoTokenizerConfig(channels_mult=(1,) * 17))
    assert "at most 10,000" in refused(lambda: build_settings({"model": {"preset": "tiny"}, "data": {"stages": [{}] * 10_001}}))
    assert "weights; allowed" in refused(lambda: LumosConfig(hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=2048))


@pytest.mark.parametrize("template", [
    "{prompt:>1000000000}", "{prompt} {width:{height}}", "{prompt!r}", "{prompt.__class__}", "{prompt[0]}", "{prompt} {0}",
    "{prompt} {}", "{prompt}{", "{width}", "x" * 10_001 + "{prompt}",
])  # fmt: skip
def test_templates_hold_plain_names_only(template: str):
    assert "prompt_template" in refused(lambda: LumosConfig(prompt_template=template))


@pytest.mark.parametrize("preset", ["tiny", "0.5b", "1b", "3b"])
def test_weights_are_counted_by_arithmetic(preset: str):
    config = LumosConfig.preset(preset, model_parallel_size=1)
    assert config.num_parameters == parameter_count(meta_model(config))


def test_large_published_sizes_and_beyond_are_allowed():
    config = LumosConfig(hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128)
    assert 3e11 < config.num_parameters < 5e11
    load_settings("configs/lumos1/3b-stage2.yaml", ["training.batch_size=4096", "training.max_steps=100000000"])


def test_what_memory_cannot_hold_is_refused():
    check_memory(2**20, "a megabyte")
    with pytest.raises(UserError, match=r"a sea of numbers needs 1,048,576 GiB of memory at least, this machine has \d"):
        check_memory(2**50, "a sea of numbers")
