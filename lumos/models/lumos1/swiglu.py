"""The product of SwiGLU (arXiv 2002.05202) and the pieces in which an MLP computes it, to save memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MLP_TOKENS = 1024  # tokens that an MLP computes at a time, see `mlp_piece`


class SiluTimes(torch.autograd.Function):
    """silu(gate) * up, which saves only its two arguments for the backward pass.

    Autograd would also save silu(gate), one more of the widest tensors of a layer.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gate, up), (for_gate, for_up) = ctx.saved_tensors, ctx.needs_input_grad
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if for_gate else None
        return grad_gate, F.silu(gate).mul_(grad) if for_up else None


def mlp_piece(tokens: int, with_gradients: bool) -> int:
    """Return how many of `tokens` tokens an MLP computes at a time.

    The intermediates of the MLP are the widest tensors of a layer. The backward pass finishes one piece
    before the next, so the gradients of the intermediates exist for one piece at a time. With gradients
    four pieces are enough: smaller pieces would save little more memory.
    """
    return max(MLP_TOKENS, -(-tokens // 4)) if with_gradients else MLP_TOKENS
