"""What the decoder computes, counted: floating-point operations (a multiply-add is two), from a config and a layout alone.

Counted are the matrix products of the layers and the head, and attention over the keys that a token really sees. Norms,
rotations and the softmax are left out, as is usual: they are below a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumos.models.lumos1.attention import allowed_pairs
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.sequence import Layout


def layer_flops_per_token(config: LumosConfig, context: float) -> float:
    """One token's forward through all layers with `context` keys in sight, without the head."""
    size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    weights = 2 * size * size + 2 * size * kv_size + 3 * size * config.intermediate_size
    attention = 2 * context * size  # scores, then the sum of values
    return 2 * config.num_hidden_layers * (weights + attention)


def adapter_weights(config: LumosConfig, rank: int, targets: Sequence[str]) -> int:
    """Weights of low-rank adapters in all layers: for each target a matrix into `rank` channels and one out of them."""
    c, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    ends = {"q_proj": c + c, "k_proj": c + kv, "v_proj": c + kv, "o_proj": c + c}
    ends |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), c + f)
    return config.num_hidden_layers * rank * sum(ends[name] for name in targets)


def training_flops(config: LumosConfig, layout: Layout, supervised: float, adapters: int | None = None) -> float:
    """Forward and backward of one sequence whose head is asked at `supervised` positions.

    The backward counts twice the forward (Kaplan et al., arXiv 2001.08361, section 2.1). What is computed a second time to
    save memory is not counted, so the share of the peak that follows is the model's (MFU, PaLM, arXiv 2204.02311, appendix B).
    adapters: weights of the adapters, if they alone are trained. The matrices then need no gradient of their own, which halves
    their backward.
    """
    if not layout.length:
        return 0.0
    layers = layout.length * layer_flops_per_token(config, allowed_pairs(layout) / layout.length)
    head = 2 * supervised * config.hidden_size * config.visual_token_count
    if adapters is None:
        return 3 * (layers + head)
    matrices = layout.length * layer_flops_per_token(config, 0)
    return 3 * (layers + head) - (matrices + head) + 3 * layout.length * 2 * adapters
