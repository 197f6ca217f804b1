"""The bytes of the activations that STIV saves for the backward pass.

What a block saves follows from its forward pass. In mixed precision the inputs and outputs of matrix products are in bf16 and
the others in float32. tests/models/stiv/test_stiv_cost.py compares the sums with what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumos.models.stiv.configuration import StivConfig
from lumos.planning.sharding import Sharding

TENSORS = {"cpu": ((22, 2), (8, 1)), "gpu": ((23, 8), (7, 5))}
"""Tensors [tokens, hidden_size] that a block saves for its backward pass: without temporal attention, and of temporal attention.
Of each the first number is of those that matrix products and attention read and write, the second of those of norms and
residual connections. On a CPU the operators of `lumos.models.stiv.fused` save fewer than the plain forms."""
END_TENSORS = 3
TEXT_BLOCK_TENSORS, TEXT_END_TENSORS = 22, 5
"""Tensors [text tokens, width] of a block of the text encoder, and of the text in a block and at the ends of the transformer."""
CONDITION_TENSORS = 40
"""Tensors [hidden_size] that the conditions of a clip save."""


@dataclass(frozen=True)
class ClipTokens:
    """The input of the network for one clip: latents, tokens along each axis, and tokens of the text."""

    latents: tuple[int, int, int]
    grid: tuple[int, int, int]
    text: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def block_bytes(config: StivConfig, sharding: Sharding, rows: int, sequence: ClipTokens, places: int) -> int:
    """Return the bytes that one block saves for its backward pass, of `rows` clips of which it sees `places` a frame."""
    d, heads, timed = config.hidden_size, config.num_attention_heads, config.temporal_attention
    block, temporal = TENSORS["gpu" if sharding.on_gpu else "cpu"]
    products = block[0] + 2 * (config.mlp_ratio - 4) + timed * temporal[0]
    kept = block[1] + timed * temporal[1]
    attentions = 2 + timed
    statistics = 8 * (4 + 2 * timed) + 4 * heads * 3 * attentions  # of the norms, and the normalisers of the softmax
    of_token = d * (products * sharding.product + kept * sharding.residual) + statistics
    text = rows * sequence.text * d * TEXT_END_TENSORS * sharding.product
    return rows * sequence.grid[0] * places * of_token + text


def checkpointed_bytes(config: StivConfig, sharding: Sharding, saved: str) -> int:
    """Return the bytes that a block saves with activation checkpointing, per token.

    They are its input, outputs of self-attention, and with `saved` "products" outputs of matrix products; see
    `lumos.models.stiv.attention.SAVED`.
    """
    attentions = 1 + config.temporal_attention
    outputs = attentions + (3 + 4 * attentions if saved == "products" else 0)
    return config.hidden_size * (sharding.residual + outputs * sharding.product) + 4 * config.num_attention_heads * attentions


def activation_bytes(
    config: StivConfig, mask_ratio: float, sharding: Sharding, rows: int, sequence: ClipTokens, has_given: bool = False,
    saved_outputs: str = "attention",
) -> int:
    """Return the bytes of all activations that `rows` clips save for the backward pass.

    has_given: whether some frames are given, so that the modulation is a value a frame.
    saved_outputs: what activation checkpointing saves, a name in `lumos.models.stiv.attention.SAVED`.
    """
    d, layers, (frames, r, c) = config.hidden_size, config.num_hidden_layers, sequence.grid
    places = r * c
    kept = max(1, places - round(places * mask_ratio))
    late = min(config.unmasked_layers, layers) if mask_ratio else 0
    total = 0
    for count, seen in ((layers - late, kept), (late, places)):
        saved = block_bytes(config, sharding, rows, sequence, seen)
        if sharding.checkpointing:
            saved = rows * frames * seen * checkpointed_bytes(config, sharding, saved_outputs)
        total += count * saved
    modulations = rows * (frames if has_given else 1) * 6 * d * sharding.residual
    total += modulations * (1 if sharding.checkpointing else 1 + layers * config.adaln_table)
    total += rows * (frames if has_given else 1) * CONDITION_TENSORS * d * sharding.product
    total += rows * frames * places * d * END_TENSORS * sharding.residual
    text = sequence.text * rows
    if config.text_encoder == "small":
        total += text * config.text_layers * TEXT_BLOCK_TENSORS * config.text_width * sharding.residual
    return total + text * TEXT_END_TENSORS * d * sharding.residual
