from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.errors import UserError
from lumos.models.lumos1.sampling import filter_logits, guide, gumbel, least_confident, sample_codes
from lumos.models.lumos1.settings import GenerationSettings


def test_guidance_is_the_published_formula():
    logits = torch.randn(4, 3, 7)
    for scale in (1.0, 3.0, 15.0):
        torch.testing.assert_close(guide(logits, scale), logits[2:] + scale * (logits[:2] - logits[2:]), atol=1e-5, rtol=1e-5)


def test_separate_guidance_of_text_and_frames():
    full, frames, nothing = logits = torch.randn(3, 2, 5)
    for scale, image_scale in ((7.5, 1.5), (1.0, 3.0), (4.0, 0.0)):
        wanted = nothing + image_scale * (frames - nothing) + scale * (full - frames)
        torch.testing.assert_close(guide(logits, scale, image_scale)[0], wanted)
    torch.testing.assert_close(guide(logits, 3.0, 3.0), guide(torch.stack([full, nothing]), 3.0))  # joint guidance
    torch.testing.assert_close(guide(logits, 3.0, 1.0), guide(logits[:2], 3.0))  # guidance by text alone


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(deadline=None)
def test_top_k_keeps_the_k_likeliest(k, seed):
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed))
    kept = filter_logits(logits, k, None).isfinite()
    assert (kept.sum(-1) == min(k, 9)).all()
    assert logits[kept].numel() == 0 or (kept.gather(-1, logits.argmax(-1, keepdim=True))).all()


@given(st.floats(0.01, 1.0), st.integers(0, 1000))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_likely_set(p, seed):
    logits = 2 * torch.randn(9, generator=torch.Generator().manual_seed(seed))
    kept = filter_logits(logits[None, None], None, p)[0, 0].isfinite()
    probs = sorted(logits.softmax(0).tolist(), reverse=True)
    total, count = 0.0, 0
    while total < p - 1e-6 and count < 9:
        total += probs[count]
        count += 1
    assert abs(int(kept.sum()) - max(1, count)) <= (1 if abs(total - p) < 1e-4 else 0)


@given(st.integers(1, 70), st.integers(0, 1000), st.sampled_from([0.1, 1.0, 20.0]))
@settings(deadline=None)
def test_the_code_is_where_the_distribution_reaches_the_number(codes, seed, spread):
    """Compares with the running sum of all probabilities in float64; prime counts have one block."""
    g = torch.Generator().manual_seed(seed)
    logits, uniform = spread * torch.randn(2, 5, codes, generator=g), torch.rand(2, 5, generator=g)
    found, log_prob = sample_codes(logits, uniform)
    plain = logits.double().softmax(-1)
    after = plain.cumsum(-1).gather(-1, found[..., None])[..., 0]
    before = after - plain.gather(-1, found[..., None])[..., 0]
    assert ((before - 1e-5 <= uniform) & (uniform <= after + 1e-5)).all()
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).gather(-1, found[..., None])[..., 0], atol=1e-4, rtol=1e-4)


def test_guidance_of_hidden_states_is_guidance_of_logits():
    hidden, head = torch.randn(4, 3, 8), torch.randn(8, 20)
    torch.testing.assert_close(guide(hidden, 15.0) @ head, guide(hidden @ head, 15.0), atol=1e-3, rtol=1e-4)


def test_codes_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(1, 30_000, 3)
    uniform = torch.rand(1, 30_000, generator=torch.Generator().manual_seed(0))
    codes, log_prob = sample_codes(logits, uniform)
    torch.testing.assert_close(torch.bincount(codes[0]) / 30_000, torch.tensor([0.1, 0.6, 0.3]), atol=0.01, rtol=0)
    torch.testing.assert_close(log_prob, logits.gather(-1, codes[..., None]).squeeze(-1))


def test_filtered_codes_are_never_drawn():
    logits = filter_logits(torch.randn(2, 500, 40), 3, None)
    allowed = logits.isfinite()
    for uniform in (torch.zeros(2, 500), torch.full((2, 500), 1 - 2**-24), torch.rand(2, 500)):
        codes, _ = sample_codes(logits, uniform)
        assert allowed.gather(-1, codes[..., None]).all()


def test_without_noise_the_least_likely_stay_masked():
    log_prob = torch.tensor([[-3.0, -0.1, -2.0, -0.5]])
    assert least_confident(log_prob, torch.rand(1, 4), 0.0, 2).tolist() == [[0, 2]]
    noisy = {tuple(least_confident(log_prob, torch.rand(1, 4), 10.0, 2)[0].tolist()) for _ in range(50)}
    assert len(noisy) > 1


def test_gumbel_noise_has_its_mean():
    noise = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert gumbel(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("guidance_scale", 0.5),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("history_mask_ratio", 1.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=f"{name} {value}"):
        GenerationSettings(**{name: value})
