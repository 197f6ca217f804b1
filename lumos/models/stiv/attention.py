"""Attention with QK-norm, and the policies of activation checkpointing.

Shapes: N independent sequences, L queries, M keys, H heads, D = 64 channels of a head, d = H x D.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lumos.models.stiv.configuration import HEAD_DIM
from lumos.models.stiv.fused import EPS, normed_rotary
from lumos.models.stiv.rope import Rotary, apply_rotary

KERNELS = frozenset((
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
))  # fmt: skip
"""Names of the operators that compute attention; the device and the dtype decide which one runs."""
LINEAR = frozenset(("aten::mm", "aten::addmm"))
"""Names of the operators that compute linear layers; their last two arguments are the input and the weight."""


class ZeroLinear(nn.Linear):
    """A linear layer that starts with weights and biases of 0."""


class StivRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, with statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS)


class StivHeadNorm(StivRMSNorm):
    """RMSNorm of queries or keys, a head at a time, and then RoPE."""

    def __init__(self):
        super().__init__(HEAD_DIM)

    def forward(self, x: Tensor, tables: Rotary | None, dtype: torch.dtype) -> Tensor:
        """x [..., L, H, D], in any dtype -> [..., L, H, D] in `dtype`; tables None: no positions."""
        return normed_rotary(x, self.weight, tables, dtype)


class HeadRotation(nn.Module):
    """RoPE of queries or keys that have no norm."""

    def forward(self, x: Tensor, tables: Rotary | None, dtype: torch.dtype) -> Tensor:
        """x [..., L, H, D], in any dtype -> [..., L, H, D] in `dtype`; tables None: no positions."""
        return (x if tables is None else apply_rotary(x, tables)).to(dtype)


class StivAttention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys, a head at a time, before RoPE.

    With `zero_out` the output projection starts at 0. Without `qk_norm` queries and keys have no norm.
    """

    def __init__(self, width: int, zero_out: bool = False, qk_norm: bool = True):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = (ZeroLinear if zero_out else nn.Linear)(width, width)
        self.q_norm, self.k_norm = (StivHeadNorm() if qk_norm else HeadRotation() for _ in range(2))

    def keys_and_values(self, source: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of source [..., M, d], each [..., M, H, D]; rotary: tables for keys."""
        k, v = (proj(source).unflatten(-1, (-1, HEAD_DIM)) for proj in (self.k_proj, self.v_proj))
        dtype = attention_dtype(v)
        return self.k_norm(k, rotary, dtype), v.to(dtype)

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None, *, rotary: Rotary | None = None,
        mask: Tensor | None = None, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """x [..., L, d] -> [..., L, d]; the leading dimensions are independent sequences.

        Args:
            keys_values: see `keys_and_values`. None: those of x.
            rotary: tables for queries, and for the keys of x. None: no positions.
            mask: bool [N, 1, 1, M], False where a key is padding. Each sequence needs one True.
            causal: query i attends to the keys up to i.
        """
        k, v = self.keys_and_values(x, rotary) if keys_values is None else keys_values
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, HEAD_DIM)), rotary, v.dtype)
        q, k, v = (part.flatten(0, -4).transpose(1, 2) for part in (q, k, v))  # [N, H, L or M, D]
        with without_autocast(q.device.type):  # which would turn the operands into its own dtype again
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape).to(x.dtype))


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context in which autocast leaves the dtypes of operands on a type of device as they are."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def attention_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype to compute attention in: float32 for bfloat16 training on a CPU, else that of `values`.

    On a CPU the backward pass of attention takes about four times as long in bfloat16, even where matrix products are
    faster in it.
    """
    slow = values.device.type == "cpu" and values.dtype == torch.bfloat16 and values.requires_grad
    return torch.float32 if slow else values.dtype


def save_attention_outputs() -> tuple:
    """Return the contexts with which `torch.utils.checkpoint` saves the outputs of self-attention and recomputes the rest.

    The output has the size of a block's input, but its cost grows with the square of the sequence: it is cheap to
    save and expensive to recompute. Cross-attention has few keys and is recomputed.
    """
    return saving(is_self_attention)


def save_product_outputs() -> tuple:
    """Return the contexts that also save the outputs of linear layers, except of those that are wider than their input.

    What is recomputed is the first layer of the MLP, whose output has four times the size of a block's input, and all
    that costs little.
    """
    return saving(lambda name, args: is_self_attention(name, args) or (name in LINEAR and is_no_wider(*args[-2:])))


SAVED = {"attention": save_attention_outputs, "products": save_product_outputs}
"""The outputs that activation checkpointing saves of a block beside its input, by the name in the settings (SAVED_OUTPUTS)."""


def saving(is_saved: Callable[[str, tuple], bool]) -> tuple:
    """Return contexts for `torch.utils.checkpoint` that save the outputs of those operators for which `is_saved` is true."""

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_saved(op.name(), args) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def is_self_attention(name: str, args: tuple) -> bool:
    """Return whether an operator is attention with as many keys as queries."""
    return name in KERNELS and args[0].shape[-2] == args[1].shape[-2]


def is_no_wider(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of x [n, k] and weight [k, m] has at most as many channels as x."""
    return weight.shape[1] <= x.shape[1]
