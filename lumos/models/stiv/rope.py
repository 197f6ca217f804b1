"""Rotary positions (arXiv 2104.09864): rows and columns in a frame, and time at a place.

A head has 64 channels. Channel i is paired with channel i + 32, and the pair turns by position x frequency. In
spatial attention the first 16 pairs turn with the row and the other 16 with the column; in temporal attention
all 32 pairs turn with time. Each axis has its own full range of frequencies, base 10,000.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Tables (cos, cos) and (-sin, sin) for `apply_rotary`; they broadcast to the queries [..., H, D]."""
BASE = 10_000.0


def angles(positions: Tensor, channels: int) -> Tensor:
    """Return the angles of positions along one axis, float32: [...] -> [..., channels / 2]."""
    exponents = torch.arange(0, channels, 2, device=positions.device).float() / channels
    return positions.float()[..., None] * BASE**-exponents


def spatial_angles(rows: int, columns: int, row_scale: float, column_scale: float, head_dim: int, device: torch.device) -> Tensor:
    """Return the angles of the places of a frame, row by row, float32 [rows x columns, head_dim / 2].

    A position is multiplied by the scale of its axis.
    """
    row = angles(torch.arange(rows, device=device) * row_scale, head_dim // 2)
    column = angles(torch.arange(columns, device=device) * column_scale, head_dim // 2)
    both = torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=-1)
    return both.flatten(0, 1)


def temporal_angles(frames: int, scale: float, head_dim: int, device: torch.device) -> Tensor:
    """Return the angles of the frames, float32 [frames, head_dim / 2]."""
    return angles(torch.arange(frames, device=device) * scale, head_dim)


def rotary(turns: Tensor, dtype: torch.dtype) -> Rotary:
    """Return the tables of angles [..., L, D/2]; the tables are [..., L, 1, D], for queries [..., L, H, D]."""
    cos, sin = turns.cos().to(dtype)[..., None, :], turns.sin().to(dtype)[..., None, :]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x: Tensor, tables: Rotary) -> Tensor:
    """Turn the channel pairs of x [..., L, H, D] by the tables of `rotary`."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
