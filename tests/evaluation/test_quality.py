"""PSNR and SSIM are scikit-image's; use of codes by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lumos.evaluation.quality import code_use, ssim
from lumos.video.frames import psnr


def pair(frames: int, height: int, width: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip of smooth pictures and the same with noise, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    clip = np.cumsum(rng.normal(0, 12, (frames, height, width, 3)), axis=2) + 128
    return tuple(np.clip(v, 0, 255).astype(np.uint8) for v in (clip, clip + rng.normal(0, noise, clip.shape)))


@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 3), height=st.integers(11, 40), width=st.integers(11, 40), noise=st.sampled_from([0.5, 5, 50]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_psnr_and_ssim_agree_with_scikit_image(frames, height, width, noise, seed):
    a, b = pair(frames, height, width, noise, seed)
    if (a != b).any():
        assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    expected = [
        structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-9)


def test_equal_clips():
    a, _ = pair(2, 16, 16, 1, 0)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 16"):
        ssim(a[:, :10], a[:, :10])


def test_code_use():
    assert code_use(np.array([5, 5, 0, 0])) == (0.5, pytest.approx(2))
    assert code_use(np.array([7, 0, 0, 0])) == (0.25, pytest.approx(1))
    assert code_use(np.array([3, 1])) == (1, pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))))
    assert code_use(np.zeros(4, dtype=int)) == (0, 1)
