"""From logits to codes: guidance, filtering, sampling by confidence. Pure functions; S samples, m masked positions, K codes."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): logits [2 S, m, K], conditional rows first -> [S, m, K]."""
    conditional, unconditional = logits.chunk(2)
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

    logits fp32 [S, m, K], uniform [S, m] in [0, 1) -> codes [S, m], their log-probabilities [S, m].
    """
    log_probs = logits.log_softmax(-1)
    cumulative = log_probs.exp().cumsum(-1)
    threshold = uniform.clamp(min=torch.finfo(torch.float32).tiny)[..., None] * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, threshold).clamp(max=logits.shape[-1] - 1)
    return codes.squeeze(-1), log_probs.gather(-1, codes).squeeze(-1)


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
