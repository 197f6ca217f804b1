"""Intervals of content and motion by resampling clips, and how the share of motion changes with depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lumos.compression.depth import DRAWS, LEAST_CLIPS, interval, intervals, motion_trend, rank_correlation, resampled


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_resamples_hold_as_many_clips_as_there_are():
    sums = resampled(torch.ones(20, 3))
    assert sums.shape == (DRAWS, 3)
    assert sums.eq(20).all()
    one = resampled(torch.eye(5))
    assert one.sum(1).eq(5).all()
    assert torch.equal(one, resampled(torch.eye(5)))
    assert one.mean(0) == pytest.approx(np.ones(5), abs=0.1)


def test_an_interval_is_that_of_the_mean_for_equal_power():
    """For many clips it is the usual interval of a mean, mean +- 1.96 s / sqrt(N)."""
    clips = drawn(400)
    clips[:, 2] = 1
    found = intervals(clips)
    for i, name in enumerate(("content", "motion")):
        values = clips[:, i].numpy()
        reach = 1.96 * values.std() / 20
        assert found[f"{name}_interval"] == pytest.approx([values.mean() - reach, values.mean() + reach], abs=reach / 8)


def test_shares_are_of_sums_over_clips():
    """A clip with a large error counts for more than one with a small error, and the interval is wider for it."""
    clips = drawn(40)
    share = float(clips[:, 1].sum() / clips[:, :2].sum())
    low, high = intervals(clips)["motion_share_interval"]
    assert low < share < high
    clips[0] *= 100
    wide = intervals(clips)["motion_share_interval"]
    assert wide[0] <= float(clips[:, 1].sum() / clips[:, :2].sum()) <= wide[1]


def test_percentiles_leave_a_fortieth_on_each_side():
    assert interval(torch.arange(41, dtype=torch.float64)) == [1, 39]


def test_few_clips_and_no_change_have_no_interval():
    assert intervals(drawn(LEAST_CLIPS - 1)) == {}
    still = drawn(LEAST_CLIPS)
    still[:, :2] = 0
    assert set(intervals(still)) == {"content_interval", "motion_interval"}
    assert motion_trend([still, drawn(LEAST_CLIPS), drawn(LEAST_CLIPS)]) is None
    assert motion_trend([drawn(LEAST_CLIPS)] * 2) is None
    assert motion_trend([drawn(LEAST_CLIPS - 1)] * 3) is None


@pytest.mark.parametrize(("step", "wanted"), [(1.0, 1), (-1.0, -1)])
def test_a_planted_trend_is_found(step, wanted):
    units = []
    for k in range(5):
        clips = drawn(16, seed=k)
        clips[:, 1] *= 10 ** (step * k)
        units.append(clips)
    assert motion_trend(units) == {"correlation": wanted, "interval": [wanted, wanted], "clips": 16}


def test_units_without_a_trend_have_an_interval_around_zero():
    units = [drawn(12, seed=k) for k in range(6)]
    low, high = motion_trend(units)["interval"]
    assert low < 0 < high


def test_rank_correlation_is_that_of_the_ranks():
    values = torch.rand(30, 7, dtype=torch.float64)
    for row, found in zip(values.numpy(), rank_correlation(values).tolist(), strict=True):
        assert found == pytest.approx(np.corrcoef(row.argsort().argsort(), np.arange(7))[0, 1])
