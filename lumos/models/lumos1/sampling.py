"""From logits to codes: guidance, filtering, sampling by confidence. Pure functions; S samples, m masked positions, K codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guide(states: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): states [2 S, m, C], conditional rows first -> [S, m, C].

    Of logits, or of the hidden states that the head, being linear, makes logits of.
    """
    conditional, unconditional = states.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits outside the k likeliest, or outside the smallest set of probability p, become -inf; the likeliest stays."""
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
    """Draw by inverse distribution function, one uniform number a position, so the draw is the same on every device.

    logits fp32 [..., K], uniform [...] in [0, 1) -> codes [...], their log-probabilities [...]. The sum runs over blocks of
    codes first and then inside the block where the number falls, so that no running sum over all K codes is written.
    Where logits are NaN or +inf, the log-probability is NaN, and the code is any.
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
    """First index [..., 1] where a running sum [..., n] reaches the threshold [..., 1]; never one that adds nothing.

    The last index where the sum is NaN.
    """
    tiny = torch.finfo(cumulative.dtype).tiny
    found = torch.searchsorted(cumulative, threshold.clamp(min=tiny).minimum(cumulative[..., -1:]))
    return found.clamp_(max=cumulative.shape[-1] - 1)


def block_count(codes: int) -> int:
    """The divisor of `codes` that is closest to its root from below."""
    return max(n for n in range(1, math.isqrt(codes) + 1) if codes % n == 0)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1)."""
    tiny = torch.finfo(torch.float32).tiny
    exponential = -torch.log(uniform.clamp(min=tiny))
    return -torch.log(exponential.clamp(min=tiny))


def least_confident(log_prob: Tensor, uniform: Tensor, temperature: float, count: int) -> Tensor:
    """Which `count` of m positions stay masked: the lowest of log p + T * Gumbel. -> int64 [S, count], ascending.

    Source: MaskGIT (arXiv 2202.04200), with Gumbel noise as in Muse and the published release.
    """
    confidence = log_prob + temperature * gumbel(uniform)
    return confidence.topk(count, dim=-1, largest=False).indices.sort(-1).values


def unsure(masked: Tensor, log_prob: Tensor, uniform: Tensor, temperature: float, decided: int, threshold: float) -> Tensor:
    """What stays masked when a step decides the `decided` most confident codes, and every code of probability >= threshold.

    masked: offsets int64 [S, m] above 0, ascending, filled up with 0 where a sample has fewer -> the same of what stays, as wide
    as the longest of them. Reading that width makes the host wait for the device.
    """
    waiting = masked > 0
    confidence = (log_prob + temperature * gumbel(uniform)).masked_fill(~waiting, math.inf)
    rank = confidence.argsort(-1).argsort(-1)
    stays = (rank < waiting.sum(-1, keepdim=True) - decided) & (log_prob < math.log(threshold))
    last = torch.iinfo(masked.dtype).max
    kept = masked.masked_fill(~stays, last).sort(-1).values[:, : int(stays.sum(-1).max())]
    return kept.masked_fill(kept == last, 0)
