"""Levels of noise and predictions, compared with the schedulers of diffusers and with their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumos.compression.noising import OBJECTIVES, SCHEDULED, NoiseLevel, Objective, read_schedule, with_noise
from lumos.errors import NotFound, UserError

diffusers = pytest.importorskip("diffusers")


def objective(kind: str) -> Objective:
    if kind not in ("epsilon", "v_prediction"):
        return Objective(kind)
    return Objective(kind, kept=diffusers.DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)


def clips(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(kind=st.sampled_from(OBJECTIVES), seed=st.integers(0, 999))
def test_the_clean_clip_follows_from_what_should_be_predicted(kind, seed):
    form, generator = objective(kind), torch.Generator().manual_seed(seed)
    level = NoiseLevel(*(torch.stack(x).double() for x in zip(*(form.drawn(generator) for _ in range(2)), strict=True)))
    clean, noise = clips(0), clips(1)
    found = form.clean(with_noise(clean, noise, level), form.target(clean, noise, level), level)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
    if kind != "flow":
        torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_levels_are_those_of_the_scheduler(kind, tmp_path):
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    scheduler.save_pretrained(tmp_path)
    form = Objective(kind, kept=read_schedule(tmp_path))
    clean, noise = clips(0).float(), clips(1).float()
    level = form.near(torch.tensor([0.7, 0.2]))
    torch.testing.assert_close(with_noise(clean, noise, level), scheduler.add_noise(clean, noise, level.time))
    if kind == "v_prediction":
        torch.testing.assert_close(form.target(clean, noise, level), scheduler.get_velocity(clean, noise, level.time))
    ratios = level.sigma / level.alpha
    torch.testing.assert_close(ratios, torch.tensor([0.3 / 0.7, 4.0]), rtol=1e-2, atol=0)


def test_the_level_of_svd_is_its_preconditioning():
    """x / sqrt(e^2 + 1) at the time log(e) / 4; the clean clip is x c_skip + c_out F."""
    form, e = Objective("edm"), torch.tensor([2.0, 0.3])
    level = form.near(1 / (1 + e))
    torch.testing.assert_close(level.time, e.log() / 4)
    clean, noise, prediction = clips(0).float(), clips(1).float(), clips(2).float()
    wide = e[:, None, None, None, None]
    x = clean + wide * noise
    torch.testing.assert_close(with_noise(clean, noise, level), x / (wide**2 + 1).sqrt())
    expected = x / (wide**2 + 1) - prediction * wide / (wide**2 + 1).sqrt()
    torch.testing.assert_close(form.clean(with_noise(clean, noise, level), prediction, level), expected)


def test_the_level_of_a_flow():
    level = Objective("flow").near(torch.tensor([1 / (1 + math.exp(-1))]))
    assert level.alpha.item() == pytest.approx(0.7310586)
    assert level.time.item() == pytest.approx(1000 * (1 - 0.7310586), rel=1e-5)
    plain, shifted = (Objective("flow", shift=s).drawn(torch.Generator().manual_seed(3)).sigma.item() for s in (1.0, 3.0))
    assert shifted == pytest.approx(3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_level_follows_from_the_time(kind):
    form = Objective(kind, kept=torch.linspace(0.999, 0.01, 50) if kind in SCHEDULED else None)
    drawn = [form.drawn(torch.Generator().manual_seed(seed)) for seed in range(5)]
    found = form.at(torch.stack([level.time for level in drawn]))
    for name in ("alpha", "sigma"):
        expected = torch.stack([getattr(level, name) for level in drawn])
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-4, atol=1e-5)


def test_schedules_that_cannot_be(tmp_path):
    with pytest.raises(NotFound, match=r"set noise\.scheduler"):
        read_schedule(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
    with pytest.raises(UserError, match="NoSuchScheduler"):
        read_schedule(tmp_path)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="makes no schedule of alphas_cumprod"):
        read_schedule(tmp_path)
