"""Which frames a thinned history holds."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.models.lumos1.history_thinning import leaving, thins


def histories(history, frames):
    """Return, for each frame from 0 on, the numbers of the frames that it sees, without frame 0."""
    kept = []
    for new in range(frames):
        yield list(kept)
        if len(kept) == history:
            kept.remove(leaving(kept, new))
        kept += [new] * (new > 0)


def distances(numbers):
    """Return the distances between frames, from the newest back to frame 0."""
    numbers = [*reversed(numbers), 0]
    return [later - earlier for later, earlier in pairwise(numbers)]


@given(st.integers(1, 12), st.integers(1, 400))
def test_a_thinned_history_keeps_the_newest_and_growing_gaps(history, frames):
    for frame, kept in enumerate(histories(history, frames)):
        assert len(kept) == min(history, max(0, frame - 1))
        assert kept == sorted(set(kept))
        if frame >= 2:
            assert kept[-1] == frame - 1
            assert distances(kept) == sorted(distances(kept))


sets = st.lists(st.integers(1, 9), min_size=2, max_size=12).map(lambda gaps: list(accumulate(sorted(gaps, reverse=True))))


@given(sets)
def test_the_dropped_frame_never_makes_gaps_shrink_with_age(numbers):
    """Compares with a search over all frames, also for sets of frames that no clip has."""
    *kept, new = numbers

    def without(frame):
        return [n for n in numbers if n != frame]

    def rank(frame):
        around = [0, *numbers]
        place = around.index(frame)
        return Fraction(around[place + 1] - around[place - 1], new + 1 - frame), -frame

    allowed = [frame for frame in kept if distances(without(frame)) == sorted(distances(without(frame)))]
    assert leaving(kept, new) == min(allowed, key=rank)


def test_the_rule_by_hand():
    assert leaving([1, 2, 3], 4) == 1  # all distances are 1: a gap of 2 may only be the last one
    assert leaving([2, 3, 4], 5) == 3  # 4 would leave a gap of 2 before one of 1; 3: 2 / 3; 2: 3 / 4
    assert leaving([2, 4, 5], 6) == 2  # 5 may not; 4: 3 > 2 may not
    assert leaving([5], 6) == 5
    assert leaving([2, 3], 4) == 3  # 2: 3 / 3, 3: 2 / 2


@pytest.mark.parametrize("history", range(3, 11))
def test_ages_grow_about_geometrically_over_the_whole_clip(history):
    """No step from one age to the next is more than 7 times that of even steps from 1 to the first frame's age."""
    for frame, kept in enumerate(histories(history, 600)):
        ages = [frame - number for number in reversed([0, *kept])]
        assert frame < 100 or max(older / age for age, older in pairwise(ages)) < 7 * frame ** (1 / history)


def test_what_the_docs_say(repo):
    *_, kept = histories(4, 41)
    assert [40 - number for number in reversed(kept)] == [1, 3, 7, 12]
    text = " ".join((repo / "docs" / "generate" / "long-clips.md").read_text().split())
    assert "--num-frames 161 --history-frames 4" in text
    assert "number 40 from 0, sees those 1, 3, 7 and 12 before it" in text


@pytest.mark.parametrize("history", range(1, 9))
def test_clips_that_thinning_changes(history):
    for frames in range(1, 40):
        seen = histories(history, frames)
        window = [list(range(max(1, frame - history), frame)) for frame in range(frames)]
        assert thins(frames, history) == (list(seen) != window)
