from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_config
from torch.utils._python_dispatch import TorchDispatchMode

from lumos import LumosForVideoGeneration
from lumos.models.lumos1.attention import KERNELS
from lumos.models.lumos1.loss import chunked_cross_entropy, frame_losses
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.sequence import build_sequence, pad_sequences


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_chunked_equals_plain_with_gradients(n, chunk, seed, weighted):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 20, (n,), generator=g)
    scale = torch.rand(n, generator=g) if weighted else torch.full((n,), 0.3)
    ours = chunked_cross_entropy(hidden, weight, targets, first_row=25, rows=20, chunk=chunk)
    plain = F.cross_entropy(F.linear(hidden, weight[25:45]), targets, reduction="none").float()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad((ours * scale).sum(), (hidden, weight)),
        torch.autograd.grad((plain * scale).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_tensor_of_all_positions_by_all_codes_is_made(monkeypatch):
    """The loss never computes logits of more than `chunk` rows."""
    rows = []
    log_softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim, out=None: rows.append(len(x)) or log_softmax(x, dim, out=out))
    hidden = torch.randn(100, 8, requires_grad=True)
    weight = torch.randn(64, 8, requires_grad=True)
    targets = torch.randint(0, 64, (100,))
    loss = chunked_cross_entropy(hidden, weight, targets, first_row=0, rows=64, chunk=16)
    loss.sum().backward(retain_graph=True)
    assert rows == [16] * 6 + [4]  # once: the backward pass has its gradients from the forward pass
    once = weight.grad.clone()
    loss.sum().backward()
    assert rows == ([16] * 6 + [4]) * 2
    torch.testing.assert_close(weight.grad, 2 * once)


def test_only_required_gradients_are_allocated(monkeypatch):
    """The loss allocates no gradient of the head, which has the size of the vocabulary, if none is needed."""
    hidden, weight, targets = torch.randn(10, 8, requires_grad=True), torch.randn(64, 8), torch.randint(0, 64, (10,))
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **k: made.append(x.shape) or zeros_like(x, **k))
    loss = chunked_cross_entropy(hidden, weight, targets, first_row=0, rows=64, chunk=4)
    (ours,) = torch.autograd.grad(loss.mean(), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), hidden)[0])
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight.requires_grad_(), targets, first_row=0, rows=64).requires_grad
    assert weight.shape not in made


def batch(config):
    rows = []
    for seed, text in enumerate(([600, 601], None)):
        codes = torch.randint(0, 64, (3, 4, 4), generator=torch.Generator().manual_seed(seed))
        ids = build_sequence(text, codes, fps=8, duration=1, config=config)
        rows.append(mask_sequence(ids, config, generator=torch.Generator().manual_seed(seed)))
    return pad_sequences([r.input_ids for r in rows], 0), pad_sequences([r.targets for r in rows], -100)


def test_model_loss_equals_that_of_its_logits(model, config):
    ids, targets = batch(config)
    out = model(ids, targets=targets)
    logits = model(ids).logits[..., config.visual_token_start :][..., : config.visual_token_count]
    plain = F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none")
    torch.testing.assert_close(out.position_loss, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, plain.mean())
    assert torch.equal(out.row_index, (targets >= 0).nonzero()[:, 0])
    by_frame = frame_losses(out.position_loss, out.frame_index)
    weights = torch.bincount(out.frame_index) / len(out.frame_index)
    torch.testing.assert_close((by_frame * weights).sum(), out.loss)


def test_gradient_checkpointing_changes_nothing(config):
    ids, targets = batch(config)
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = LumosForVideoGeneration(config).train()
        if on:
            model.gradient_checkpointing_enable()
            assert model.model.gradient_checkpointing
        model(ids, targets=targets).loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_computes_no_attention_again(config):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.calls += op.name() in KERNELS
            return op(*args, **(kwargs or {}))

    ids, targets = batch(config)
    model = LumosForVideoGeneration(config).train()
    counts = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        with Count() as count:
            model(ids, targets=targets).loss.backward()
        counts.append(count.calls)
    assert counts[0] == counts[1] > 0


def test_only_visual_rows_of_the_head_are_trained(model, config):
    ids, targets = batch(config)
    model(ids, targets=targets).loss.backward()
    moved = model.lm_head.weight.grad.abs().sum(1) > 0
    assert not moved[: config.visual_token_start].any()
    assert moved[config.visual_token_start :].any()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["mm_rope", pytest.param("rope_3d", marks=pytest.mark.thorough)])
def test_the_model_can_learn_a_clip_by_heart(scheme):
    config = micro_config(position_scheme=scheme)
    torch.manual_seed(0)
    model = LumosForVideoGeneration(config)
    ids, targets = batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(ids, targets=targets).loss.item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(ids, targets=targets).loss
        if loss.item() < 0.2:
            break
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < first
