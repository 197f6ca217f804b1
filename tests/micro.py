"""The smallest decoder that has every part."""

from __future__ import annotations

from lumos import LumosConfig


def micro_config(**overrides) -> LumosConfig:
    """A decoder of two layers with the tiny preset's ids and few codes; grouped heads."""
    sizes = {
        "vocab_size": 1024 + 64, "visual_token_count": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    return LumosConfig.preset("tiny", **{**sizes, **overrides})
