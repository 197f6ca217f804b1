"""Rotary positions: MM-RoPE, and the schemes that it is compared with.

All schemes follow one rule. Each token has three positions (t, h, w). The three positions of a text token
all equal its index in the sequence, so for text every scheme is the original 1-D RoPE. Frequency i of a
head rotates its pair of channels by the angle position[axis(i)] * inv_freq(i). A scheme assigns an axis to
each frequency, and a distance to neighbouring codes along each axis.

MM-RoPE (arXiv 2507.08801) divides each group of 16 frequencies among the axes t:h:w = 4:6:6, interleaved.
Each axis thus covers the whole range of frequencies. The content token in row r and column c of latent
frame k has the position P0 + (4 k, 8 r, 8 c), where P0 is the index of the first content token. The
strides 4, 8, 8 are the compression of the video tokenizer, unless the config sets `position_strides`.
Source: reference, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumos.errors import shown
from lumos.models.lumos1.configuration import SCALED_SCHEMES, LumosConfig
from lumos.models.lumos1.sequence import Frame, SequenceLayout, by_layout

T_AXIS, H_AXIS, W_AXIS = 0, 1, 2
MM_ROPE_GROUP = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)


def frequency_axes(scheme: str, num_frequencies: int) -> Tensor:
    """Return the axis of each frequency, int64 [D/2], highest frequency first.

    Raises ValueError for an unknown scheme.
    """
    n_t = num_frequencies // 4
    if scheme in ("mm_rope", "mm_rope_unscaled"):
        return torch.tensor(MM_ROPE_GROUP).repeat(num_frequencies // 16)
    if scheme in ("m_rope", "rope_3d"):  # contiguous sections 2:3:3, time highest (Qwen2-VL, arXiv 2409.12191)
        n_h = (num_frequencies - n_t) // 2
        return torch.tensor([T_AXIS] * n_t + [H_AXIS] * n_h + [W_AXIS] * (num_frequencies - n_t - n_h))
    if scheme == "videorope":  # time on the lowest frequencies, rows and columns interleaved above (arXiv 2502.05173)
        return torch.tensor([H_AXIS, W_AXIS] * ((num_frequencies - n_t) // 2) + [T_AXIS] * n_t)
    if scheme == "1d":
        return torch.zeros(num_frequencies, dtype=torch.int64)
    raise ValueError(f"unknown position scheme {shown(scheme)}")


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return the inverse frequencies theta^(-2i/D), fp32 [D/2] (RoFormer, arXiv 2104.09864)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def visual_inverse_frequencies(scheme: str, head_dim: int, theta: float) -> Tensor:
    """Return the inverse frequencies of content tokens, fp32 [D/2].

    They differ from those of text only for "rope_3d", where each axis has its own full range of frequencies.
    """
    if scheme != "rope_3d":
        return inverse_frequencies(head_dim, theta)
    sizes = torch.bincount(frequency_axes(scheme, head_dim // 2), minlength=3).tolist()
    return torch.cat([inverse_frequencies(2 * n, theta) for n in sizes])


def axis_strides(config: LumosConfig) -> tuple[int, int, int]:
    """Return the distance between neighbouring codes along (t, h, w), in positions."""
    if config.position_scheme not in SCALED_SCHEMES:
        return 1, 1, 1
    if config.position_strides is not None:
        return tuple(config.position_strides)
    return config.temporal_compression, config.spatial_compression, config.spatial_compression


def frame_positions(frame: Frame, index: int, origin: int, config: LumosConfig) -> Tensor:
    """Return the positions of a latent frame, int64 [3, n] for the n tokens of its span.

    index: the time of the frame, which is its number in the clip, from 0. origin: P0. The four tokens around the content have
    their index in the sequence as position.
    """
    positions = torch.arange(frame.start, frame.end).repeat(3, 1)
    if config.position_scheme != "1d":
        dt, dh, dw = axis_strides(config)
        rows = torch.arange(frame.rows)[:, None].expand(-1, frame.cols + 1)
        cols = torch.arange(frame.cols + 1).expand(frame.rows, -1)
        content = torch.stack([torch.full_like(rows, dt * index), dh * rows, dw * cols]).flatten(1) + origin
        positions[:, frame.content_start - frame.start : -1] = content
    return positions


def position_ids(layouts: list[SequenceLayout], length: int, config: LumosConfig) -> Tensor:
    """Return the positions (t, h, w) of all tokens, int64 [B, 3, L]."""

    def row(layout: SequenceLayout) -> Tensor:
        positions = torch.arange(length).repeat(3, 1)
        for frame, time in zip(layout.frames, layout.times, strict=True):
            positions[:, frame.start : frame.end] = frame_positions(frame, time, layout.origin, config)
        return positions

    return by_layout(layouts, row)


def rotary_tables(
    positions: Tensor, is_content: Tensor, config: LumosConfig, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the tables (cos, cos) and (-sin, sin) for `apply_rotary`, [B, 1, L, D] each, computed in fp32.

    positions: int64 [B, 3, L]. is_content: bool [B, L], True for codes and newlines of frames.
    """
    device, scheme = positions.device, config.position_scheme
    axes = frequency_axes(scheme, config.head_dim // 2).to(device)
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta).to(device)
    by_frequency = positions.float()[:, axes].transpose(1, 2)  # [B, L, D/2]
    if scheme == "rope_3d":
        visual = visual_inverse_frequencies(scheme, config.head_dim, config.rope_theta).to(device)
        inv_freq = torch.where(is_content[..., None], visual, inv_freq)
    angles = (by_frequency * inv_freq)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, L, D] by the tables of `rotary_tables`.

    Channel i is paired with channel i + D/2, the half-split layout of Hugging Face checkpoints.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
