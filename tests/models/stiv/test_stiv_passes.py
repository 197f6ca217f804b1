"""Passes of long clips make every frame once, from known frames, and hold few frames at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.errors import UserError
from lumos.models.stiv.passes import InOrder, passes_of


def walk(frames: int, first: frozenset[int], **options) -> tuple[list[int], int]:
    """Return the frames in the order in which they are made, and the most frames held at a time, without the given ones."""
    order, done, held = InOrder(frames, {n: n for n in first}), [], 0
    for part in passes_of(frames, first, **options):
        assert part.given <= order.known.keys(), "a pass needs a frame that is not there"
        made = {n: n for n in part.made}
        assert not (made.keys() & order.known.keys()), "a frame is made twice"
        assert not any(n < order.next for n in made), "a frame is made after it was written"
        assert len(part.frames) <= options["longest"]
        assert len(part.frames) % options.get("unit", 1) == 0
        held = max(held, len((order.known.keys() | made.keys()) - first))
        done += order.take(made)
    return done, held


@given(frames=st.integers(1, 400), longest=st.integers(3, 20), stride=st.none() | st.integers(2, 19), begin=st.integers(0, 4))
def test_frames_are_made_once_and_in_order(frames, longest, stride, begin):
    begin = min(begin, frames - 1, longest - 2)
    stride = stride and min(stride, longest - 1)
    done, held = walk(frames, frozenset(range(begin)), longest=longest, stride=stride)
    assert done == list(range(frames))
    assert held <= 2 * longest + 1


@given(frames=st.integers(3, 300), longest=st.integers(2, 10), unit=st.integers(1, 3))
def test_upsampling_makes_every_other_frame(frames, longest, unit):
    done, _ = walk(frames, frozenset(range(0, frames, 2)), longest=longest * unit + unit, unit=unit)
    assert done == list(range(frames))


@given(gaps=st.integers(1, 16), stride=st.integers(2, 16))
def test_keyframes_end_at_a_given_last_frame(gaps, stride):
    frames = gaps * stride + 1
    done, _ = walk(frames, frozenset({0, frames - 1}), longest=17, stride=stride)
    assert done == list(range(frames))


def test_published_form_has_fill_ins_between_keyframes():
    passes = list(passes_of(129, [], 17))
    assert (passes[0].frames, passes[0].pace) == (range(0, 257, 16), 16)
    assert [part.frames for part in passes[1:]] == [range(n, n + 17) for n in range(0, 128, 16)]
    assert all(part.places == {0, 16} and part.pace == 1 for part in passes[1:])


def test_a_short_clip_is_one_pass():
    assert [(part.frames, part.given) for part in passes_of(17, [3, 5], 17)] == [(range(17), {3, 5})]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((129, [], 17, 17), "keyframe_stride 17 is too large; this model fills at most 16 frames"),
        ((130, [0, 129], 17), "give num_frames 1 [+] a multiple of 16, at most 257"),
        ((300, [0, 5], 17), "longer clips can have the first frames"),
        ((9, [], 2), "a clip of 9 frames is too long for this model"),
    ],
)
def test_long_clips_that_cannot_be_made_say_why(arguments, said):
    with pytest.raises(UserError, match=said):
        list(passes_of(*arguments))
