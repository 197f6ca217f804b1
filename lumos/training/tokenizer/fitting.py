"""Fits by least squares the weights of the last layer that add detail when the size of a tokenizer is doubled.

The last layer is linear in the features below it, and so are patches and wavelets. So of all weights for the differences
(`resizing.double` begins with zeros) one choice has the least squared error, and sums over clips are all that it takes to find it.
Everything else stays: the codes, the means, and with them what `resizing.halve` gives back.

The error is that of the pixels that are shown: of the first latent frame's patches one frame (`unpatchify`). All of a patch's
pixels weigh what they weigh on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.resizing import BANDS
from tokenizer.video import VideoTokenizer
from tokenizer.wavelet import patchify, spatial_patchify, unpatchify

_RIDGE = 1e-6
"""Of the mean squared feature: keeps the equations solvable where features are the same."""


class DifferenceFit:
    """Normal equations of the last layer's differences, in float64 on the CPU; `add` clips, then `solve`.

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
        """Video [B, 3, T, H, W] in [-1, 1] and the weight of each pixel's squared error, [B, 1, T, H, W]."""
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
        """Put the weights of least squared error into the model.

        They solve sum_i G_i W S_i = sum_i G_i P_i, where G_i are the products of what the coefficients draw in the frames that are
        shown. G of the later frames is a multiple of the identity, so in the eigenbasis of the first frame's G the rows of W
        can be solved separately.
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
        """[B, C, T, H, W] -> [B, P 4 C, T', H', W'], ordered as the last layer's channels; the first C are means over a patch."""
        config = self.model.config
        return patchify(spatial_patchify(video, config.spatial_patch_size), config.patch_size, config.patch_method)

    def _shown(self) -> tuple[Tensor, Tensor]:
        """Products [P, P] of what each coefficient of a patch draws, over the pixels of its first and of a later latent frame."""
        config, coefficients = self.model.config, self.products.shape[2]
        drawn = torch.eye(coefficients, dtype=torch.float64)[:, :, None, None, None].expand(-1, -1, 2, -1, -1)
        frames = unpatchify(drawn, config.patch_size, config.patch_method)
        first, later = frames[:, :, :1].flatten(1), frames[:, :, 1:].flatten(1)
        return first @ first.T, later @ later.T
