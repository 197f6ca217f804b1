"""The number of floating-point operations of the transformer, from a config and sizes alone.

A multiply-add counts as two operations. The count includes matrix products and attention over the keys that a token
attends to; norms, RoPE and the softmax are left out, as is usual.
Source: reference, section 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from lumos.models.stiv.configuration import PARTS, StivConfig
from lumos.models.stiv.modeling import SINUSOIDS

SCALARS = 7
"""Scalar conditions: time, original height and width, crop top and left, stride, number of frames."""


def block_flops(config: StivConfig, frames: int, places: int, text_tokens: int, parts: Collection[str] | None = None) -> int:
    """Return the FLOPs of one block for a clip of frames x places tokens.

    parts: the parts that the block has; None: those of a complete block.
    """
    d, n = config.hidden_size, frames * places
    seen = (frames + 1) / 2 if config.causal_in_time else frames  # keys of temporal attention, mean over the queries
    flops = {
        "spatial": 2 * n * 4 * d * d + 4 * n * d * places,
        "temporal": 2 * n * 4 * d * d + 4 * n * d * seen,
        "cross": 2 * n * 2 * d * d + 2 * text_tokens * 2 * d * d + 4 * n * d * text_tokens,
        "mlp": 2 * n * 2 * config.mlp_ratio * d * d,
    }
    if parts is None:
        parts = set(PARTS) - (set() if config.temporal_attention else {"temporal"})
    return round(sum(flops[part] for part in parts))


def forward_flops(config: StivConfig, frames: int, rows: int, columns: int, text_tokens: int, dropped: float = 0.0) -> int:
    """Return the FLOPs of one forward pass of a clip, without the text encoder.

    frames, rows, columns: tokens along each axis (`StivConfig.grid`). dropped: the share of places that the main blocks do
    not see (MaskDiT). Times are counted as one a clip; a clip with given frames has one a frame, which is below 1 % more.
    """
    places = rows * columns
    blocks = sum(block_flops(config, frames, seen, text_tokens, parts) for seen, parts in blocks_of(config, places, dropped))
    return blocks + ends_flops(config, frames, places, kept_places(places, dropped), text_tokens)


def kept_places(places: int, dropped: float) -> int:
    """Return how many of the places of a frame the main blocks see."""
    return max(1, places - round(places * dropped))


def blocks_of(config: StivConfig, places: int, dropped: float) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield (places of a frame that it sees, its parts) of each block."""
    late = config.unmasked_layers if dropped else 0
    for block in range(config.num_hidden_layers):
        main = block < config.num_hidden_layers - late
        yield kept_places(places, dropped) if main else places, config.parts_of(block)


def ends_flops(config: StivConfig, frames: int, places: int, kept: int, text_tokens: int) -> int:
    """Return the FLOPs outside the blocks: patches in and out, conditions, modulation and the text projection."""
    d, e, p = config.hidden_size, config.text_width, config.patch_channels
    conditions = SCALARS * SINUSOIDS * d + 5 * d * d + e * d
    modulation = 6 * d * d + 2 * d * d
    return 2 * (frames * (kept + places) * p * d + conditions + modulation + text_tokens * (e * d + d * d))


def clip_flops(config: StivConfig, size: Sequence[int], text_tokens: int, dropped: float = 0.0) -> int:
    """Return the FLOPs of one forward pass of a clip of latents [T, C, h, w] with its prompt; `dropped` as in `forward_flops`."""
    frames, _, height, width = size
    grid = config.grid(frames, height, width)
    return forward_flops(config, *grid, text_tokens, dropped) + text_encoder_flops(config, text_tokens)


def text_encoder_flops(config: StivConfig, text_tokens: int) -> int:
    """Return the FLOPs of the small text encoder for one prompt; 0 if the model has none."""
    if config.text_encoder != "small":
        return 0
    e, keys = config.text_width, (text_tokens + 1) / 2
    return round(config.text_layers * text_tokens * (2 * 12 * e * e + 4 * e * keys))

