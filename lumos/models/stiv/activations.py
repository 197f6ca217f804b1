"""The bytes of the activations that STIV saves for the backward pass.

What a block saves follows from its forward pass. In mixed precision the inputs and outputs of matrix products are in bf16 and
the others in float32. tests/models/stiv/test_stiv_cost.py compares the sums with what autograd saves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.flops import blocks_of
from lumos.planning.sharding import Sharding

TENSORS = {
    "cpu": {"spatial": (8, 1), "temporal": (8, 1), "cross": (4, 0), "mlp": (10, 1)},
    "gpu": {"spatial": (9, 4), "temporal": (7, 5), "cross": (2, 3), "mlp": (12, 1)},
}
"""Tensors [tokens, hidden_size] that a part of a block saves for its backward pass: the first number is of those that matrix
products and attention read and write, the second of those of norms and residual connections. On a CPU the operators of
`lumos.models.stiv.fused` save fewer than the plain forms."""
FLOAT_ATTENTION = {"spatial": 4, "temporal": 4, "cross": 3}
"""Tensors that attention in mixed precision saves in float32 on a CPU (`attention_dtype`), so that they count twice."""
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


def block_bytes(
    config: StivConfig, sharding: Sharding, rows: int, sequence: ClipTokens, places: int, parts: Collection[str]
) -> int:
    """Return the bytes that a block with these parts saves for its backward pass, of `rows` clips of which it sees `places`."""
    d, attentions = config.hidden_size, len(parts & {"spatial", "temporal", "cross"})
    tensors = TENSORS["gpu" if sharding.on_gpu else "cpu"]
    products = sum(tensors[part][0] for part in parts) + ("mlp" in parts) * 2 * (config.mlp_ratio - 4)
    if sharding.half and not sharding.on_gpu:
        products += sum(FLOAT_ATTENTION.get(part, 0) for part in parts)
    kept = sum(tensors[part][1] for part in parts)
    # of the norms, and the normalisers of the softmax
    statistics = 16 * len(parts - {"cross"}) + 12 * config.num_attention_heads * attentions
    of_token = d * (products * sharding.product + kept * sharding.residual) + statistics
    text = ("cross" in parts) * rows * sequence.text * d * TEXT_END_TENSORS * sharding.product
    return rows * sequence.grid[0] * places * of_token + text


def checkpointed_bytes(config: StivConfig, sharding: Sharding, saved: str, parts: Collection[str]) -> int:
    """Return the bytes that a block with these parts saves with activation checkpointing, per token.

    They are its input, outputs of self-attention, and with `saved` "products" outputs of matrix products; see
    `lumos.models.stiv.attention.SAVED`.
    """
    attentions = len(parts & {"spatial", "temporal"})
    products = 4 * attentions + 2 * ("cross" in parts) + ("mlp" in parts)
    outputs = attentions + (products if saved == "products" else 0)
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
    places, total = r * c, 0
    for seen, parts in blocks_of(config, places, mask_ratio):
        if sharding.checkpointing:
            total += rows * frames * seen * checkpointed_bytes(config, sharding, saved_outputs, parts)
        else:
            total += block_bytes(config, sharding, rows, sequence, seen, parts)
    modulations = rows * (frames if has_given else 1) * 6 * d * sharding.residual
    total += modulations * (1 if sharding.checkpointing else 1 + layers * config.adaln_table)
    total += rows * (frames if has_given else 1) * CONDITION_TENSORS * d * sharding.product
    total += rows * frames * places * d * END_TENSORS * sharding.residual
    text = sequence.text * rows
    if config.text_encoder == "small":
        total += text * config.text_layers * TEXT_BLOCK_TENSORS * config.text_width * sharding.residual
    return total + text * TEXT_END_TENSORS * d * sharding.residual
