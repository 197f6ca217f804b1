"""Change a video tokenizer so that it decodes the same codes to twice or half the height and width.

A large picture can be split into a picture of half the size, the means of its 2 x 2 pixels, and three
differences for each mean (`wavelet.spatial_patchify`). A tokenizer for the large size is therefore a
tokenizer for the half size whose first and last layer have three more channels for each channel.

`double` adds these channels with zero weights: the codes depend on the means only, and the decoded
picture is no sharper than before until the tokenizer is trained further. `halve` removes the
channels: the result decodes exactly the means of the larger picture, before pixels are clamped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from lumos.errors import UserError, shown
from tokenizer.configuration import PRUNED_FIELDS, VideoTokenizerConfig
from tokenizer.video import VideoTokenizer

BANDS = 4
"""The mean and the three differences of 2 x 2 pixels."""
_ENDS = {
    "encoder.conv_in.conv3d.weight": (1, "in_channels"),
    "decoder.conv_out.conv3d.weight": (0, "out_channels"),
    "decoder.conv_out.conv3d.bias": (0, "out_channels"),
}
"""The weights next to the patches: (their axis of patch channels x colours, the config field with the number of colours)."""


def double(model: VideoTokenizer) -> VideoTokenizer:
    """Return a tokenizer for twice the height and width.

    Raises UserError unless the model has pointwise ends, Haar patches and spatial_patch_size 1.
    """
    _check(model.config, spatial_patch_size=1)
    return _resized(model, 2, _add_bands)


def halve(model: VideoTokenizer) -> VideoTokenizer:
    """Return a tokenizer for half the height and width.

    Raises UserError unless the model has pointwise ends, Haar patches and spatial_patch_size 2.
    """
    _check(model.config, spatial_patch_size=2)
    return _resized(model, 1, _means_only)


def same_codes(a: VideoTokenizer, b: VideoTokenizer) -> bool:
    """Return whether both tokenizers encode the same pictures to the same codes, each at its own size.

    This is so if the encoders are equal, or if one is the other after `double`. Weights are compared
    after rounding to float16 or bfloat16, because one of the tokenizers may have been stored so.
    """
    sizes = [model.config.spatial_patch_size for model in (a, b)]
    a, b = (double(model) if size < max(sizes) else model for model, size in zip((a, b), sizes, strict=True))
    parts = [
        {name: weight.float() for name, weight in model.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for model in (a, b)
    ]
    not_of_codes = {name: getattr(b.config, name) for name in ("dropout", *PRUNED_FIELDS)}
    same_network = dataclasses.replace(a.config, **not_of_codes) == b.config
    return same_network and any(
        all(torch.equal(weight.to(dtype), parts[1][name].to(dtype)) for name, weight in parts[0].items())
        for dtype in (torch.float16, torch.bfloat16)
    )


def _check(config: VideoTokenizerConfig, spatial_patch_size: int) -> None:
    wanted = {"spatial_patch_size": spatial_patch_size, "pointwise_ends": True, "patch_method": "haar"}
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise UserError(f"this video tokenizer cannot be made {'half' if spatial_patch_size == 2 else 'twice'} its size: its "
                            f"{name} is {shown(found)}, where {shown(value)} is needed")  # fmt: skip


def _resized(model: VideoTokenizer, patch_size: int, change: Callable[[Tensor, int, int], Tensor]) -> VideoTokenizer:
    """Return a copy with spatial patches of `patch_size`, sizes in proportion and changed weights next to the patches."""
    before = model.config
    config = dataclasses.replace(
        before,
        spatial_patch_size=patch_size,
        spatial_compression=before.spatial_compression * patch_size // before.spatial_patch_size,
        resolution=before.resolution * patch_size // before.spatial_patch_size,
    )
    tensors = dict(model.state_dict())
    for name, (axis, colours) in _ENDS.items():
        tensors[name] = change(tensors[name], axis, getattr(config, colours))
    with torch.device("meta"):
        resized = VideoTokenizer(config)
    resized.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return resized.eval().requires_grad_(False)


def _add_bands(weight: Tensor, axis: int, colours: int) -> Tensor:
    means = weight.unflatten(axis, (-1, 1, colours))
    shape = [size if i != axis + 1 else BANDS - 1 for i, size in enumerate(means.shape)]
    return torch.cat([means, means.new_zeros(shape)], dim=axis + 1).flatten(axis, axis + 2)


def _means_only(weight: Tensor, axis: int, colours: int) -> Tensor:
    return weight.unflatten(axis, (-1, BANDS, colours)).select(axis + 1, 0).flatten(axis, axis + 1)
