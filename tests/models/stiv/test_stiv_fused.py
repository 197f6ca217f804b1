"""Operators with their own backward pass, and blocks in pieces, have the values and gradients of the plain forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lumos.models.stiv import block, fused
from lumos.models.stiv.configuration import HEAD_DIM
from lumos.models.stiv.fused import normed_rotary, normed_sum
from lumos.models.stiv.rope import rotary, spatial_angles, temporal_angles

sizes, seeds = st.integers(1, 4), st.integers(0, 99)


def plainly(function, *inputs, **more):
    """Call a function with the plain forms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DEVICES", set())
        return function(*inputs, **more)


def values_and_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    """Return the result of a function of tensors, and its gradients for a fixed gradient of the result."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    result = function(*leaves)
    result.backward(torch.linspace(-1, 2, result.numel()).view(result.shape).to(result))
    return [result, *(leaf.grad for leaf in leaves)]


def assert_same(function, inputs: list[Tensor], atol: float = 1e-11) -> None:
    ours, theirs = values_and_gradients(function, inputs), plainly(values_and_gradients, function, inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=atol, rtol=1e-9 if atol < 1e-6 else 0.05)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, sizes), of_base=st.tuples(*[st.booleans()] * 3), of_factor=st.tuples(*[st.booleans()] * 3),
    turned=st.booleans(), values=st.sampled_from([1, 10, 40, 10**6]), seed=seeds,
)  # fmt: skip
def test_a_normed_sum_is_the_plain_one(shape, of_base, of_factor, turned, values, seed):
    """The operators are right for every broadcast, pieces of every size, and x with places first in memory."""
    torch.manual_seed(seed)
    b, f, s, d = *shape, 6
    base, factor = (
        torch.randn(*(size if whole else 1 for size, whole in zip(shape, wholes, strict=True)), d, dtype=torch.float64)
        for wholes in (of_base, of_factor)
    )
    x = torch.randn(b, s, f, d, dtype=torch.float64).transpose(1, 2) if turned else torch.randn(b, f, s, d, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PIECE_VALUES", values)
        assert_same(normed_sum, [base, x, factor])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, sizes, sizes), kind=st.sampled_from(["places", "kept places", "text", "none"]),
    values=st.sampled_from([1, 200, 700, 10**6]), seed=seeds,
)  # fmt: skip
def test_normed_and_turned_queries_are_the_plain_ones(shape, kind, values, seed):
    """Rotary tables of all places, of the places that each clip keeps, of text, and none."""
    torch.manual_seed(seed)
    b, f, s, heads = shape
    x, weight = torch.randn(b, f, s, heads, HEAD_DIM, dtype=torch.float64), torch.randn(HEAD_DIM, dtype=torch.float64)
    angles = spatial_angles(1, 2 * s, 1.0, 0.5, HEAD_DIM, x.device)
    if kind == "kept places":
        keep = torch.stack([torch.randperm(2 * s)[:s] for _ in range(b)])
        tables = rotary(angles[keep][:, None], x.dtype)
    else:
        tables = None if kind == "none" else rotary(angles[:s], x.dtype)
    if kind in ("text", "none"):
        x = x[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PIECE_VALUES", values)
        assert_same(lambda x, weight: normed_rotary(x, weight, tables, x.dtype), [x, weight])


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    tables = rotary(temporal_angles(3, 1.0, 4, torch.device("cpu")), torch.float64)
    x, weight = torch.randn(1, 2, 3, 1, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(lambda x, w: normed_rotary(x, w, tables, torch.float64), leaves)
    base, x, factor = (torch.randn(1, n, 3, 4, dtype=torch.float64).requires_grad_() for n in (1, 2, 2))
    assert torch.autograd.gradcheck(lambda b, x, f: normed_sum(b, x, f), (base, x, factor))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_the_plain_forms(half, autocast):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    base, x, factor = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 1, 1, 8, dtype=dtype)
    tables = rotary(temporal_angles(4, 1.0, 64, x.device), dtype)
    q, weight = torch.randn(2, 3, 4, 1, 64, dtype=dtype), torch.rand(64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for first in (base, base.to(dtype)[:, :1, :1]):
            assert_same(normed_sum, [first, x, factor], atol=0.05 if half or autocast else 1e-5)
        for wanted in (torch.float32, torch.bfloat16):
            assert_same(lambda q, weight, to=wanted: normed_rotary(q, weight, tables, to), [q, weight],
                        atol=1e-5 if dtype == wanted == torch.float32 else 0.15)  # fmt: skip


def test_only_inputs_are_kept_for_the_backward_pass():
    base, x, factor, weight = torch.randn(2, 3, 4, 64), torch.randn(2, 3, 4, 64), torch.randn(64), torch.randn(64)
    inputs = [t.requires_grad_() for t in (base, x, factor, weight)]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normed_sum(base, x, factor[None, None, None])
        normed_rotary(x.unflatten(-1, (1, 64)), weight, None, torch.float32)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    assert {t.untyped_storage().data_ptr() for t in kept} <= own
    assert all(t.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() for t in kept)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(sizes, sizes, sizes, sizes), values=st.integers(1, 300))
def test_pieces_cover_a_tensor_once_and_are_small(shape, values):
    x = torch.zeros(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PIECE_VALUES", values)
        for place in fused.places(x.shape):
            part = fused.piece(x, place)
            part += 1
            assert part.numel() <= max(values, math.prod(shape[2:]))
    assert x.eq(1).all()


# ---- blocks in pieces

KINDS = {
    "video": {}, "pictures": {"temporal_attention": False}, "causal, no table, heads": {
        "causal_in_time": True, "adaln_table": False, "hidden_size": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 5, 7, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_in_pieces_is_the_whole_block(micro_stiv, stiv_text, monkeypatch, kind, tokens):
    """Inputs of 12 tokens for each clip, with texts of several lengths, given frames and dropped places."""
    model, text = micro_stiv(**KINDS[kind]), stiv_text(3)
    frames = 1 if kind == "pictures" else 4
    torch.manual_seed(0)
    x, t, keep = torch.randn(3, frames, 3, 4, 6), torch.rand(3), torch.tensor([[0, 2, 5], [1, 3, 4], [0, 1, 2]])
    given = torch.eye(3, frames).bool()
    seen: list[int] = []
    for module in (model.blocks[0].mlp, model.blocks[0].spatial):
        module.register_forward_hook(lambda _, inputs, out: seen.append(out[..., 0].numel()))
    for more in ({}, {"given": given}, {"keep": keep}):
        whole = model(x, t, *text, **more).sample
        monkeypatch.setattr(block, "PIECE_VALUES", tokens * model.config.hidden_size // torch.get_num_threads())
        seen.clear()
        with torch.no_grad():
            assert torch.allclose(model(x, t, *text, **more).sample, whole, atol=1e-5)
        places = 3 if "keep" in more else 6
        assert max(seen) <= max(tokens, places)  # a frame is the smallest piece


def test_small_batches_and_training_are_not_cut(micro_stiv, monkeypatch):
    x = torch.zeros(2, 3, 4, 64)
    with torch.no_grad():
        assert block.piece_size(x) is None
        monkeypatch.setattr(block, "PIECE_VALUES", 64 * 5)
        assert block.piece_size(x) == 5
        assert block.piece_size(x.to("meta")) is None
    assert block.piece_size(x) is None
