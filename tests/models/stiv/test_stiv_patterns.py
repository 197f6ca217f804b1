from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as over
from hypothesis import strategies as st

from lumos.data.seeding import drawn_name
from lumos.errors import UserError
from lumos.models.stiv.configuration import PATTERNS
from lumos.models.stiv.patterns import check_shares, drawn_dropout, drawn_places, given_frames, given_mask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_patterns_give_the_frames_of_the_reference():
    assert {name: sorted(given_frames(name, 8)) for name in PATTERNS} == {
        "none": [], "first": [0], "prediction": [0, 1, 2, 3], "ends": [0, 7], "interpolation": [0, 2, 4, 6], "views": [0],
    }  # fmt: skip
    assert sorted(given_frames("interpolation", 7)) == [0, 2, 4, 6]
    assert sorted(given_frames("prediction", 5, "causal")) == [0, 1]
    for name in ("interpolation", "views"):
        with pytest.raises(UserError, match=f"pattern {name} needs latents of single frames"):
            given_frames(name, 8, "continuous")


@over(name=st.sampled_from(PATTERNS), frames=st.integers(1, 20), latents=st.sampled_from(["per_frame", "causal"]))
def test_a_pattern_leaves_a_frame_to_make_or_is_refused(name, frames, latents):
    try:
        given = given_frames(name, frames, latents)
    except UserError:
        assert frames <= 4 or latents == "causal"
        return
    assert given < set(range(frames))
    mask = given_mask([given, ()], frames)
    assert {int(i) for i in mask[0].nonzero()} == given
    assert not mask[1].any()


def test_wrong_patterns_and_shares_are_refused():
    with pytest.raises(UserError, match="pattern 'middle' is unknown; allowed: none, first"):
        given_frames("middle", 8)
    with pytest.raises(UserError, match="gives 1 frames; a clip of 1 latent frames is too short"):
        given_frames("first", 1)
    with pytest.raises(UserError, match="frame 6 is given; the clip has 6 latent frames, 0 to 5"):
        given_mask([{6}], 6)
    for shares, message in (
        ({}, "patterns is empty"), ({"first": -0.1}, "patterns.first -0.1"), ({"first": math.nan}, "patterns.first nan"),
        ({"first": True}, "patterns.first True"), ({"first": 0.0}, "no share above 0"), ({"middle": 1}, "'middle' is unknown"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_shares(shares, 8)
    check_shares({"none": 0.08, "first": 1}, 8)


def test_patterns_are_drawn_by_their_shares():
    shares = {"none": 1.0, "first": 2.0, "ends": 0.0, "interpolation": 1.0}
    generator = seeded(0)
    found = [drawn_name(generator, shares) for _ in range(8000)]
    for name, share in shares.items():
        p = share / 4
        assert abs(found.count(name) / 8000 - p) <= 4 * (p * (1 - p) / 8000) ** 0.5
    turned = dict(reversed(shares.items()))
    assert [drawn_name(seeded(i), shares) for i in range(20)] == [drawn_name(seeded(i), turned) for i in range(20)]


def shares_of(draws: int, **dropouts: float) -> dict[tuple[bool, bool], float]:
    generator = seeded(3)
    found = [tuple(drawn_dropout(generator, **dropouts)) for _ in range(draws)]
    return {key: found.count(key) / draws for key in ((False, False), (True, False), (False, True), (True, True))}


def test_dropout_shares_are_those_of_the_reference():
    draws = 100_000
    wanted = {(False, False): 0.828, (True, False): 0.092, (False, True): 0.072, (True, True): 0.008}
    found = shares_of(draws)
    for key, p in wanted.items():
        assert abs(found[key] - p) <= 4 * (p * (1 - p) / draws) ** 0.5
    assert drawn_dropout(seeded(7)) == drawn_dropout(seeded(7))


def test_joint_dropout_drops_both():
    assert shares_of(100, joint_dropout=1.0)[True, True] == 1
    p, draws = 0.05 + 0.95 * 0.008, 20_000
    assert abs(shares_of(draws, joint_dropout=0.05)[True, True] - p) <= 4 * (p * (1 - p) / draws) ** 0.5


@over(places=st.integers(1, 300), ratio=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_dropped_places_are_exactly_as_many_as_asked(places, ratio, seed):
    keep = drawn_places(seeded(seed), places, ratio)
    assert len(keep) == max(1, places - round(places * ratio))
    assert keep.equal(keep.unique())
    assert 0 <= int(keep[0]) <= int(keep[-1]) < places
    assert keep.equal(drawn_places(seeded(seed), places, ratio))


def test_a_mask_ratio_outside_its_range_is_refused():
    for ratio in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="mask ratio"):
            drawn_places(seeded(0), 8, ratio)
