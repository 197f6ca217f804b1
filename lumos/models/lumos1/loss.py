"""Cross-entropy over the visual codes, computed in chunks of positions, so that the full logits [L, V] never exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass also computes the gradients, while the logits of a chunk exist.

    These gradients are right if all losses have the same weight, as in a mean: the backward pass then
    only scales them. For losses with different weights it computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: slice, chunk: int, wanted: tuple[bool, bool]) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.place = (rows, chunk, wanted)
        loss, *ctx.gradients = _by_chunks(hidden, weight, targets, *ctx.place)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_loss[0] if len(grad_loss) else 1.0
        if gradients is None or not (grad_loss == scale).all():
            _, *gradients = _by_chunks(*ctx.saved_tensors, *ctx.place, scale=grad_loss)
        else:
            gradients = [g if g is None else g.mul_(scale) for g in gradients]
        return (*gradients, None, None, None, None)


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: slice, chunk: int, wanted: tuple[bool, bool], scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses [N] and the gradients of their sum with respect to hidden [N, D] and weight [V, D].

    wanted: which of the two gradients to compute; the other is None. scale: [N], the weight of each loss
    in the sum; None stands for 1.

    All chunks share two buffers: to allocate memory of this size for each chunk would take longer than
    the computation.
    """
    visual = weight[rows].to(hidden.dtype)
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] else None
    exact = weight.dtype == hidden.dtype == torch.float32
    if wanted[1]:
        grad_visual = grad_weight[rows] if exact else torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
    size = (min(chunk, len(hidden)), len(visual))
    product_buffer, log_buffer = hidden.new_empty(size), hidden.new_empty(size, dtype=torch.float32)
    for s in chunks(len(hidden), chunk):
        x, at = hidden[s], targets[s, None]
        logits = torch.mm(x, visual.T, out=product_buffer[: len(x)]).float()
        log_p = torch.log_softmax(logits, dim=1, out=log_buffer[: len(x)])
        loss[s] = -log_p.gather(1, at).squeeze(1)
        if not any(wanted):
            continue
        grad = log_p.exp_()  # softmax - one-hot
        grad.scatter_add_(1, at, grad.new_full(at.shape, -1.0))
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
        grad_weight[rows] = grad_visual.to(weight.dtype)
    return loss, grad_hidden, grad_weight


def chunks(n: int, size: int) -> Iterator[slice]:
    """Return slices that divide range(n) into chunks of `size`; the last may be shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, first_row: int, rows: int, chunk: int = 256
) -> Tensor:
    """Return the cross-entropy of each position, fp32 [N], over `rows` rows of the head from `first_row` on.

    hidden [N, D], weight [V, D], targets int64 [N] in 0..rows-1.
    Peak extra memory: chunk * rows * 4 bytes.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, slice(first_row, first_row + rows), chunk, wanted)


def frame_losses(position_loss: Tensor, frame_index: Tensor) -> Tensor:
    """Return the mean loss of each latent frame, [t], NaN for a frame without supervised positions.

    position_loss [N], frame_index int64 [N]: the loss and the latent frame of each position.
    """
    frames = int(frame_index.max()) + 1 if len(frame_index) else 0
    total = torch.zeros(frames, device=position_loss.device).index_add_(0, frame_index, position_loss.detach())
    return total / torch.bincount(frame_index, minlength=frames)
