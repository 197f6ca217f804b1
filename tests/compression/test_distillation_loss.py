"""The chunked losses of a student of Lumos-1 against plain forms with full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lumos.models.lumos1.distillation_loss import distilled_losses, soft_embeddings

FIRST, ROWS, VOCABULARY = 3, 11, 16


def case(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    sizes = {"hidden": (n, 5), "weight": (VOCABULARY, 5), "teacher_hidden": (n, 7), "teacher_weight": (VOCABULARY, 7)}
    made = {name: torch.randn(size, generator=draws, dtype=torch.float64) for name, size in sizes.items()}
    return made | {"targets": torch.randint(ROWS, (n,), generator=draws)}


def plain(hidden, weight, teacher_hidden, teacher_weight, targets, task, kd):
    """Return the losses by their definitions, from full logits."""
    rows = slice(FIRST, FIRST + ROWS)
    log_q, log_p = F.log_softmax(hidden @ weight[rows].T, 1), F.log_softmax(teacher_hidden @ teacher_weight[rows].T, 1)
    ce, kl = F.nll_loss(log_q, targets, reduction="none"), (log_p.exp() * (log_p - log_q)).sum(1)
    return task * ce + kd * kl, ce, kl


@given(n=st.integers(1, 9), chunk=st.integers(1, 5), seed=st.integers(0, 999), equal=st.booleans(),
       weights=st.sampled_from([(0.1, 1.0), (1.0, 0.5), (0.0, 2.0)]))  # fmt: skip
def test_losses_and_gradients_are_those_of_full_logits(n, chunk, seed, equal, weights):
    values, (task, kd) = case(n, seed), weights
    sums = torch.ones(n, dtype=torch.float64) if equal else torch.rand(n, dtype=torch.float64)
    found = {}
    for name in ("plain", "chunked"):
        hidden, weight = (values[x].clone().requires_grad_() for x in ("hidden", "weight"))
        rest = {x: values[x] for x in ("teacher_hidden", "teacher_weight", "targets")}
        if name == "plain":
            losses = plain(hidden, weight, **rest, task=task, kd=kd)
        else:
            losses = distilled_losses(hidden, weight, **rest, first_row=FIRST, rows=ROWS, task=task, kd=kd, chunk=chunk)
        (losses[0] * sums).sum().backward()
        found[name] = [*losses, hidden.grad, weight.grad]
    for chunked, expected in zip(found["chunked"], found["plain"], strict=True):
        torch.testing.assert_close(chunked.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert found["chunked"][4][:FIRST].abs().max() == 0


def test_the_parts_have_no_gradient_and_the_teacher_gets_none():
    values = case(4)
    learned = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in values.items()}
    total, ce, kl = distilled_losses(**learned, first_row=FIRST, rows=ROWS, task=0.1, kd=1.0)
    assert not ce.requires_grad
    assert not kl.requires_grad
    total.sum().backward()
    assert learned["teacher_hidden"].grad is None
    assert learned["teacher_weight"].grad is None


def test_a_student_that_is_its_teacher_has_no_distance():
    values = case(4)
    values |= {"teacher_hidden": values["hidden"], "teacher_weight": values["weight"]}
    values["hidden"] = values["hidden"].clone().requires_grad_()
    total, _, kl = distilled_losses(**values, first_row=FIRST, rows=ROWS, task=0.0, kd=1.0)
    total.sum().backward()
    assert kl.abs().max() < 1e-6
    assert values["hidden"].grad.abs().max() < 1e-6


def test_only_the_gradients_that_are_needed_are_computed():
    values = case(4)
    values["hidden"].requires_grad_()
    distilled_losses(**values, first_row=FIRST, rows=ROWS, task=0.1, kd=1.0)[0].sum().backward()
    assert values["hidden"].grad is not None
    assert values["weight"].grad is None


@pytest.mark.parametrize("chunk", [2, 100])
def test_soft_embeddings_and_their_gradients(chunk):
    values, table = case(5), torch.randn(VOCABULARY, 4, dtype=torch.float64)
    upstream = torch.randn(5, 4, dtype=torch.float64)
    found = []
    for chunked in (True, False):
        hidden, weight = (values[name].clone().requires_grad_() for name in ("hidden", "weight"))
        if chunked:
            result = soft_embeddings(hidden, weight, table, first_row=FIRST, rows=ROWS, chunk=chunk)
        else:
            rows = slice(FIRST, FIRST + ROWS)
            result = F.softmax(hidden @ weight[rows].T, 1) @ table[rows]
        (result * upstream).sum().backward()
        found.append([result.detach(), hidden.grad, weight.grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_no_positions_have_no_embeddings():
    values = case(1)
    empty = soft_embeddings(values["hidden"][:0], values["weight"], torch.randn(VOCABULARY, 4), first_row=FIRST, rows=ROWS)
    assert empty.shape == (0, 4)
