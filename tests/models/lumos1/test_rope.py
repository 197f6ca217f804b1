from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_config

from lumos.models.lumos1.configuration import POSITION_SCHEMES
from lumos.models.lumos1.rope import apply_rotary, frequency_axes, inverse_frequencies, position_ids, rotary_tables
from lumos.models.lumos1.sequence import build_sequence, content_mask, parse_layout


def published_example():
    """Reference 3.2: 32 x 32 pixels, two latent frames, P0 = 10, 57 tokens."""
    config = micro_config()
    ids = build_sequence([600, 601], torch.zeros(2, 4, 4, dtype=torch.long), fps=8, duration=1, config=config)
    return ids, config


def test_published_positions():
    ids, config = published_example()
    layouts = parse_layout(ids[None], config)
    assert (len(ids), layouts[0].origin) == (57, 10)
    t, h, w = position_ids(layouts, 57, config)[0]
    assert t[10:30].tolist() == [10] * 20
    assert t[34:54].tolist() == [14] * 20
    assert h[10:30].view(4, 5)[:, 0].tolist() == [10, 18, 26, 34]
    assert w[10:15].tolist() == [10, 18, 26, 34, 42]
    for axis in (t, h, w):
        assert axis[:10].tolist() == list(range(10))
        assert axis[30:34].tolist() == [30, 31, 32, 33]
        assert axis[54:].tolist() == [54, 55, 56]


@pytest.mark.parametrize(("head_dim", "counts"), [(32, [4, 6, 6]), (64, [8, 12, 12]), (128, [16, 24, 24])])
def test_mm_rope_allocation(head_dim, counts):
    axes = frequency_axes("mm_rope", head_dim // 2)
    assert torch.bincount(axes).tolist() == counts
    assert axes[:16].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2]


@pytest.mark.parametrize("scheme", [s for s in POSITION_SCHEMES if s != "1d"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_every_scheme_shares_all_frequencies_2_3_3(scheme, head_dim):
    axes = frequency_axes(scheme, head_dim // 2)
    assert len(axes) == head_dim // 2
    assert torch.bincount(axes).tolist() == [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]


@pytest.mark.parametrize("scheme", POSITION_SCHEMES)
def test_text_keeps_its_one_dimensional_rope(scheme):
    config = micro_config(position_scheme=scheme)
    ids = build_sequence([600, 601, 602], torch.zeros(2, 2, 3, dtype=torch.long), fps=8, duration=1, config=config)
    layouts = parse_layout(ids[None], config)
    content = content_mask(layouts, len(ids))
    cos, sin = rotary_tables(position_ids(layouts, len(ids), config), content, config)
    angles = torch.arange(len(ids))[:, None] * inverse_frequencies(config.head_dim, config.rope_theta)
    text = ~content[0]
    pairs = config.head_dim // 2
    torch.testing.assert_close(cos[0, 0, text, :pairs], angles.cos()[text])
    torch.testing.assert_close(sin[0, 0, text, pairs:], angles.sin()[text])
    moved = not torch.allclose(cos[0, 0, ~text, :pairs], angles.cos()[~text])
    assert moved == (scheme != "1d")


@given(st.sampled_from(POSITION_SCHEMES), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_tables_equal_a_loop_over_tokens(scheme, t, h, w, text):
    """The slow rule, token by token and frequency by frequency."""
    config = micro_config(position_scheme=scheme)
    ids = build_sequence([600] * text, torch.zeros(t, h, w, dtype=torch.long), fps=8, duration=1, config=config)
    layouts = parse_layout(ids[None], config)
    cos, sin = rotary_tables(position_ids(layouts, len(ids), config), content_mask(layouts, len(ids)), config)
    pairs = config.head_dim // 2
    axes = frequency_axes(scheme, pairs).tolist()
    stride = {"mm_rope": (4, 8, 8), "videorope": (4, 8, 8)}.get(scheme, (1, 1, 1))
    p0 = layouts[0].frames[0].start + 3
    angles = torch.empty(len(ids), pairs)
    for n in range(len(ids)):
        place = None
        for k, frame in enumerate(layouts[0].frames):
            if frame.start + 3 <= n < frame.end - 1:
                row, col = divmod(n - frame.start - 3, w + 1)
                place = [p0 + stride[0] * k, p0 + stride[1] * row, p0 + stride[2] * col]
        for i in range(pairs):
            position, exponent = n, i / pairs
            if place is not None and scheme != "1d":
                position = place[axes[i]]
                if scheme == "rope_3d":
                    exponent = (i - axes.index(axes[i])) / axes.count(axes[i])
            angles[n, i] = position * config.rope_theta**-exponent
    torch.testing.assert_close(cos[0, 0], angles.cos().repeat(1, 2), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin[0, 0], torch.cat([-angles.sin(), angles.sin()], dim=1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_multiplies_channel_pairs_as_complex_numbers(dtype):
    config = micro_config()
    positions, is_content = torch.randint(0, 500, (2, 3, 7)), torch.zeros(2, 7, dtype=torch.bool)
    x = torch.randn(2, 7, 4, config.head_dim).to(dtype).transpose(1, 2)
    first, second = x.double().chunk(2, dim=-1)
    angles = positions[:, frequency_axes(config.position_scheme, config.head_dim // 2)].transpose(1, 2).double()
    angles = angles * inverse_frequencies(config.head_dim, config.rope_theta).double()
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    found = apply_rotary(x, *rotary_tables(positions, is_content, config, dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    config = micro_config()
    q, k = torch.randn(2, 1, 1, 1, config.head_dim)

    def score(a, b):
        at = torch.tensor([a, b]).view(1, 1, 2).expand(1, 3, 2)
        cos, sin = rotary_tables(at, torch.zeros(1, 2, dtype=torch.bool), config)
        return (apply_rotary(q, cos[:, :, :1], sin[:, :, :1]) * apply_rotary(k, cos[:, :, 1:], sin[:, :, 1:])).sum()

    torch.testing.assert_close(score(3, 10), score(53, 60), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(3, 10), score(3, 11), atol=1e-4)
    cos, sin = rotary_tables(torch.full((1, 3, 1), 7), torch.zeros(1, 1, dtype=torch.bool), config)
    torch.testing.assert_close(apply_rotary(q, cos, sin).norm(), q.norm())


@pytest.mark.parametrize("sizes", [(96, 2), (160, 2), (224, 2)])
def test_head_dimension_must_be_a_multiple_of_32(sizes):
    hidden, heads = sizes
    with pytest.raises(ValueError, match="is not a multiple of 32"):
        micro_config(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads)
