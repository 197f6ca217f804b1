"""The critic of motion: its losses, its heads, and what they can and cannot see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lumos.compression.critic import Critic, critic_taps, time_of_noise, with_penalty
from lumos.training.adversarial import critic_losses, generator_losses

CHANNELS, POOLED = 12, 6


def critic(taps: int = 2, seed: int = 0) -> Critic:
    torch.manual_seed(seed)
    return Critic([CHANNELS] * taps, POOLED, width=16)


def features(batch: int, frames: int, rows: int, columns: int, taps: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, frames, rows, columns, CHANNELS) for _ in range(taps)]


def conditions(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch), torch.randn(batch, POOLED)


# ---- losses

def test_an_undecided_critic_has_loss_2_and_teaches_nothing():
    zero = torch.zeros(3)
    assert critic_losses(zero, zero).tolist() == [2, 2, 2]
    assert generator_losses(zero).tolist() == [0, 0, 0]


def test_a_critic_that_is_sure_has_no_loss_and_no_gradient():
    real, fake = torch.tensor([1.0, 4.0], requires_grad=True), torch.tensor([-1.0, -2.5], requires_grad=True)
    losses = critic_losses(real, fake)
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert real.grad[1] == fake.grad[1] == 0


def test_losses_of_the_generator():
    fake = torch.tensor([-3.0, 0.0, 2.0])
    assert torch.equal(generator_losses(fake), -fake)
    assert torch.allclose(generator_losses(fake, "log"), -fake.sigmoid().log(), atol=1e-6)


def test_the_mean_noise_level_is_the_published_time():
    assert time_of_noise(torch.tensor(math.exp(-1.0))).item() == pytest.approx(0.7310586, abs=1e-6)
    assert time_of_noise(torch.tensor(0.0)) == 1


@pytest.mark.parametrize(
    ("blocks", "taps"), [(8, [0, 1, 2, 3]), (16, [1, 3, 5, 7]), (28, [3, 6, 10, 13]), (3, [0]), (1, [0]), (5, [0, 1])]
)
def test_taps_are_even_over_the_first_half(blocks, taps):
    assert critic_taps(blocks) == taps


# ---- heads

@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 5), (5, 1, 1), (5, 8, 8), (2, 1, 7)])
def test_heads_work_at_every_size(size):
    scores = critic()(features(3, *size), *conditions(3))
    assert scores.shape == (3,)
    assert scores.isfinite().all()


def test_a_clip_alone_has_the_score_that_it_has_in_a_batch():
    judge, given_features, (level, pooled) = critic(), features(3, 4, 5, 6), conditions(3)
    whole = judge(given_features, level, pooled)
    alone = [judge([x[i : i + 1] for x in given_features], level[i : i + 1], pooled[i : i + 1]) for i in range(3)]
    assert torch.allclose(torch.cat(alone), whole, atol=1e-6)


def part(judge: Critic, name: str) -> Critic:
    """Return the critic with the scores of all other heads set to 0."""
    for heads in (judge.spatial, judge.temporal):
        if heads is not getattr(judge, name):
            for head in heads:
                for parameter in (*head.score.parameters(), *head.project.parameters()):
                    nn.init.zeros_(parameter)
    return judge


def test_the_spatial_score_knows_no_order_of_frames():
    judge, shown, known = part(critic(), "spatial"), features(2, 5, 4, 6), conditions(2)
    order = [3, 0, 4, 1, 2]
    assert torch.allclose(judge(shown, *known), judge([x[:, order] for x in shown], *known), atol=1e-6)
    assert not torch.allclose(judge(shown, *known), judge([x.flip(2) for x in shown], *known), atol=1e-4)


def test_the_temporal_score_knows_no_order_of_places():
    judge, shown, known = part(critic(), "temporal"), features(2, 5, 4, 6), conditions(2)
    order = torch.randperm(24)
    mixed = [x.flatten(2, 3)[:, :, order].unflatten(2, (4, 6)) for x in shown]
    assert torch.allclose(judge(shown, *known), judge(mixed, *known), atol=1e-6)
    backwards = [x.flip(1) for x in shown]
    assert not torch.allclose(judge(shown, *known), judge(backwards, *known), atol=1e-5)
    with torch.no_grad():
        for head in judge.temporal:
            kernel = head.convolution.weight
            kernel.copy_((kernel + kernel.flip(2)) / 2)
    assert torch.allclose(judge(shown, *known), judge(backwards, *known), atol=1e-6)


def test_the_score_is_that_of_the_formula():
    """Compares one head with modules of torch: convolution, norm, LeakyReLU, a 1 x 1 convolution, the projection, and means."""
    judge, (shown,), (level, pooled) = critic(1), features(2, 3, 5, 3, taps=1), conditions(2)
    condition = judge._conditions(level, pooled)
    found = []
    for head, x, clips in (
        (judge.spatial[0], shown.permute(0, 1, 4, 2, 3).flatten(0, 1), [0, 0, 0, 1, 1, 1]),
        (judge.temporal[0], shown.permute(0, 2, 3, 4, 1).flatten(0, 2), [0] * 15 + [1] * 15),
    ):
        conv = nn.functional.conv2d if x.dim() == 4 else nn.functional.conv1d
        stride = (2, 1) if x.dim() == 4 else 1  # 5 rows, 3 columns
        y = conv(x, head.convolution.weight, head.convolution.bias, stride=stride, padding=1)
        y = nn.functional.leaky_relu(nn.functional.group_norm(y, 8, head.norm.weight, head.norm.bias), 0.2)
        e = head.project(condition)[clips]
        score = torch.einsum("c,nc...->n...", head.score.weight[0], y) + head.score.bias + torch.einsum("nc,nc...->n...", e, y)
        found.append(score.flatten(1).mean(1).view(2, -1).mean(1))
    assert torch.allclose(judge([shown], level, pooled), (found[0] + found[1]) / 2, atol=1e-5)


@pytest.mark.slow
@given(st.integers(0, 1000))
def test_level_and_prompt_matter(seed):
    torch.manual_seed(seed)
    judge, shown, (level, pooled) = critic(seed=seed), features(1, 2, 3, 3), conditions(1)
    before = judge(shown, level, pooled)
    assert not torch.equal(before, judge(shown, (level + 0.3) % 1, pooled))
    assert not torch.equal(before, judge(shown, level, pooled.flip(1)))


# ---- the penalty

def test_the_penalty_is_the_squared_gradient_of_each_clip():
    judge, shown, (level, pooled) = critic(), features(2, 2, 3, 3), conditions(2)
    real, penalty = with_penalty(judge, shown, level, pooled, 2.0)
    assert torch.allclose(real, judge(shown, level, pooled))
    for i in range(2):
        alone = [x[i : i + 1].clone().requires_grad_() for x in shown]
        score = judge(alone, level[i : i + 1], pooled[i : i + 1])
        expected = sum(g.square().sum() for g in torch.autograd.grad(score.sum(), alone))
        assert penalty[i].item() == pytest.approx(expected.item(), rel=1e-4)
    penalty.sum().backward()
    assert judge.spatial[0].convolution.weight.grad.abs().sum() > 0
    assert all(x.grad is None and not x.requires_grad for x in shown)


def test_without_gamma_there_is_no_penalty():
    judge, shown, known = critic(), features(2, 2, 3, 3), conditions(2)
    real, penalty = with_penalty(judge, shown, *known, 0.0)
    assert penalty.tolist() == [0, 0]
    assert not penalty.requires_grad
    assert real.requires_grad
