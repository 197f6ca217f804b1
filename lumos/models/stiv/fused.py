"""Norms together with what follows them, as operators with a backward pass of their own.

    normed_sum      base + N(x) factor, N a LayerNorm without weights: modulation, gates and gains
    normed_rotary   R(RMSNorm(x)), R the rotation of RoPE: queries and keys

On a CPU the plain forms, which torch's autograd differentiates, write each of their steps to fresh memory, and keep several of
them for the backward pass. The operators here keep only their inputs, and compute a piece of the tokens after the other, so
that steps in between use the same little memory again. On other devices, and for a compiler, the plain forms run.

Shapes: B batch, f frames, s places of a frame, d channels; H heads, D channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos.models.stiv.rope import Rotary, apply_rotary

EPS = 1e-6
DEVICES = {"cpu"}
"""The types of devices on which the operators are faster than the plain forms."""
PIECE_VALUES = 2**19
"""Values of a piece: 2 MiB in float32, which the C library takes from memory in use (`lumos.runtime.return_freed_memory`)."""
Place = tuple[slice, slice]


def normed_sum(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return base + N(x) * factor, [B, f, s, d], where N is a LayerNorm without weights, with statistics in float32.

    Under autocast N(x) has the autocast dtype, so that matrix products that follow need no copy of their own. The result
    has the wider dtype of base and N(x).

    x: [B, f, s, d]. base, factor: of four dimensions, each of the size of x or 1.
    """
    dtype = torch.promote_types(base.dtype, normed_dtype(x))
    if not uses_pieces(x):
        return torch.addcmul(base, norm(x), factor).to(dtype)
    return (NormedSum.apply if torch.is_grad_enabled() else summed)(base, x, factor, dtype)


def normed_rotary(x: Tensor, weight: Tensor, tables: Rotary | None, dtype: torch.dtype) -> Tensor:
    """Return x / rms(x) * weight of each head, [..., L, H, D], turned by the tables of `rotary`, in the dtype.

    weight: [D]. tables: None: nothing is turned. Statistics are in float32.
    """
    if uses_pieces(x):
        form = NormedRotary.apply if torch.is_grad_enabled() else normed_and_turned
        return form(x, weight, *(tables or (None, None)), dtype)
    normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
    return (normed if tables is None else apply_rotary(normed, tables)).to(dtype)


def norm(x: Tensor) -> Tensor:
    """Return LayerNorm without weights over the last dimension, with statistics in float32, in `normed_dtype`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS).to(normed_dtype(x))


def normed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a norm of x: the autocast dtype, or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype


def uses_pieces(x: Tensor) -> bool:
    """Return whether x is on a device on which the operators of this module are the faster form."""
    return x.device.type in DEVICES and not torch.compiler.is_compiling()


def widened(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def places(shape: torch.Size) -> list[Place]:
    """Return where the pieces of a tensor are along its first two dimensions."""
    row, clips = math.prod(shape[2:]), max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
    rows = max(1, PIECE_VALUES // max(1, row)) if clips == 1 else shape[1]
    return [(slice(b, b + clips), slice(i, i + rows)) for b in range(0, shape[0], clips) for i in range(0, shape[1], rows)]


def piece(x: Tensor, place: Place) -> Tensor:
    """Return the view of x at a place; a dimension of size 1 stands for all of it."""
    first, second = (part if size > 1 else slice(None) for part, size in zip(place, x.shape[:2], strict=True))
    return x[first, second]


def summed(base: Tensor, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the result of `normed_sum`, computed piece by piece."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for place in places(x.shape):
        normed = F.layer_norm(widened(piece(x, place)), x.shape[-1:], eps=EPS)
        torch.addcmul(piece(base, place), normed, piece(factor, place), out=piece(out, place))
    return out


def normed_and_turned(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the result of `normed_rotary`, computed piece by piece."""
    source, tables = by_clips(x, cos, sin)
    wide, half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
    weight = weight.to(wide)
    tables = tables and (tables[0] * weight, tables[1] * weight.roll(half))
    out = torch.empty(source.shape, dtype=dtype, device=x.device)
    for place in places(source.shape):
        part = piece(source, place).to(wide)
        scaled = part * weight if tables is None else turned(part, *(piece(table, place) for table in tables))
        torch.mul(scaled, inverse_rms(part), out=piece(out, place))
    return out.view(x.shape)


class NormedSum(torch.autograd.Function):
    """See `normed_sum`."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.shape, ctx.dtype = base.shape, base.dtype
        return summed(base, x, factor, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        of_factor = torch.zeros(factor.shape, dtype=wide, device=x.device)
        of_base = None if ctx.shape == x.shape else torch.zeros(ctx.shape, dtype=wide, device=x.device)
        for place in places(x.shape):
            g, part, by = (piece(t, place).to(wide) for t in (grad, x, factor))
            part = part.contiguous()
            normed, mean, rstd = torch.native_layer_norm(part, x.shape[-1:], None, None, EPS)
            for total, values in ((of_factor, g * normed), (of_base, g)):
                if total is not None:
                    summed = piece(total, place)
                    summed.add_(values.sum_to_size(summed.shape))
            found, _, _ = torch.ops.aten.native_layer_norm_backward(
                g * by, part, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )
            piece(of_x, place).copy_(found)
        of_base = grad if of_base is None else of_base
        return of_base.to(ctx.dtype), of_x, of_factor.to(factor.dtype), None


class NormedRotary(torch.autograd.Function):
    """See `normed_rotary`.

    With z = x / rms(x), the result is y = z c + swap(z) e, where c = cos weight, e = sin swap(weight), and swap exchanges
    the halves of the channels. The gradient of z weight is h = g cos + swap(g sin), and that of x is
    (h weight - x mean(h weight x) / rms(x)^2) / rms(x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        return normed_and_turned(x, weight, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        source, tables = by_clips(x, cos, sin)
        wide, channels = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        tables = tables and (tables[0].to(wide), tables[1].to(wide).roll(channels // 2, -1))
        by, grad = weight.to(wide), grad.reshape(source.shape)
        of_x = torch.empty(source.shape, dtype=x.dtype, device=x.device)
        of_weight = torch.zeros(channels, dtype=wide, device=x.device)
        for place in places(source.shape):
            part, g = piece(source, place).to(wide), piece(grad, place).to(wide)
            h = g if tables is None else turned(g, *(piece(table, place) for table in tables))
            scale, both = inverse_rms(part), h * part
            of_weight += (both * scale).flatten(0, -2).sum(0)
            mean = (both.mul_(by)).mean(-1, keepdim=True) * scale.square()
            torch.mul((h * by).addcmul_(part, mean, value=-1), scale, out=piece(of_x, place))
        return of_x.view(x.shape), of_weight.to(weight.dtype), None, None, None


def by_clips(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Rotary | None]:
    """Return x [..., L, H, D] as [B, f, s, H, D], and the tables with as many dimensions."""
    if cos is None:
        return x.reshape(1, -1, 1, *x.shape[-2:]), None
    source = x if x.dim() == 5 else x.reshape(-1, 1, *x.shape[-3:])
    return source, tuple(table[(None,) * (5 - table.dim())] for table in (cos, sin))


def inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / rms(x) over the last dimension, kept as size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(EPS).rsqrt_()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x cos + swap(x) sin, in new memory; swap exchanges the halves of the last dimension."""
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
