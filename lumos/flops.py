"""What the decoder computes, counted: floating-point operations (a multiply-add is two), from a config and a layout alone.

Counted are the matrix products of the layers and the head, and attention over the keys that a token really sees. Norms,
rotations and the softmax are left out, as is usual: they are below a hundredth.
"""

from __future__ import annotations

from lumos.configuration import LumosConfig
from lumos.sequence import Layout


def layer_flops_per_token(config: LumosConfig, context: float) -> float:
    """One token's forward through all layers with `context` keys in sight, without the head."""
    size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = 2 * size * size + 2 * size * kv_size + 3 * size * config.intermediate_size
    attention = 2 * context * size  # scores, then the sum of values
    return 2 * config.num_hidden_layers * (weights + attention)


def keys_seen(layout: Layout) -> int:
    """Keys in sight of each token, summed over the tokens of a sequence."""
    return sum(
        (end - start) * end if bidirectional else (end - start) * (start + 1 + end) // 2
        for start, end, bidirectional in layout.segments
    )


def training_flops(config: LumosConfig, layout: Layout, supervised: int) -> float:
    """Forward and backward of one sequence whose head is asked at `supervised` positions.

    The backward counts twice the forward (Kaplan et al., arXiv 2001.08361, section 2.1). What is computed a second time to
    save memory is not counted, so the share of the peak that follows is the model's (MFU, PaLM, arXiv 2204.02311, appendix B).
    """
    if not layout.length:
        return 0.0
    layers = layout.length * layer_flops_per_token(config, keys_seen(layout) / layout.length)
    head = 2 * supervised * config.hidden_size * config.visual_token_count
    return 3 * (layers + head)
