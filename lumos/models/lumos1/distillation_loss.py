"""Losses of a student over the visual codes, and the expected embedding of a prediction, in chunks of positions.

The full logits [N, V] never exist. Shapes: N positions, D hidden channels, V rows of the head, E channels of embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos.models.lumos1.loss import chunks


class _DistilledLosses(torch.autograd.Function):
    """The weighted sum of cross-entropy and KL divergence of each position.

    Both have one set of logits, and the forward pass computes their gradients while these exist. The gradients are right if
    all sums have the same weight, as in a mean; for other weights the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher_hidden, teacher_weight, place, wanted):
        ctx.save_for_backward(hidden, weight, targets, teacher_hidden, teacher_weight)
        ctx.place, ctx.wanted = place, wanted
        task, kd, *ctx.gradients = _by_chunks(hidden, weight, targets, teacher_hidden, teacher_weight, place, wanted)
        ctx.mark_non_differentiable(task, kd)
        return place.task * task + place.kd * kd, task, kd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_total[0] if len(grad_total) else 1.0
        if gradients is None or not (grad_total == scale).all():
            _, _, *gradients = _by_chunks(*ctx.saved_tensors, ctx.place, ctx.wanted, grad_total)
        else:
            gradients = [g if g is None else g.mul_(scale) for g in gradients]
        return (*gradients, None, None, None, None, None)


class Place:
    """The rows of the heads that count, the size of a chunk, and the weights of the two losses."""

    def __init__(self, rows: slice, chunk: int, task: float, kd: float):
        self.rows, self.chunk, self.task, self.kd = rows, chunk, task, kd


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, place: Place,
    wanted: tuple[bool, bool], scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return cross-entropy [N], KL [N], and the gradients of the weighted sums for hidden [N, D] and weight [V, D].

    scale: [N], the weight of each position; None stands for 1. A gradient that is not wanted is None.
    """
    visual, theirs = weight[place.rows].to(hidden.dtype), teacher_weight[place.rows].to(teacher_hidden.dtype)
    task, kd = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] else None
    exact = weight.dtype == hidden.dtype == torch.float32
    if wanted[1]:
        grad_visual = grad_weight[place.rows] if exact else torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
    # All chunks share these: to allocate memory of this size for each chunk would take longer than the computation.
    size = (min(place.chunk, len(hidden)), len(visual))
    ours, others = (x.new_empty(size) for x in (hidden, teacher_hidden))
    log_q_of, log_p_of, p_of = (hidden.new_empty(size, dtype=torch.float32) for _ in range(3))
    for s in chunks(len(hidden), place.chunk):
        x, at, n = hidden[s], targets[s, None], len(targets[s])
        log_q = torch.log_softmax(torch.mm(x, visual.T, out=ours[:n]).float(), dim=1, out=log_q_of[:n])
        log_p = torch.log_softmax(torch.mm(teacher_hidden[s], theirs.T, out=others[:n]).float(), dim=1, out=log_p_of[:n])
        p = torch.exp(log_p, out=p_of[:n])
        task[s] = -log_q.gather(1, at).squeeze(1)
        kd[s] = log_p.sub_(log_q).mul_(p).sum(1)
        if not any(wanted):
            continue
        # task (q - one-hot) + kd (q - p)
        grad = log_q.exp_().mul_(place.task + place.kd).sub_(p, alpha=place.kd)
        grad.scatter_add_(1, at, grad.new_full(at.shape, -place.task))
        if scale is not None:
            grad.mul_(scale[s, None])
        grad = grad.to(hidden.dtype)
        if wanted[0]:
            torch.mm(grad, visual, out=grad_hidden[s])
        if wanted[1] and exact:
            grad_visual.addmm_(grad.T, x)
        elif wanted[1]:
            grad_visual += grad.T @ x
    if wanted[1] and not exact:
        grad_weight[place.rows] = grad_visual.to(weight.dtype)
    return task, kd, grad_hidden, grad_weight


def distilled_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    first_row: int, rows: int, task: float, kd: float, chunk: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return, float32 [N] each: task x cross-entropy + kd x KL(teacher || student), with gradient; the two losses without.

    Both are over `rows` rows of the heads from `first_row` on, at temperature 1.

    Args:
        hidden, teacher_hidden: [N, D] of the student and [N, D'] of the teacher.
        weight, teacher_weight: their heads, [V, D] and [V, D'].
        targets: int64 [N] in 0..rows-1.
        task, kd: the weights.
        chunk: positions whose logits exist at a time; peak extra memory is about 6 x chunk x rows x 4 bytes.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, teacher_hidden = hidden.to(dtype), teacher_hidden.to(dtype)
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    place = Place(slice(first_row, first_row + rows), chunk, task, kd)
    return _DistilledLosses.apply(hidden, weight, targets, teacher_hidden.detach(), teacher_weight.detach(), place, wanted)


def soft_embeddings(
    hidden: Tensor, weight: Tensor, embeddings: Tensor, *, first_row: int, rows: int, chunk: int = 256
) -> Tensor:
    """Return the expected embedding of each position, sum over codes of p(code) x its row of `embeddings`, [N, E].

    p is the softmax over `rows` rows of the head from `first_row` on. The backward pass computes p again, chunk by chunk.

    Args:
        hidden: [N, D]. weight: the head [V, D]. embeddings: [V, E].
        chunk: positions whose p exists at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _SoftEmbeddings.apply(hidden, weight, embeddings.detach(), slice(first_row, first_row + rows), chunk)


class _SoftEmbeddings(torch.autograd.Function):
    """The mixed rows of a table, whose backward pass computes the weights of the mixture again, but not the mixture."""

    @staticmethod
    def forward(ctx, hidden, weight, embeddings, place, chunk):
        visual, table = weight[place].to(hidden.dtype), embeddings[place]
        mixed = table.new_empty(len(hidden), table.shape[1])
        logits = hidden.new_empty(min(chunk, len(hidden)), len(visual))
        for s in chunks(len(hidden), chunk):
            p = torch.mm(hidden[s], visual.T, out=logits[: len(hidden[s])]).float().softmax(1)
            torch.mm(p.to(table.dtype), table, out=mixed[s])
        ctx.save_for_backward(hidden, weight, embeddings, mixed)
        ctx.place, ctx.chunk = place, chunk
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, embeddings, mixed = ctx.saved_tensors
        visual, table = weight[ctx.place].to(hidden.dtype), embeddings[ctx.place]
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_visual = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device) if wanted[1] else None
        grad = grad.to(table.dtype)
        along = (grad.float() * mixed.float()).sum(1, keepdim=True)  # sum over codes of p dL/dp
        logits = hidden.new_empty(min(ctx.chunk, len(hidden)), len(visual))
        for s in chunks(len(hidden), ctx.chunk):
            x = hidden[s]
            p = torch.mm(x, visual.T, out=logits[: len(x)]).float().softmax(1)
            of_logits = torch.mm(grad[s], table.T).float().sub_(along[s]).mul_(p).to(hidden.dtype)
            if wanted[0]:
                torch.mm(of_logits, visual, out=grad_hidden[s])
            if wanted[1] and grad_visual.dtype == x.dtype:
                grad_visual.addmm_(of_logits.T, x)
            elif wanted[1]:
                grad_visual += of_logits.T @ x
        grad_weight = None
        if wanted[1]:
            grad_weight = torch.zeros_like(weight)
            grad_weight[ctx.place] = grad_visual.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
