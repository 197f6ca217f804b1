"""Sampling of codes from logits: guidance, filtering, drawing, and the choice of codes by confidence.

All functions are pure. Shapes: S samples, m masked positions, C channels, K codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guide(states: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): states [2 S, m, C], conditional rows first -> [S, m, C].

    states: logits, or the hidden states before the head. Both give the same logits, as the head is linear.
    """
    conditional, unconditional = states.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set logits to -inf outside the `top_k` most likely codes, and outside the smallest set of probability `top_p`.

    The most likely code is never removed.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def sample_codes(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a code at each position: logits fp32 [..., K], uniform [...] in [0, 1) -> codes and log-probabilities [...].

    The code is the inverse of the cumulative distribution at the uniform number. One number per position
    gives the same code on every device. The cumulative sum runs over blocks of codes first, and then
    inside the block that holds the number, so that no cumulative sum over all K codes is written.
    Where logits are NaN or +inf, the log-probability is NaN and the code is arbitrary.
    """
    blocks = block_count(logits.shape[-1])
    weights = (logits - logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (blocks, -1))
    upto = weights.sum(-1).cumsum(-1)
    total = upto[..., -1:]
    threshold = uniform[..., None] * total
    block = search(upto, threshold)
    inside = weights.gather(-2, block[..., None].expand(*block.shape, weights.shape[-1])).squeeze(-2)
    before = upto.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    code = search(inside.cumsum(-1), threshold - before)
    log_prob = (inside.gather(-1, code) / total).log()
    return (block * inside.shape[-1] + code).squeeze(-1), log_prob.squeeze(-1)


def search(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """Return the first index [..., 1] where a cumulative sum [..., n] reaches the threshold [..., 1].

    An entry that adds nothing to the sum is never returned, so a code of probability 0 is never sampled.
    If the sum is NaN, the last index is returned.
    """
    tiny = torch.finfo(cumulative.dtype).tiny
    found = torch.searchsorted(cumulative, threshold.clamp(min=tiny).minimum(cumulative[..., -1:]))
    return found.clamp_(max=cumulative.shape[-1] - 1)


def block_count(codes: int) -> int:
    """Return the largest divisor of `codes` that is not above its square root."""
    return max(n for n in range(1, math.isqrt(codes) + 1) if codes % n == 0)


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into standard Gumbel noise."""
    tiny = torch.finfo(torch.float32).tiny
    exponential = -torch.log(uniform.clamp(min=tiny))
    return -torch.log(exponential.clamp(min=tiny))


def least_confident(log_prob: Tensor, uniform: Tensor, temperature: float, count: int) -> Tensor:
    """Return the `count` positions that stay masked, int64 [S, count], ascending.

    They have the lowest confidence, log p + temperature * Gumbel noise. log_prob, uniform: [S, m].
    Source: MaskGIT (arXiv 2202.04200), with Gumbel noise as in Muse and the published release.
    """
    confidence = log_prob + temperature * gumbel(uniform)
    return confidence.topk(count, dim=-1, largest=False).indices.sort(-1).values


def unsure(masked: Tensor, log_prob: Tensor, uniform: Tensor, temperature: float, decided: int, threshold: float) -> Tensor:
    """Return the offsets that stay masked after a step with a confidence threshold.

    The step decides the `decided` most confident codes, and every code of probability >= threshold.

    masked: int64 [S, m], the offsets that were masked, above 0 and ascending. A sample with fewer offsets
    is padded with 0 at the end. The result has the same form, and is as wide as the most offsets of a
    sample. Reading this width makes the host wait for the device.
    """
    waiting = masked > 0
    confidence = (log_prob + temperature * gumbel(uniform)).masked_fill(~waiting, math.inf)
    rank = confidence.argsort(-1).argsort(-1)
    stays = (rank < waiting.sum(-1, keepdim=True) - decided) & (log_prob < math.log(threshold))
    last = torch.iinfo(masked.dtype).max
    kept = masked.masked_fill(~stays, last).sort(-1).values[:, : int(stays.sum(-1).max())]
    return kept.masked_fill(kept == last, 0)
