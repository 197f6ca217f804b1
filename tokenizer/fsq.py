"""Finite scalar quantization: every latent channel is rounded to a few fixed values (Mentzer et al. 2023, arXiv 2309.15505).

The constants are those of the published Cosmos tokenizer, so codes agree with it one to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPSILON = 1e-3


def code_count(levels: Sequence[int]) -> int:
    """Number of different codes of a quantizer with these levels per channel."""
    return math.prod(levels)


class FiniteScalarQuantizer(nn.Module):
    """Rounds C latent channels to `levels[c]` values each and numbers the combinations.

    Code value of a channel: round(tanh(z + shift) * half - offset) / (level // 2), which lies in [-1, 1].
    Index: sum over channels of (value * (level // 2) + level // 2) * product of the levels before it.
    It owns no parameters, and its constants are not part of a state dict.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.num_codes = code_count(levels)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(levels, levels // 2, index basis), each [C] int64."""
        levels = torch.tensor(self.levels, device=device)
        basis = torch.tensor([math.prod(self.levels[:c]) for c in range(len(self.levels))], device=device)
        return levels, levels // 2, basis

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, C, t, h, w] -> (code values of the same shape and dtype, int64 indices [B, t, h, w]).

        The rounding is a straight-through estimator: gradients pass as if it were not there.
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
        """Indices [B, t, h, w] -> code values [B, C, t, h, w].

        Raises ValueError when an index lies outside 0 .. num_codes - 1.
        """
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}, got {int(indices.min())}..{int(indices.max())}; "
                "do they come from a tokenizer with other levels?"
            )
        levels, half_width, basis = (_channelwise(constant) for constant in self._constants(indices.device))
        digits = indices.long().unsqueeze(1) // basis % levels
        return ((digits - half_width) / half_width).to(dtype)


def _channelwise(constant: Tensor) -> Tensor:
    return constant.view(1, -1, 1, 1, 1)
