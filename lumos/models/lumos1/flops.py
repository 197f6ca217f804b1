"""The number of floating-point operations of the decoder, from a config and a layout alone.

A multiply-add counts as two operations. The count includes the matrix products of the layers and the
head, and attention over the keys that a token attends to. Norms, rotary positions and the softmax are
left out, as is usual: they are less than one percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lumos.models.lumos1.attention import allowed_pairs
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.sequence import SequenceLayout


def layer_flops_per_token(config: LumosConfig, context: float) -> float:
    """Return the FLOPs of one token's forward pass through all layers, without the head.

    context: the number of keys that the token attends to; a mean over tokens is allowed.
    """
    size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = 2 * size * size + 2 * size * kv_size + 3 * size * config.intermediate_size
    attention = 2 * context * size  # products of queries and keys, then of weights and values
    return 2 * config.num_hidden_layers * (weights + attention)


def adapter_shapes(config: LumosConfig, rank: int, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Return the shapes of the matrices of low-rank adapters in all layers.

    Each of the `targets` of a layer has two matrices: one into `rank` channels and one out of them.
    """
    c, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    ends = {"q_proj": (c, c), "k_proj": (c, kv), "v_proj": (c, kv), "o_proj": (c, c), "gate_proj": (c, f), "up_proj": (c, f),
            "down_proj": (f, c)}  # fmt: skip
    return [shape for name in targets for shape in ((rank, ends[name][0]), (ends[name][1], rank))] * config.num_hidden_layers


def adapter_weights(config: LumosConfig, rank: int, targets: Sequence[str]) -> int:
    """Return the number of weights of low-rank adapters in all layers."""
    return sum(map(math.prod, adapter_shapes(config, rank, targets)))


def training_flops(config: LumosConfig, layout: SequenceLayout, supervised: float, adapters: int | None = None) -> float:
    """Return the FLOPs of the forward and backward pass of one sequence.

    The backward pass counts twice the forward pass (Kaplan et al., arXiv 2001.08361, section 2.1).
    Recomputation by activation checkpointing is not counted, so the resulting share of the peak is the
    model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B).

    supervised: the number of positions for which the head computes logits.
    adapters: the number of weights of the adapters, if only these are trained. The other matrices then
    need no gradient of their own, which halves their backward pass.
    """
    if not layout.length:
        return 0.0
    layers = layout.length * layer_flops_per_token(config, allowed_pairs(layout) / layout.length)
    head = 2 * supervised * config.hidden_size * config.visual_token_count
    if adapters is None:
        return 3 * (layers + head)
    matrices = layout.length * layer_flops_per_token(config, 0)
    return 3 * (layers + head) - (matrices + head) + 3 * layout.length * 2 * adapters
