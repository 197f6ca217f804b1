"""The Haar patches: invertible, causal, and equal to transforming one axis after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenizer.wavelet import haar_matrix, patchify, unpatchify


def slow_haar_level(x: Tensor) -> Tensor:
    """Do one level on [C, T, H, W] by means and half differences of neighbours along time, height and width in turn."""
    bands = [x]
    for axis in (1, 2, 3):
        split = []
        for band in bands:
            even, odd = (band.index_select(axis, torch.arange(start, band.shape[axis], 2)) for start in (0, 1))
            split += [(even + odd) / 2, (even - odd) / 2]
        bands = split
    return torch.cat(bands)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_haar_agrees_with_the_slow_form(patch_size):
    video = torch.randn(1, 3, 1 + 2 * patch_size, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([video[0, :, :1].repeat(1, patch_size - 1, 1, 1), video[0]], dim=1)
    for _ in range(patch_size.bit_length() - 1):
        expected = slow_haar_level(expected)
    torch.testing.assert_close(patchify(video, patch_size, "haar")[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["haar", "rearrange"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_unpatchify_inverts_patchify(method, patch_size):
    video = torch.randn(2, 3, 1 + patch_size, 16, 8, generator=torch.Generator().manual_seed(0))
    patches = patchify(video, patch_size, method)
    assert patches.shape == (2, 3 * patch_size**3, 2, 16 // patch_size, 8 // patch_size)
    torch.testing.assert_close(unpatchify(patches, patch_size, method), video, rtol=0, atol=1e-5)


def test_training_works_after_a_first_use_in_inference_mode():
    with torch.inference_mode():
        patchify(torch.zeros(1, 3, 9, 8, 8), 8, "haar")
    video = torch.randn(1, 3, 9, 8, 8, requires_grad=True)
    patchify(video, 8, "haar").sum().backward()
    assert video.grad.abs().max() > 0


@pytest.mark.parametrize("method", ["haar", "rearrange"])
def test_the_first_patch_frame_depends_on_the_first_frame_only(method):
    video = torch.randn(1, 3, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patchify(video, 4, method)[:, :, :1], patchify(video[:, :, :1], 4, method), rtol=0, atol=0)


def test_a_kept_matrix_does_not_depend_on_the_caller():
    haar_matrix.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = haar_matrix(2)
    finally:
        torch.set_default_dtype(torch.float32)
        haar_matrix.cache_clear()
    assert (made.device.type, made.dtype) == ("cpu", torch.float32)
    assert torch.equal(made, haar_matrix(2))
