from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.data.buckets import bucket_for, bucket_sizes
from lumos.errors import UserError


def test_published_counts_and_members():
    assert len(bucket_sizes(352)) == 31
    assert len(bucket_sizes(528)) == 49
    assert bucket_sizes(528) == bucket_sizes(512)
    assert {(512, 512), (384, 672), (416, 576)} <= set(bucket_sizes(528))
    assert len(bucket_sizes(656)) == 61 + 1
    assert {(480, 768), (480, 832)} <= set(bucket_sizes(656))


def test_selection_of_usual_shapes():
    assert bucket_for(1080, 1920, 352) == (256, 448)
    assert bucket_for(720, 1280, 528) == (384, 672)
    assert bucket_for(1000, 1000, 528) == (512, 512)
    assert bucket_for(480, 768, 656) == (480, 768)


def test_widest_come_first():
    wide_first = [w / h for h, w in bucket_sizes(528)]
    assert wide_first == sorted(wide_first, reverse=True)


@pytest.mark.slow
@given(st.integers(1, 12), st.sampled_from([8, 16, 32]), st.floats(1, 4))
def test_sizes_are_maximal_rectangles(units: int, unit: int, max_aspect: float):
    """A slow statement of the rule: every bucket is within the area and the aspect, and no row or column can be added."""
    area = units * units
    for height, width in bucket_sizes(units * unit, unit, max_aspect):
        rows, columns = height // unit, width // unit
        assert (rows * unit, columns * unit) == (height, width)
        assert rows * columns <= area < (rows + 1) * (columns + 1)
        assert max(rows, columns) / min(rows, columns) <= max_aspect + 1e-9


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_choice_keeps_the_largest_share(height: int, width: int):
    chosen = bucket_for(height, width, 352)
    shares = {}
    for h, w in bucket_sizes(352):
        scale = max(h / height, w / width)  # cover, then crop
        shares[h, w] = (h * w) / (height * scale * width * scale)
    assert shares[chosen] == pytest.approx(max(shares.values()))


@pytest.mark.parametrize("arguments", [(0, 5, 352), (5, -1, 352), (5, 5, 16), (5, 5, 352, 0)])
def test_impossible_sizes_are_refused(arguments: tuple[int, ...]):
    with pytest.raises(UserError):
        bucket_for(*arguments)
