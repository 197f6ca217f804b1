"""Measures of the similarity of two clips (PSNR, SSIM) and of the use of a codebook."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIDE = 11
"""The side of the window of SSIM in pixels, and the least height and width of a frame."""
MAX_PSNR = 100.0
"""The PSNR in dB of clips without any difference where a mean is taken.

Their true PSNR is infinite, which has no mean.
"""
_SIGMA, _C1, _C2 = 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of two clips, uint8 [T, H, W, 3] (Wang et al. 2004), averaged over frames and channels.

    The weights are Gaussian with sigma 1.5 in a window of 11 x 11 pixels; K1 is 0.01, K2 is 0.03;
    the covariance is that of a population; only windows that lie in the frame count. The value is
    that of scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255, channel_axis=-1)`. ValueError for frames that are
    smaller than the window.
    """
    if min(a.shape[1:3]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs frames of at least {SSIM_SIDE} x {SSIM_SIDE} pixels, got {a.shape[1]} x {a.shape[2]}")
    return float(np.mean([_ssim_of_frame(x, y) for x, y in zip(a, b, strict=True)]))


def _ssim_of_frame(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (torch.tensor(frame, dtype=torch.float64).permute(2, 0, 1)[:, None] for frame in (a, b))  # 3, 1, H, W
    mean_x, mean_y, xx, yy, xy = _windows(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean())


def _windows(maps: Tensor) -> Tensor:
    """Return the Gaussian mean of every window of the maps: [N, 1, H, W] -> [N, 1, H - 10, W - 10]."""
    weights = torch.exp(-((torch.arange(SSIM_SIDE, dtype=maps.dtype) - SSIM_SIDE // 2) ** 2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    return F.conv2d(F.conv2d(maps, weights), weights.transpose(2, 3))


def code_use(counts: np.ndarray) -> tuple[float, float]:
    """Return (share of the codes that occur, perplexity of the codes). Without any codes the perplexity is 1.

    counts: the number of occurrences of each code, [num_codes].
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float((counts > 0).mean()), math.exp(-float((shares * np.log(shares)).sum()))
