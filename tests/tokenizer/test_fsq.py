"""The quantizer's rounding and numbering equal a slow form that works on one vector at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.fsq import FiniteScalarQuantizer, code_count

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=5)


def slow_code(vector: list[float], levels: list[int]) -> int:
    """Return the index of one latent vector, channel by channel."""
    index, basis = 0, 1
    for z, level in zip(vector, levels, strict=True):
        half = (level - 1) * 1.001 / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        bounded = math.tanh(z + math.atanh(offset / half)) * half - offset
        index += (round(bounded) + level // 2) * basis
        basis *= level
    return index


@settings(max_examples=60, deadline=None)
@given(levels=LEVELS, seed=st.integers(0, 10_000))
def test_index_agrees_with_the_slow_form(levels, seed):
    z = torch.randn(1, len(levels), 2, 2, 3, generator=torch.Generator().manual_seed(seed)) * 2
    _, indices = FiniteScalarQuantizer(levels)(z)
    vectors = z[0].flatten(1).T.tolist()
    assert indices.flatten().tolist() == [slow_code(vector, levels) for vector in vectors]


@settings(max_examples=40, deadline=None)
@given(levels=LEVELS)
def test_every_index_has_its_own_values_in_the_unit_cube(levels):
    quantizer = FiniteScalarQuantizer(levels)
    count = min(quantizer.num_codes, 500)
    values = quantizer.values(torch.arange(count).view(1, 1, 1, -1))
    assert values.shape == (1, len(levels), 1, 1, count)
    assert values.abs().max() <= 1
    assert len(values[0, :, 0, 0].T.unique(dim=0)) == count


def test_published_numbering():
    quantizer = FiniteScalarQuantizer((8, 8, 8, 5, 5, 5))
    assert quantizer.num_codes == code_count((8, 8, 8, 5, 5, 5)) == 64_000
    ends = quantizer.values(torch.tensor([[[[0, 63_999]]]]))[0, :, 0, 0].T
    assert ends[0].tolist() == [-1.0] * 6
    assert ends[1].tolist() == [0.75, 0.75, 0.75, 1.0, 1.0, 1.0]


def test_values_of_indices_equal_the_quantized_latents():
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    z = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2
    values, indices = quantizer(z)
    torch.testing.assert_close(quantizer.values(indices), values, rtol=0, atol=1e-6)


def test_the_gradient_passes_straight_through_the_rounding():
    z = torch.linspace(-1, 1, 12).view(1, 4, 1, 1, 3).requires_grad_()
    FiniteScalarQuantizer((8, 5, 5, 5))(z)[0].sum().backward()
    assert (z.grad > 0).all()


@pytest.mark.parametrize("index", [-1, 1000])
def test_a_code_out_of_range_is_an_error(index):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        FiniteScalarQuantizer((8, 5, 5, 5)).values(torch.full((1, 1, 1, 1), index))
