"""Cross-entropy over the visual codes, in chunks of supervised positions, so that no [L, V] logits exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps only hidden states and one normaliser a position; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, rows: int, chunk: int) -> Tensor:
        visual = weight[first_row : first_row + rows].to(hidden.dtype)
        normaliser = hidden.new_empty(len(hidden), dtype=torch.float32)
        loss = torch.empty_like(normaliser)
        for s in chunks(len(hidden), chunk):
            logits = F.linear(hidden[s], visual).float()
            normaliser[s] = logits.logsumexp(dim=1)
            loss[s] = normaliser[s] - logits.gather(1, targets[s, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.first_row, ctx.rows, ctx.chunk = first_row, rows, chunk
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        rows = slice(ctx.first_row, ctx.first_row + ctx.rows)
        visual = weight[rows].to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_visual = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
        for s in chunks(len(hidden), ctx.chunk):
            grad = F.linear(hidden[s], visual).float().sub_(normaliser[s, None]).exp_()
            grad[torch.arange(len(grad), device=grad.device), targets[s]] -= 1
            grad = grad.mul_(grad_loss[s, None]).to(hidden.dtype)
            grad_hidden[s] = grad @ visual
            grad_visual += grad.T @ hidden[s]
        grad_weight = torch.zeros_like(weight)
        grad_weight[rows] = grad_visual.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, first_row: int, rows: int, chunk: int = 256
) -> Tensor:
    """Cross-entropy of each position over `rows` rows of the head from `first_row` on.

    hidden [N, D], weight [V, D], targets int64 [N] in 0..rows-1 -> fp32 [N]. Peak extra memory: chunk * rows * 4 bytes.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, first_row, rows, chunk)


def frame_losses(position_loss: Tensor, frame_index: Tensor) -> Tensor:
    """Mean loss of each latent frame: position_loss [N], frame_index [N] -> [t]; nan where none is supervised."""
    frames = int(frame_index.max()) + 1 if len(frame_index) else 0
    total = torch.zeros(frames, device=position_loss.device).index_add_(0, frame_index, position_loss.detach())
    return total / torch.bincount(frame_index, minlength=frames)
