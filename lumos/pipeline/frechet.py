"""The Fréchet distance between two sets of clips, in features of a video tokenizer.

The published measures compare features of a large video classifier, which is not part of this project. The features here are named
FEATURES: the latents of the clip in the space of the model's own video tokenizer, averaged over 2 x 2 areas of a frame; their mean
over time, and the mean size of their change from frame to frame. The distance of a few clips is biased upwards, so only
distances of equally many clips may be compared; it is no FVD.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = "latents of the video tokenizer over 2 x 2 areas: mean over time, mean size of changes"
AREAS = 2


def clip_features(latents: Tensor) -> Tensor:
    """Return the features of a clip, float64 [2 C AREAS^2], from its latents [C, t, h, w]."""
    pooled = F.adaptive_avg_pool2d(latents.double().transpose(0, 1), AREAS).flatten(1)  # t, C AREAS^2
    change = pooled.diff(dim=0).abs().mean(0) if len(pooled) > 1 else torch.zeros_like(pooled[0])
    return torch.cat([pooled.mean(0), change])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for features [N, D] of N >= 2 clips each (Dowson and Landau 1982).

    m and S are means and sample covariances.
    """
    a, b = a.double(), b.double()
    covariances = [torch.atleast_2d(torch.cov(x.T)) for x in (a, b)]
    root = _root(covariances[0])
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    total = a.var(0).sum() + b.var(0).sum() - 2 * cross
    return float((a.mean(0) - b.mean(0)).square().sum() + total.clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
