"""Intervals of content and motion of each unit, and how the share of motion changes with depth.

All intervals are of 95 %, by bootstrap over clips: they say what other clips of the same kind would give for this network, not
what another training of it would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 2000
LEAST_CLIPS = 8
"""Least number of clips for an interval."""


def resampled(clips: Tensor) -> Tensor:
    """Return the sums of DRAWS resamples of clips [N, ...], float64 [DRAWS, ...]. The draws are the same in every call."""
    count = len(clips)
    draws = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, draws, torch.ones(DRAWS, count, dtype=torch.float64))
    return (weights @ clips.double().flatten(1)).unflatten(1, clips.shape[1:])


def interval(values: Tensor) -> list[float]:
    """Return [low, high], the 2.5 and 97.5 percentiles of values [DRAWS]."""
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def intervals(clips: Tensor) -> dict[str, list[float]]:
    """Return the intervals of content, motion and motion_share of a unit; without those that are not defined.

    clips: float64 [N, 3]; content and motion of the error of each clip, and the power of its output, as sums of squares.
    """
    if len(clips) < LEAST_CLIPS:
        return {}
    content, motion, power = resampled(clips).unbind(1)
    found = {"content": (content, power), "motion": (motion, power), "motion_share": (motion, content + motion)}
    return {f"{name}_interval": interval(over / under) for name, (over, under) in found.items() if bool((under > 0).all())}


def motion_trend(units: Sequence[Tensor]) -> dict[str, object] | None:
    """Return {"correlation", "interval", "clips"}: the rank correlation of the share of motion with depth, 1 if it always grows.

    Returns None for fewer than three units or LEAST_CLIPS clips, or if a unit changes nothing.

    units: the clips of each unit as in `intervals`, in the order of execution.
    """
    if len(units) < 3 or len(units[0]) < LEAST_CLIPS:
        return None
    clips = torch.stack(list(units), dim=1)  # [N, units, 3]
    sums = torch.cat([clips.sum(0, keepdim=True), resampled(clips)])
    error = sums[..., 0] + sums[..., 1]
    if not bool((error > 0).all()):
        return None
    correlations = rank_correlation(sums[..., 1] / error)
    return {"correlation": float(correlations[0]), "interval": interval(correlations[1:]), "clips": len(clips)}


def rank_correlation(values: Tensor) -> Tensor:
    """Return Spearman's correlation of values [..., n] with 0 to n - 1, [...]; equal values are ranked by their place."""
    n = values.shape[-1]
    ranks = values.argsort(dim=-1, stable=True).argsort(dim=-1).double()
    return 1 - 6 * (ranks - torch.arange(n)).square().sum(-1) / (n * (n**2 - 1))
