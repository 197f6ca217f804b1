from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_config
from torch.utils._python_dispatch import TorchDispatchMode

from lumos import LumosForVideoGeneration
from lumos.models.lumos1.attention import (
    dense_attention,
    dense_mask,
    equal_runs,
    flex_attention,
    flex_block_mask,
    segmented_attention,
)
from lumos.models.lumos1.sequence import SequenceLayout, build_sequence, frame_indices, pad_sequences, parse_layout

CONFIG = micro_config()
rows = st.tuples(
    st.none() | st.integers(0, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 300)
)


def make_batch(samples):
    """Return ids [B, L] of samples, each (text tokens or None, t, h, w, text tokens behind the video)."""
    sequences = []
    for text, t, h, w, tail in samples:
        ids = build_sequence(
            None if text is None else [600] * text, torch.zeros(t, h, w, dtype=torch.long), fps=8, duration=1, config=CONFIG
        )
        sequences.append(torch.cat([ids, ids.new_full((tail,), 600)]))
    return pad_sequences(sequences, CONFIG.pad_token_id)


def qkv(batch, length, heads=4, kv_heads=2, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, length, dim, generator=g, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


def test_dense_in_bfloat16_on_a_cpu_is_as_exact_as_its_scores():
    """Attention is written out there, which is faster than torch's kernel, whose scores are not rounded to bfloat16."""
    ids = make_batch([(5, 2, 3, 3, 0), (None, 1, 2, 4, 0)])
    layouts = parse_layout(ids, CONFIG)
    mask = dense_mask(layouts, ids.shape[1])[:, None]
    exact = qkv(*ids.shape)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    out = [dense_attention(*qkv, mask) for qkv in (exact, half)]
    assert out[1].dtype == torch.bfloat16
    grads = [torch.autograd.grad(o.sum() + (o * o).sum(), of) for o, of in zip(out, (exact, half), strict=True)]
    for ours, oracle in zip((out[1], *grads[1]), (out[0], *grads[0]), strict=True):
        torch.testing.assert_close(ours.float(), oracle, atol=0.06, rtol=0.03)


@given(st.lists(rows, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_segmented_equals_dense_forward_and_backward(samples):
    ids = make_batch(samples)
    layouts = parse_layout(ids, CONFIG)
    q, k, v = qkv(*ids.shape)
    mask = dense_mask(layouts, ids.shape[1])[:, None]
    real = torch.arange(ids.shape[1]) < torch.tensor([x.length for x in layouts])[:, None]
    weight = torch.randn(ids.shape[0], 4, ids.shape[1], 8) * real[:, None, :, None]
    results = []
    for out in (segmented_attention(q, k, v, layouts), dense_attention(q, k, v, mask)):
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
        results.append((out * real[:, None, :, None], *grads))
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=1e-4)


@given(st.lists(rows, min_size=1, max_size=3))
def test_dense_mask_is_the_rule_pair_by_pair(samples):
    ids = make_batch([(x, t, h, w, min(tail, 3)) for x, t, h, w, tail in samples])
    layouts = parse_layout(ids, CONFIG)
    mask = dense_mask(layouts, ids.shape[1])
    frame = frame_indices(layouts, ids.shape[1])
    for b, layout in enumerate(layouts):
        for q in range(0, layout.length, 3):
            for k in range(ids.shape[1]):
                together = frame[b, q] >= 0 and frame[b, q] == frame[b, k]
                assert bool(mask[b, q, k]) == (k < layout.length and (k <= q or bool(together)))


@pytest.mark.slow
def test_flex_equals_dense():
    ids = make_batch([(3, 2, 2, 3, 0), (None, 1, 3, 3, 4)])
    layouts = parse_layout(ids, CONFIG)
    with torch.no_grad():
        q, k, v = qkv(*ids.shape)
        flex = flex_attention(q, k, v, flex_block_mask(layouts, ids.shape[1], torch.device("cpu")))
        dense = dense_attention(q, k, v, dense_mask(layouts, ids.shape[1])[:, None])
    for b, layout in enumerate(layouts):
        torch.testing.assert_close(flex[b, :, : layout.length], dense[b, :, : layout.length], atol=1e-5, rtol=1e-4)


def test_flex_refuses_to_train_on_a_cpu():
    ids = make_batch([(3, 2, 2, 3, 0)])
    q, k, v = qkv(*ids.shape)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        flex_attention(q, k, v, None)


@pytest.fixture
def two_samples():
    return make_batch([(5, 2, 3, 3, 0), (None, 3, 2, 2, 0)])


def test_a_batch_gives_what_each_sample_gives_alone(model, two_samples):
    """Samples do not see frames of each other; in the published release they do."""
    with torch.no_grad():
        together = model(two_samples).logits
        for b, layout in enumerate(parse_layout(two_samples, CONFIG)):
            alone = model(two_samples[b : b + 1, : layout.length]).logits[0]
            torch.testing.assert_close(together[b, : layout.length], alone, atol=1e-5, rtol=1e-4)


def test_a_code_is_seen_by_its_frame_and_later_tokens_only(model):
    """A changed code changes its own frame and later tokens, never an earlier frame or the text."""
    ids = make_batch([(4, 3, 2, 2, 2)])
    (layout,) = parse_layout(ids, CONFIG)
    changed = ids.clone()
    last = layout.frames[1].end - 3
    changed[0, last] = CONFIG.visual_token_start + 9
    with torch.no_grad():
        moved = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert not moved[: layout.frames[1].start].any()
    assert moved[layout.frames[1].start :].all()


def test_padding_is_not_seen_and_left_padding_is_refused(model, two_samples):
    mask = torch.ones_like(two_samples)
    mask[0, 20:] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model(two_samples, attention_mask=mask.flip(1))
    (layout,) = parse_layout(two_samples[1:], CONFIG)
    longer = torch.nn.functional.pad(two_samples[1:, : layout.length], (0, 7), value=CONFIG.pad_token_id)
    mask = (torch.arange(longer.shape[1]) < layout.length).long()[None]
    with torch.no_grad():
        padded = model(longer, attention_mask=mask).logits[0, : layout.length]
        torch.testing.assert_close(padded, model(two_samples[1:, : layout.length]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_model_takes_every_implementation():
    ids = make_batch([(3, 2, 2, 2, 0)])
    outputs = []
    for attention in ("segmented", "dense", "flex"):
        torch.manual_seed(0)
        model = LumosForVideoGeneration(micro_config(attention=attention)).eval()
        with torch.no_grad():
            outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-4)


def test_no_attention_tensor_is_quadratic_in_the_length():
    """The bytes that autograd keeps grow linearly with the length of the clip."""

    def kept(frames):
        ids = make_batch([(3, frames, 3, 3, 0)])
        layouts = parse_layout(ids, CONFIG)
        q, k, v = qkv(*ids.shape)
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
        ):
            segmented_attention(q, k, v, layouts)
        return sum(storages.values())

    assert kept(32) < 4.6 * kept(8)


class Padded(TorchDispatchMode):
    """Records, for each gradient of a slice, the number of keys to which zeros fill it up."""

    def __init__(self):
        super().__init__()
        self.lengths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.slice_backward.default:
            self.lengths.append(out.shape[2])
        return out


def test_key_gradients_are_padded_to_the_next_segment_only():
    ids = make_batch([(3, 4, 2, 2, 0)])
    (layout,) = parse_layout(ids, CONFIG)
    q, k, v = qkv(*ids.shape)
    out = segmented_attention(q, k, v, [layout])
    with Padded() as padded:
        out.sum().backward()
    ends = [end for _, end, _ in layout.segments]
    assert sorted(padded.lengths) == sorted(2 * ends[1:])  # of keys and of values; the last segment has them all
    assert k.grad.shape == k.shape


def test_equal_runs_gives_start_and_end_of_each_run():
    assert list(equal_runs([1, 1, 2, 1])) == [(0, 2), (2, 3), (3, 4)]
    assert list(equal_runs([SequenceLayout(3, ()), SequenceLayout(3, ())])) == [(0, 2)]
    assert list(equal_runs([])) == []
