"""ICD and output distillation: exact values, plain slow forms and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lumos.compression.losses import EPS, errors_by_frame, icd, logits_kd, velocity_kd
from lumos.errors import UserError

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(2, 6))
K = st.sampled_from([0.5, 1.0, 2.0, math.inf])


def noise(shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.view(-1)[:: max(7, x.numel() // 5)] *= 20  # outliers
    return x.to(dtype)


def plain_icd(students, teachers, k):
    """The loss as its definition says, with one loop for each sum."""
    layers = []
    for s, h in zip(students, teachers, strict=True):
        frames = []
        for b in range(s.shape[0]):
            for t in range(s.shape[1]):
                own, real = s[b, t].flatten().tolist(), h[b, t].flatten().tolist()
                deviation = []
                for values in (own, real):
                    mean = sum(values) / len(values)
                    deviation.append(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)))
                pairs = [(x, y) for x, y in zip(own, real, strict=True)
                         if abs(x) <= k * deviation[0] and abs(y) <= k * deviation[1]]  # fmt: skip
                frames.append(sum((x - y) ** 2 for x, y in pairs) / max(sum(y**2 for _, y in pairs), EPS))
        layers.append(sum(frames) / len(frames))
    return sum(layers) / len(layers)


@given(st.lists(SHAPES, min_size=1, max_size=3), K, st.integers(0, 10**6))
def test_icd_is_its_definition(shapes, k, seed):
    students = [noise(shape, seed + 2 * i) for i, shape in enumerate(shapes)]
    teachers = [noise(shape, seed + 2 * i + 1) for i, shape in enumerate(shapes)]
    assert icd(students, teachers, k).item() == pytest.approx(plain_icd(students, teachers, k), rel=1e-4)


def test_icd_of_planted_numbers():
    h = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -100.0]).view(1, 1, 4, 2)
    s = h.clone()
    s[0, 0, 0, 0] = 1.5
    s[0, 0, 3, 1] = 50.0  # an outlier of both, which does not count
    assert icd([s], [h], k=2.0).item() == pytest.approx(0.25 / 7)
    assert icd([s], [h], k=math.inf).item() == pytest.approx((0.25 + 150.0**2) / (7 + 100.0**2))
    assert icd([s, s], [h, h], raw=True).item() == pytest.approx(2 * (0.25 + 150.0**2) / 8)


@given(SHAPES, K, st.booleans())
def test_the_gradient_of_icd_is_that_of_plain_sums(shape, k, raw):
    """Compares with autograd through the formula, where the choice of outliers has no gradient; frames have different weights."""
    h, found = noise(shape, 2), []
    weights = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape[:2])
    for is_plain in (False, True):
        s = noise(shape, 1).requires_grad_()
        if is_plain:
            counts = torch.ones(shape) if raw or math.isinf(k) else torch.stack([
                x.detach().abs() <= k * x.detach().std((2, 3), correction=0, keepdim=True) for x in (s, h)
            ]).all(0)  # fmt: skip
            errors = (counts * (s - h).square()).sum((2, 3)) / (counts * h.square()).sum((2, 3)).clamp(min=EPS)
            errors = (s - h).square().mean((2, 3)) if raw else errors
        else:
            errors = errors_by_frame(s, h, k, raw)
        (errors * weights).sum().backward()
        found.append((errors.detach(), s.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_icd_of_equal_features_is_0_and_so_is_its_gradient(raw):
    h = noise((2, 3, 4, 5))
    s = h.clone().requires_grad_()
    loss = icd([s], [h], raw=raw)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.abs().max().item() == 0


@given(SHAPES, K, st.sampled_from([2.0**-4, 0.25, 3.0, 1000.0]))
def test_icd_does_not_change_when_both_are_multiplied(shape, k, factor):
    s, h = noise(shape, 1), noise(shape, 2)
    assert icd([s * factor], [h * factor], k).item() == pytest.approx(icd([s], [h], k).item(), rel=1e-4)


@given(SHAPES, K)
def test_icd_of_a_clip_does_not_depend_on_its_batch(shape, k):
    s, h = noise(shape, 1), noise(shape, 2)
    alone = [icd([s[b : b + 1]], [h[b : b + 1]], k) for b in range(len(s))]
    assert icd([s], [h], k).item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


@given(SHAPES, K, st.integers(2, 3))
def test_repeated_frames_leave_icd_unchanged(shape, k, times):
    s, h = noise(shape, 1), noise(shape, 2)
    repeated = [x.repeat_interleave(times, dim=1) for x in (s, h)]
    assert icd([repeated[0]], [repeated[1]], k).item() == pytest.approx(icd([s], [h], k).item(), rel=1e-5)


@given(SHAPES)
def test_icd_with_k_inf_is_the_plain_relative_error(shape):
    s, h = noise(shape, 1), noise(shape, 2)
    plain = ((s - h).square().sum((2, 3)) / h.square().sum((2, 3))).mean()
    assert torch.equal(icd([s], [h], math.inf), plain)


@pytest.mark.parametrize("raw", [False, True])
def test_icd_reaches_the_student_only(raw):
    s, h = noise((1, 2, 3, 4), 1).requires_grad_(), noise((1, 2, 3, 4), 2).requires_grad_()
    icd([s], [h], raw=raw).backward()
    assert s.grad.abs().sum() > 0
    assert h.grad is None


def test_icd_of_constant_frames_is_finite():
    flat = torch.zeros(1, 2, 3, 4, requires_grad=True)
    loss = icd([flat], [torch.zeros(1, 2, 3, 4)])
    loss.backward()
    assert loss.item() == 0
    assert flat.grad.isfinite().all()


def test_icd_of_bfloat16_is_computed_in_float32():
    s, h = noise((1, 2, 8, 8), 1, torch.bfloat16), noise((1, 2, 8, 8), 2, torch.bfloat16)
    assert torch.equal(icd([s], [h]), icd([s.float()], [h.float()]))


@pytest.mark.parametrize(("student", "teacher", "k", "said"), [
    ([], [], 2.0, "at least one"),
    ([(1, 2, 3, 4)], [(1, 2, 3, 4)] * 2, 2.0, "1 of the student and 2"),
    ([(1, 2, 3, 4)], [(1, 2, 4, 3)], 2.0, r"\[1, 2, 3, 4\] and \[1, 2, 4, 3\]"),
    ([(2, 3, 4)], [(2, 3, 4)], 2.0, r"\[B, T, n, C\]"),
    ([(1, 2, 3, 4)], [(1, 2, 3, 4)], 0.0, "k 0.0 is not allowed"),
    ([(1, 2, 3, 4)], [(1, 2, 3, 4)], math.nan, "k nan is not allowed"),
])  # fmt: skip
def test_icd_refuses(student, teacher, k, said):
    with pytest.raises(UserError, match=said):
        icd([noise(shape) for shape in student], [noise(shape) for shape in teacher], k)


def test_velocity_kd_is_the_mean_squared_error():
    s, h = noise((2, 3, 4), 1).requires_grad_(), noise((2, 3, 4), 2).requires_grad_()
    loss = velocity_kd(s, h)
    assert torch.equal(loss, F.mse_loss(s, h))
    loss.backward()
    assert h.grad is None
    with pytest.raises(UserError, match="one shape"):
        velocity_kd(s, h[:1])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 7), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 1000))
def test_logits_kd_is_its_definition(clips, places, ids, temperature, seed):
    s, h = noise((clips, places, ids), seed) / 10, noise((clips, places, ids), seed + 1) / 10
    mask = torch.rand(clips, places, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = []
    for b in range(clips):
        for i in range(places):
            if mask[b, i]:
                p, q = (torch.softmax(x[b, i].double() / temperature, -1) for x in (h, s))
                found.append(sum(p[v] * math.log(p[v] / q[v]) for v in range(ids)).item())
    plain = sum(found) / len(found) * temperature**2 if found else 0.0
    assert logits_kd(s, h, mask, temperature).item() == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_logits_kd_without_places_counts_all_and_ignores_shifts():
    s, h = noise((2, 3, 5), 1).requires_grad_(), noise((2, 3, 5), 2).requires_grad_()
    loss = logits_kd(s, h)
    assert torch.equal(loss, logits_kd(s, h, torch.ones(2, 3, dtype=torch.bool)))
    assert loss.item() == pytest.approx(logits_kd(s + 3, h - 4).item(), rel=1e-4)
    loss.backward()
    assert h.grad is None
    assert logits_kd(h, h).item() == 0


def test_logits_kd_with_no_place_is_0_with_a_gradient():
    s = noise((2, 3, 5), 1).requires_grad_()
    loss = logits_kd(s, noise((2, 3, 5), 2), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_logits_kd_refuses():
    s = noise((2, 3, 5))
    with pytest.raises(UserError, match="one shape"):
        logits_kd(s, s[:1])
    with pytest.raises(UserError, match="one shape"):
        logits_kd(s, s, torch.ones(2, 4, dtype=torch.bool))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="temperature"):
            logits_kd(s, s, temperature=temperature)
