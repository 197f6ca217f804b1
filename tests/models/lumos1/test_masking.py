from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_config

from lumos.models.lumos1.masking import history_mask, mask_ratio, mask_sequence, training_mask, unmasking_counts
from lumos.models.lumos1.sequence import build_sequence, code_mask, parse_layout
from lumos.models.lumos1.settings import MASK_KINDS

CONFIG = micro_config()
sizes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000))


def draw(kind, t, n, seed, min_ratio=0.7):
    return training_mask(kind, t, n, min_ratio=min_ratio, generator=torch.Generator().manual_seed(seed))


@given(sizes)
def test_a_tube_is_one_pattern_with_the_exact_count(size):
    t, n, seed = size
    mask, (ratio, *others) = draw("tube", t, n, seed)
    assert mask.shape == (t, n)
    assert (mask == mask[0]).all()
    assert int(mask[0].sum()) == max(1, round(n * ratio))
    assert 0.7 <= ratio <= 1
    assert others == [ratio] * (t - 1)


@given(sizes)
def test_random_counts_over_the_whole_clip(size):
    t, n, seed = size
    mask, (ratio, *others) = draw("random", t, n, seed)
    assert others == [ratio] * (t - 1)
    assert int(mask.sum()) == max(1, round(t * n * ratio))


@given(sizes)
def test_decaying_tubes_are_nested_and_end_full(size):
    t, n, seed = size
    mask, ratios = draw("tube_decay", t, n, seed)
    assert mask.sum(1).tolist() == [max(1, round(n * ratio)) for ratio in ratios]
    assert (mask[1:] >= mask[:-1]).all()
    assert t == 1 or mask[-1].all()


def test_diffusion_forcing_draws_each_frame_anew():
    drawn = [draw("diffusion_forcing", 4, 200, seed) for seed in range(20)]
    assert all(m.sum(1).tolist() == [round(200 * ratio) for ratio in ratios] for m, ratios in drawn)
    masks = [m for m, _ in drawn]
    counts = torch.stack([m.sum(1) for m in masks]).float()
    assert counts.std(dim=1).max() > 5
    assert any((m[0] != m[1]).any() and m[0].sum() == m[1].sum() for m in masks)


def test_published_ratio():
    """P(0.7) = 1 - 2/pi arccos 0.7 = 0.4936, mean 0.800."""
    t = (torch.arange(100_000) + 0.5) / 100_000
    ratios = torch.tensor([mask_ratio(float(x)) for x in t])
    assert (ratios == 0.7).float().mean().item() == pytest.approx(1 - 2 / math.pi * math.acos(0.7), abs=1e-3)
    assert ratios.mean().item() == pytest.approx(0.800, abs=1e-3)
    assert mask_ratio(0.0) == 1


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_only_hidden_codes_are_supervised(kind):
    ids = build_sequence([600], torch.randint(0, 64, (3, 4, 5)), fps=8, duration=1, config=CONFIG)
    layout = parse_layout(ids[None], CONFIG)
    codes = code_mask(layout, len(ids))[0]
    masked = mask_sequence(ids, CONFIG, kind=kind, generator=torch.Generator().manual_seed(1))
    hidden = masked.input_ids == CONFIG.mask_token_id
    assert torch.equal(masked.targets >= 0, hidden & codes)
    assert torch.equal(masked.targets[masked.targets >= 0], ids[hidden & codes] - CONFIG.visual_token_start)
    assert torch.equal(masked.input_ids[~hidden], ids[~hidden])
    newlines = ids == CONFIG.newline_token_id
    assert (hidden & newlines).any(), "newlines are part of the tube"
    assert (masked.targets[newlines] == -100).all()


def test_a_seed_gives_the_same_mask():
    ids = build_sequence(None, torch.zeros(2, 4, 4, dtype=torch.long), fps=8, duration=1, config=CONFIG)
    a, b, c = (mask_sequence(ids, CONFIG, generator=torch.Generator().manual_seed(s)).input_ids for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(("rows", "cols", "hidden", "newlines"), [(48, 84, 2856, 48), (32, 56, 1277, 22)])
def test_published_history_mask(rows, cols, hidden, newlines):
    mask = history_mask(rows * (cols + 1), 0.7)
    assert int(mask.sum()) == hidden
    assert int(mask.view(rows, cols + 1)[:, cols].sum()) == newlines


@given(st.integers(1, 500), st.floats(0, 0.999))
def test_history_mask_counts(n, ratio):
    assert int(history_mask(n, ratio).sum()) == (max(1, round(n * ratio)) if ratio > 0 else 0)


def test_history_ratio_out_of_range():
    with pytest.raises(ValueError, match="outside 0 <= ratio < 1"):
        history_mask(10, 1.0)


def test_published_unmasking_schedule():
    counts = unmasking_counts(4032, 50)
    assert [counts[k - 1] for k in (1, 2, 3, 26, 49, 50)] == [4030, 4024, 4014, 2760, 126, 0]


@given(st.integers(1, 300), st.integers(1, 60))
def test_unmasking_never_goes_back_and_ends(n, steps):
    counts = unmasking_counts(n, steps)
    assert len(counts) == steps
    assert counts[-1] == 0
    assert all(a >= b for a, b in zip([n, *counts], counts, strict=False))


def test_unknown_kind():
    with pytest.raises(ValueError, match="allowed: tube, random, diffusion_forcing, tube_decay"):
        draw("checkerboard", 1, 4, 0)
