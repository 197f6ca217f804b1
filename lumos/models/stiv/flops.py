"""The number of floating-point operations of the transformer, from a config and sizes alone.

A multiply-add counts as two operations. The count includes matrix products and attention over the keys that a token
attends to; norms, RoPE and the softmax are left out, as is usual.
Source: reference, section 1.
"""

from __future__ import annotations

from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.modeling import SINUSOIDS

SCALARS = 7
"""Scalar conditions: time, original height and width, crop top and left, stride, number of frames."""


def block_flops(config: StivConfig, frames: int, places: int, text_tokens: int) -> int:
    """Return the FLOPs of one block for a clip of frames x places tokens."""
    d, n, causal = config.hidden_size, frames * places, config.causal_in_time
    attentions = 3 if config.temporal_attention else 2
    weights = (4 * attentions + 2 * config.mlp_ratio) * d * d
    seen = (frames + 1) / 2 if causal else frames  # keys of temporal attention, mean over the queries
    keys = places + text_tokens + (seen if config.temporal_attention else 0)
    return round(2 * n * (weights - 2 * d * d) + 2 * text_tokens * 2 * d * d + 4 * n * d * keys)


def forward_flops(config: StivConfig, frames: int, rows: int, columns: int, text_tokens: int, dropped: float = 0.0) -> int:
    """Return the FLOPs of one forward pass of a clip, without the text encoder.

    frames, rows, columns: tokens along each axis (`StivConfig.grid`). dropped: the share of places that the main blocks do
    not see (MaskDiT). Times are counted as one a clip; a clip with given frames has one a frame, which is below 1 % more.
    """
    places = rows * columns
    kept = max(1, places - round(places * dropped))
    late = min(config.unmasked_layers, config.num_hidden_layers) if dropped else 0
    main = (config.num_hidden_layers - late) * block_flops(config, frames, kept, text_tokens)
    return main + late * block_flops(config, frames, places, text_tokens) + ends_flops(config, frames, places, kept, text_tokens)


def ends_flops(config: StivConfig, frames: int, places: int, kept: int, text_tokens: int) -> int:
    """Return the FLOPs outside the blocks: patches in and out, conditions, modulation and the text projection."""
    d, e, p = config.hidden_size, config.text_width, config.patch_channels
    conditions = SCALARS * SINUSOIDS * d + 5 * d * d + e * d
    modulation = 6 * d * d + 2 * d * d
    return 2 * (frames * (kept + places) * p * d + conditions + modulation + text_tokens * (e * d + d * d))


def text_encoder_flops(config: StivConfig, text_tokens: int) -> int:
    """Return the FLOPs of the small text encoder for one prompt; 0 if the model has none."""
    if config.text_encoder != "small":
        return 0
    e, keys = config.text_width, (text_tokens + 1) / 2
    return round(config.text_layers * text_tokens * (2 * 12 * e * e + 4 * e * keys))

