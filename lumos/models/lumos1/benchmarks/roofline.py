"""The roofline of a case: the least time that its matrix products and attention take at this machine's speed for their shapes.

A multiply-add is two FLOPs. The FLOPs are those that every implementation of the method needs:

- All layers for all tokens in both branches: in each step of a frame, and once more for each frame except
  the last, to write it to the cache. With step_reuse, only the tokens that a step runs.
- Attention of these tokens to the cache and to their own frame.
- The visual rows of the head at positions that are still masked. The last layer must compute only keys and
  values at the other positions.

The head counts once for both branches: guidance is linear, so it can be applied to the hidden states.
Norms and everything else that is neither a matrix product nor attention count as zero.
"""

from __future__ import annotations

import statistics

from torch import nn

from lumos.benchmarks.roofline import AttentionProduct, Product
from lumos.models.lumos1.benchmarks.decoding import DecodingCase
from lumos.models.lumos1.engine import cache_tokens
from lumos.models.lumos1.masking import unmasking_counts


def products(case: DecodingCase) -> list[Product]:
    """Return all matrix products and the attention of the case. With a confidence threshold, the FLOPs are upper bounds."""
    config, settings, lengths = case.model.config, case.settings, case.prefix_lengths
    codes, layers = case.grid[0] * case.grid[1], config.num_hidden_layers
    passes: list[tuple[int, int, int]] = []  # (context, tokens, positions whose output is needed) of a frame in one branch
    head_rows = 0
    for frame in range(case.frames):
        steps = settings.steps_of(frame)
        masked = [codes, *unmasking_counts(codes, steps)[:-1]]
        head_rows += sum(masked)
        for branch, length in enumerate(lengths):
            context = cache_tokens(length, case.span, frame + 1, settings.history_frames)
            ran = [case.span if settings.runs_all(step, steps) else masked[step - 1] for step in range(steps)]
            passes += [
                (context, ran[step], m) for step, m in enumerate(masked) if branch == 0 or settings.guides(step, steps)
            ]
            passes += [(context, case.span, 0)] * (frame + 1 < case.frames)  # writes the finished frame to the cache
    run, wanted = sum(n for _, n, _ in passes), sum(m for _, _, m in passes)
    tokens, usual = sum(lengths) + run, round(run / len(passes))
    found = []
    for name, layer in case.model.model.layers[0].named_modules():
        if isinstance(layer, nn.Linear):
            last = tokens if name.endswith(("k_proj", "v_proj")) else wanted
            flops = 2 * layer.weight.numel() * (tokens * (layers - 1) + last)
            found.append(Product(name, flops, 1, len(lengths) * usual, layer.in_features, layer.out_features))
    pairs = sum(context * (n * (layers - 1) + m) for context, n, m in passes)
    mean, shared = round(statistics.mean(context for context, _, _ in passes)), config.num_key_value_heads
    heads, queries = len(lengths) * shared, config.num_attention_heads // shared * usual  # heads of a group share keys
    found.append(AttentionProduct("attention", 4 * config.hidden_size * pairs, heads, queries, config.head_dim, mean))
    head = 2 * config.hidden_size * config.visual_token_count * head_rows
    found.append(Product("head", head, 1, codes, config.hidden_size, config.visual_token_count))
    return found
