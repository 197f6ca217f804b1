"""The content and motion losses of single clips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumos.compression.losses import icd, icd_by_clip, motion_by_clip

SHAPE = (3, 4, 5, 6)  # clips, frames, places, channels


def pair(seed: int = 0, layers: int = 2, shape: tuple[int, ...] = SHAPE) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    student, teacher = ([torch.randn(shape, generator=draws) for _ in range(layers)] for _ in range(2))
    return student, teacher


@given(seed=st.integers(0, 10_000), k=st.sampled_from([0.5, 2.0, math.inf]), raw=st.booleans(), layers=st.integers(1, 3))
def test_the_mean_over_clips_is_the_content_loss(seed, k, raw, layers):
    student, teacher = pair(seed, layers)
    found = icd_by_clip(student, teacher, k, raw)
    assert found.shape == (3,)
    assert found.mean().item() == pytest.approx(icd(student, teacher, k, raw).item(), rel=1e-5)


@pytest.mark.parametrize("k", [2.0, math.inf])
def test_equal_features_have_no_loss_and_no_gradient(k):
    student, teacher = pair()[0], [x.clone() for x in pair()[0]]
    for x in student:
        x.requires_grad_()
    for losses in (icd_by_clip(student, teacher, k), motion_by_clip(student, teacher, k)):
        losses.sum().backward()
        assert losses.tolist() == [0, 0, 0]
    assert all(x.grad.abs().max() == 0 for x in student)


@pytest.mark.parametrize("loss", [icd_by_clip, motion_by_clip])
def test_a_common_factor_changes_nothing(loss):
    student, teacher = pair()
    scaled = [[x * 37.0 for x in side] for side in (student, teacher)]
    assert torch.allclose(loss(student, teacher), loss(*scaled), rtol=1e-4)


@pytest.mark.parametrize("loss", [icd_by_clip, motion_by_clip])
def test_a_clip_alone_has_the_loss_that_it_has_in_a_batch(loss):
    student, teacher = pair()
    alone = [loss([s[i : i + 1] for s in student], [h[i : i + 1] for h in teacher]) for i in range(3)]
    assert torch.allclose(torch.cat(alone), loss(student, teacher), atol=1e-6)


def test_repeated_frames_change_nothing():
    student, teacher = pair()
    twice = [[x.repeat_interleave(2, 1) for x in side] for side in (student, teacher)]
    assert torch.allclose(icd_by_clip(student, teacher), icd_by_clip(*twice), atol=1e-6)


def test_without_a_limit_it_is_the_relative_squared_error():
    student, teacher = pair(layers=1)
    expected = ((student[0] - teacher[0]) ** 2).sum((2, 3)) / (teacher[0] ** 2).sum((2, 3))
    assert torch.allclose(icd_by_clip(student, teacher, math.inf), expected.mean(1), rtol=1e-5)


def test_the_motion_loss_is_the_formula_and_sees_no_still_error():
    student, teacher = pair(layers=1)
    ds, dh = ((x[0][:, 1:] - x[0][:, :-1]) for x in (student, teacher))
    expected = ((ds - dh) ** 2).sum((2, 3)) / (dh**2).sum((2, 3))
    assert torch.allclose(motion_by_clip(student, teacher, math.inf), expected.mean(1), rtol=1e-5)
    shifted = [teacher[0] + torch.randn(3, 1, 5, 6)]
    assert motion_by_clip(shifted, teacher, math.inf).max() < 1e-10
    assert icd_by_clip(shifted, teacher, math.inf).min() > 0.1


def test_pictures_have_no_motion():
    student, teacher = pair(shape=(2, 1, 5, 6))
    student[0].requires_grad_()
    losses = motion_by_clip(student, teacher)
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert student[0].grad.abs().max() == 0
