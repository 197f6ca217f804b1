"""A least-squares fit of the weights of the last layer that add detail when the size of a tokenizer is doubled.

The last layer is linear in its input features, and so are patches and wavelets. So one choice of the weights for the
differences, which `resizing.double` sets to 0, has the least squared error, and sums over clips are enough to find it.
The codes and the means stay the same, and so does what `resizing.halve` returns.

The error counts the pixels that are shown: of the patches of the first latent frame, one frame (`unpatchify`). Each pixel
of a patch has the mean weight of the patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.resizing import BANDS
from tokenizer.video import VideoTokenizer
from tokenizer.wavelet import patchify, spatial_patchify, unpatchify

_RIDGE = 1e-6
"""Share of the mean squared feature that is added to the diagonal, so that equal features leave the equations solvable."""


class DifferenceFit:
    """The normal equations of the differences in the last layer, in float64 on the CPU. Call `add` with clips, then `solve`.

    `squares` [2, K, K] and `products` [2, K, P, 3 C] are sums over the first latent frames and over the others, for K features
    with the bias, and P coefficients of each of a patch's three differences in C colours.
    """

    def __init__(self, model: VideoTokenizer) -> None:
        self.model = model
        layer, colours = model.decoder.conv_out.conv3d, model.config.in_channels
        features, differences = layer.in_channels + 1, (BANDS - 1) * colours
        self.squares = torch.zeros(2, features, features, dtype=torch.float64)
        self.products = torch.zeros(2, features, layer.out_channels // (BANDS * colours), differences, dtype=torch.float64)

    @torch.no_grad()
    def add(self, video: Tensor, weights: Tensor) -> None:
        """Add clips [B, 3, T, H, W] in [-1, 1]; weights [B, 1, T, H, W] holds the weight of each pixel's squared error."""
        values, _ = self.model.quantize(self.model.encode_latent(video))
        features = self.model.decoder.features(self.model.post_quant_conv(values))
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        wanted = self._patches(video).unflatten(1, (-1, BANDS, video.shape[1]))[:, :, 1:].flatten(1, 3)
        over_patch = self._patches(weights)[:, :1]
        for i, frames in enumerate((slice(1), slice(1, None))):
            parts = (part[:, :, frames].movedim(1, -1).flatten(0, -2) for part in (features, wanted, over_patch))
            x, y, weight = (part.cpu().double() for part in parts)
            self.squares[i] += (weight * x).T @ x
            self.products[i] += ((weight * x).T @ y).view_as(self.products[i])

    @torch.no_grad()
    def solve(self) -> None:
        """Set the weights of the model to those with the least squared error.

        They solve sum_i G_i W S_i = sum_i G_i P_i, where G_i holds the inner products of the pictures that the coefficients
        draw in the frames that are shown. G of the later frames is a multiple of the identity, so in the eigenbasis of the
        first frame's G the rows of W can be solved separately.
        """
        layer = self.model.decoder.conv_out.conv3d
        of_first, of_later = self._shown()
        each = of_later.diagonal().mean()
        values, vectors = torch.linalg.eigh(of_first)
        turned = torch.einsum("pe,ikpd->iked", vectors, self.products)
        squares = values[:, None, None] * self.squares[0] + each * self.squares[1]
        products = (values[:, None] * turned[0] + each * turned[1]).transpose(0, 1)
        ridge = _RIDGE * squares.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(squares.shape[1], dtype=torch.float64)
        solution = torch.einsum("pe,ekd->pdk", vectors, torch.linalg.solve(squares + ridge, products))
        for parameter, found in ((layer.weight, solution[..., :-1]), (layer.bias, solution[..., -1])):
            bands = parameter.unflatten(0, (-1, BANDS, self.model.config.in_channels))
            bands[:, 1:] = found.to(parameter).reshape(bands[:, 1:].shape)

    def _patches(self, video: Tensor) -> Tensor:
        """Return patches of [B, C, T, H, W] as [B, P 4 C, T', H', W'] in the channel order of the last layer.

    The first C channels are the means of a patch.
    """
        config = self.model.config
        return patchify(spatial_patchify(video, config.spatial_patch_size), config.patch_size, config.patch_method)

    def _shown(self) -> tuple[Tensor, Tensor]:
        """Return the inner products [P, P] of the pictures that coefficients draw in the first and in a later latent frame."""
        config, coefficients = self.model.config, self.products.shape[2]
        drawn = torch.eye(coefficients, dtype=torch.float64)[:, :, None, None, None].expand(-1, -1, 2, -1, -1)
        frames = unpatchify(drawn, config.patch_size, config.patch_method)
        first, later = frames[:, :, :1].flatten(1), frames[:, :, 1:].flatten(1)
        return first @ first.T, later @ later.T
