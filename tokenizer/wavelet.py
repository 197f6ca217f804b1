"""Patches for video: p x p x p pixels become p^3 channels, by a Haar wavelet or by rearranging. Both are invertible.

The first frame fills a patch of its own: it is repeated until there are p copies. So T = 1 + p k
frames become 1 + k patch frames, and the first patch frame depends on the first frame only.

`spatial_patchify` splits a picture into one of half the height and width, the means of its 2 x 2
pixels, and three differences for each mean. `picture_patchify` is the same with the bands in the order
of the published network for pictures.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PATCH_METHODS = ("haar", "rearrange")


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def haar_matrix(patch_size: int, num_axes: int = 3) -> Tensor:
    """Return the matrix of the n-D Haar transform over log2(p) levels, float32 [p^n bands, p^n positions].

    n is `num_axes`, p is `patch_size`. Rows are scaled by 2^(-n * levels). A row number has one base-2^n
    digit for each level, the finest level last. The digit has one bit for each axis (time, height,
    width, or height, width): 0 for the mean, 1 for the difference. Columns are the positions in the
    patch in row-major order. The inverse is the transpose times p^n.
    """
    num_levels = patch_size.bit_length() - 1
    place = torch.arange(patch_size, device="cpu")  # not the caller's default device: the matrix is kept for all later calls
    count = patch_size**num_axes
    sign_bits = torch.zeros(count, count, dtype=torch.long, device="cpu")
    band = torch.arange(count, device="cpu")
    places = torch.stack(torch.meshgrid(*[place] * num_axes, indexing="ij")).reshape(num_axes, count)
    for level in range(num_levels):
        for axis in range(num_axes):
            band_bit = band >> (num_axes * level + num_axes - 1 - axis) & 1
            place_bit = places[axis] >> level & 1
            sign_bits += band_bit[:, None] * place_bit[None, :]
    return (1.0 - 2.0 * (sign_bits % 2).float()) / count


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cached matrix could not be used in training if it were made in inference mode
def _matrix_like(patch_size: int, inverse: bool, device: torch.device, dtype: torch.dtype, num_axes: int = 3) -> Tensor:
    matrix = haar_matrix(patch_size, num_axes)
    if inverse:
        matrix = matrix.T * patch_size**num_axes
    return matrix.to(device=device, dtype=dtype)


def patchify(video: Tensor, patch_size: int, method: str, starts: bool = True) -> Tensor:
    """Return the patches [B, p^3 C, 1 + (T - 1) / p, H / p, W / p] of a video [B, C, T, H, W].

    `starts` is False for a chunk that does not begin the clip: it gives T / p patch frames.
    """
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
    """Return the video [B, C, 1 + p (t - 1), h p, w p] of patches [B, p^3 C, t, h, w]; the inverse of `patchify`.

    If `starts` is False, the video has p t frames.
    """
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
    """Return the 2-D Haar wavelet [B, p^2 C, T, H / p, W / p] of a video [B, C, T, H, W].

    The first C channels are the means.
    """
    p = patch_size
    if p == 1:
        return video
    b, c, frames, height, width = video.shape
    h, w = height // p, width // p
    x = video.reshape(b, c, frames, h, p, w, p).permute(0, 4, 6, 1, 2, 3, 5).reshape(b, p**2, c * frames * h * w)
    x = torch.matmul(_matrix_like(p, False, x.device, x.dtype, num_axes=2), x)
    return x.reshape(b, p**2 * c, frames, h, w)


def spatial_unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Return the video [B, C, T, h p, w p] of [B, p^2 C, T, h, w]; the inverse of `spatial_patchify`."""
    p = patch_size
    if p == 1:
        return patches
    b, channels, frames, h, w = patches.shape
    c = channels // p**2
    x = patches.reshape(b, p**2, c * frames * h * w)
    x = torch.matmul(_matrix_like(p, True, x.device, x.dtype, num_axes=2), x)
    return x.view(b, p, p, c, frames, h, w).permute(0, 3, 4, 5, 1, 6, 2).reshape(b, c, frames, h * p, w * p)


def picture_patchify(video: Tensor, patch_size: int) -> Tensor:
    """Return the 2-D Haar wavelet [B, p^2 C, T, H / p, W / p] of a video, the difference along height before that along width."""
    return spatial_patchify(video.mT, patch_size).mT


def picture_unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Return the video [B, C, T, h p, w p] of patches [B, p^2 C, T, h, w]; the inverse of `picture_patchify`."""
    return spatial_unpatchify(patches.mT, patch_size).mT
