"""What is sharp, fitted by least squares: the differences that a tokenizer for twice the size draws beside the means.

The last layer is linear in the features below it, and so are patches and wavelets. So of all weights for the differences
(`resizing.double` begins with zeros) one choice has the least squared error, and sums over clips are all that it takes to find it.
Everything else stays: the codes, the means, and with them what `resizing.halve` gives back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.resizing import BANDS
from tokenizer.video import VideoTokenizer
from tokenizer.wavelet import patchify, spatial_patchify

_RIDGE = 1e-6
"""Of the mean squared feature: keeps the equations solvable where features are the same."""


class DifferenceFit:
    """Normal equations of the last layer's differences, in float64 on the CPU; `add` clips, then `solve`."""

    def __init__(self, model: VideoTokenizer) -> None:
        self.model = model
        layer = model.decoder.conv_out.conv3d
        self.squares = torch.zeros(layer.in_channels + 1, layer.in_channels + 1, dtype=torch.float64)
        self.products = torch.zeros(layer.in_channels + 1, layer.out_channels * (BANDS - 1) // BANDS, dtype=torch.float64)

    @torch.no_grad()
    def add(self, video: Tensor, weights: Tensor) -> None:
        """Video [B, 3, T, H, W] in [-1, 1] and the weight of each pixel's squared error, [B, 1, T, H, W]."""
        values, _ = self.model.quantize(self.model.encode_latent(video))
        features = self.model.decoder.features(self.model.post_quant_conv(values))
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        wanted = self._patches(video).unflatten(1, (-1, BANDS, video.shape[1]))[:, :, 1:].flatten(1, 3)
        over_patch = self._patches(weights)[:, :1]
        x, y, weight = (part.movedim(1, -1).flatten(0, -2).cpu().double() for part in (features, wanted, over_patch))
        self.squares += (weight * x).T @ x
        self.products += (weight * x).T @ y

    @torch.no_grad()
    def solve(self) -> None:
        """Put the weights of least squared error into the model."""
        layer = self.model.decoder.conv_out.conv3d
        ridge = _RIDGE * self.squares.diagonal().mean() * torch.eye(len(self.squares), dtype=torch.float64)
        solution = torch.linalg.solve(self.squares + ridge, self.products).T
        for parameter, found in ((layer.weight, solution[:, :-1, None, None, None]), (layer.bias, solution[:, -1])):
            bands = parameter.unflatten(0, (-1, BANDS, self.model.config.in_channels))
            bands[:, 1:] = found.to(parameter).unflatten(0, bands[:, 1:].shape[:3])

    def _patches(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, P 4 C, T', H', W'], ordered as the last layer's channels; the first C are means over a patch."""
        config = self.model.config
        return patchify(spatial_patchify(video, config.spatial_patch_size), config.patch_size, config.patch_method)
