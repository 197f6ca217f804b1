"""Patches for video: p x p x p pixels become p^3 channels, by a Haar wavelet or by plain rearranging. Both are invertible.

The first frame stands alone: it is repeated p times in front, so that T = 1 + p k frames give 1 + k patch frames and the
first patch frame depends on the first frame only.

A picture of twice the size is one of the size, its 2 x 2 means, and the three differences in each (`spatial_patchify`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PATCH_METHODS = ("haar", "rearrange")


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def haar_matrix(patch_size: int, num_axes: int = 3) -> Tensor:
    """[p^n bands, p^n positions] float32 of the n-D Haar transform over log2(p) levels, rows scaled by 2^(-n levels).

    Rows: one base-2^n digit a level, finest level last, with a bit an axis (time, height, width; or height, width), 0 for the
    mean and 1 for the difference. Columns: row-major places inside the patch. The inverse is the transpose times p^n.
    """
    num_levels = patch_size.bit_length() - 1
    place = torch.arange(patch_size)
    count = patch_size**num_axes
    sign_bits = torch.zeros(count, count, dtype=torch.long)
    band = torch.arange(count)
    places = torch.stack(torch.meshgrid(*[place] * num_axes, indexing="ij")).reshape(num_axes, count)
    for level in range(num_levels):
        for axis in range(num_axes):
            band_bit = band >> (num_axes * level + num_axes - 1 - axis) & 1
            place_bit = places[axis] >> level & 1
            sign_bits += band_bit[:, None] * place_bit[None, :]
    return (1.0 - 2.0 * (sign_bits % 2)) / count


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a matrix made inside inference mode would be kept and could never be trained through
def _matrix_like(patch_size: int, inverse: bool, device: torch.device, dtype: torch.dtype, num_axes: int = 3) -> Tensor:
    matrix = haar_matrix(patch_size, num_axes)
    if inverse:
        matrix = matrix.T * patch_size**num_axes
    return matrix.to(device=device, dtype=dtype)


def patchify(video: Tensor, patch_size: int, method: str, starts: bool = True) -> Tensor:
    """[B, C, T, H, W] -> [B, p^3 C, 1 + (T - 1) / p, H / p, W / p]; T / p frames where the clip does not start here."""
    p = patch_size
    if p == 1:
        return video
    if starts:
        video = torch.cat([video[:, :, :1].expand(-1, -1, p - 1, -1, -1), video], dim=2)
    b, c, frames, height, width = video.shape
    t, h, w = frames // p, height // p, width // p
    x = video.reshape(b, c, t, p, h, p, w, p)
    if method == "rearrange":
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    else:
        x = x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b, p**3, c * t * h * w)
        x = torch.matmul(_matrix_like(p, False, x.device, x.dtype), x)
    return x.reshape(b, p**3 * c, t, h, w)


def unpatchify(patches: Tensor, patch_size: int, method: str, starts: bool = True) -> Tensor:
    """Inverse of `patchify`: [B, p^3 C, t, h, w] -> [B, C, 1 + p (t - 1), h p, w p], or p t frames."""
    p = patch_size
    if p == 1:
        return patches
    b, channels, t, h, w = patches.shape
    c = channels // p**3
    if method == "rearrange":
        x = patches.reshape(b, c, p, p, p, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    else:
        x = torch.matmul(_matrix_like(p, True, patches.device, patches.dtype), patches.reshape(b, p**3, c * t * h * w))
        x = x.view(b, p, p, p, c, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return x.reshape(b, c, t * p, h * p, w * p)[:, :, p - 1 if starts else 0 :]


def spatial_patchify(video: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, p^2 C, T, H / p, W / p] by the 2-D Haar wavelet; the first C channels are the means."""
    p = patch_size
    if p == 1:
        return video
    b, c, frames, height, width = video.shape
    h, w = height // p, width // p
    x = video.reshape(b, c, frames, h, p, w, p).permute(0, 4, 6, 1, 2, 3, 5).reshape(b, p**2, c * frames * h * w)
    x = torch.matmul(_matrix_like(p, False, x.device, x.dtype, num_axes=2), x)
    return x.reshape(b, p**2 * c, frames, h, w)


def spatial_unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Inverse of `spatial_patchify`: [B, p^2 C, T, h, w] -> [B, C, T, h p, w p]."""
    p = patch_size
    if p == 1:
        return patches
    b, channels, frames, h, w = patches.shape
    c = channels // p**2
    x = patches.reshape(b, p**2, c * frames * h * w)
    x = torch.matmul(_matrix_like(p, True, x.device, x.dtype, num_axes=2), x)
    return x.view(b, p, p, c, frames, h, w).permute(0, 3, 4, 5, 1, 6, 2).reshape(b, c, frames, h * p, w * p)
