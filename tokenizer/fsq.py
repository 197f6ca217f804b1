"""Finite scalar quantization: every latent channel is rounded to one of a few fixed values.

Source: Mentzer et al. 2023, arXiv 2309.15505. The constants are those of the published Cosmos
tokenizer, so that both give the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPSILON = 1e-3


def code_count(levels: Sequence[int]) -> int:
    """Return the number of different codes of a quantizer with `levels[c]` values in channel c."""
    return math.prod(levels)


class FiniteScalarQuantizer(nn.Module):
    """Round C latent channels to `levels[c]` values each and number the combinations.

    Code value of a channel: round(tanh(z + shift) * half - offset) / (level // 2), which lies in
    [-1, 1]. Index (the code): the sum over the channels of (value * (level // 2) + level // 2) times
    the product of the levels of the earlier channels. The module has no parameters and no buffers,
    so a state dict holds nothing of it.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.num_codes = code_count(levels)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return (levels, levels // 2, products of the levels of earlier channels), each [C] int64."""
        levels = torch.tensor(self.levels, device=device)
        basis = torch.tensor([math.prod(self.levels[:c]) for c in range(len(self.levels))], device=device)
        return levels, levels // 2, basis

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize z [B, C, t, h, w]; return code values of its shape and dtype, and int64 indices [B, t, h, w].

        Gradients pass the rounding unchanged (straight-through estimator).
        """
        levels, half_width, basis = self._constants(z.device)
        levels, basis = _channelwise(levels), _channelwise(basis)
        half_width = _channelwise(half_width)
        half = (levels - 1) * (1 + _EPSILON) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        bounded = torch.tanh(z.float() + shift) * half - offset
        rounded = bounded.round()
        indices = ((rounded.detach().long() + half_width) * basis).sum(dim=1)
        straight_through = bounded + (rounded - bounded).detach()
        return (straight_through / half_width).to(z.dtype), indices

    def values(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the code values [B, C, t, h, w] of indices [B, t, h, w].

        Raises ValueError if an index is outside 0 .. num_codes - 1.
        """
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}, got {int(indices.min())}..{int(indices.max())}; "
                "do they come from a tokenizer with other levels?"
            )
        levels, half_width, basis = (_channelwise(constant) for constant in self._constants(indices.device))
        digits = indices.long().unsqueeze(1) // basis % levels
        return ((digits - half_width) / half_width).to(dtype)


    def nearest(self, values: Tensor) -> Tensor:
        """Return the indices, int64 [B, t, h, w], whose code values are nearest to values [B, C, t, h, w].

        The inverse of `values`, for numbers between and outside the code values too. Raises ValueError
        for NaN.
        """
        if values.isnan().any():
            raise ValueError("NaN has no nearest code")
        levels, half_width, basis = (_channelwise(constant) for constant in self._constants(values.device))
        digits = (values.double() * half_width + half_width).round().clamp(min=0).minimum(levels - 1)
        return (digits.long() * basis).sum(dim=1)


class NoQuantizer(nn.Module):
    """The identity with the interface of `FiniteScalarQuantizer`: latents [B, C, t, h, w] in place of codes."""

    num_codes = 0

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return z twice."""
        return z, z

    def values(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the latents in another dtype."""
        return latents.to(dtype)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values


def _channelwise(constant: Tensor) -> Tensor:
    return constant.view(1, -1, 1, 1, 1)
