"""LPIPS, the learned perceptual distance of two pictures (Zhang et al. 2018, arXiv 1801.03924), with AlexNet, version 0.1.

The weights are two files of other projects, which this module reads but never downloads. The
package lpips is not used, because it needs torchvision for one small network, and because it
downloads missing weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lumos.errors import RunError, UserError
from lumos.video.frames import from_uint8

BACKBONE = "alexnet-owt-7be5be79.pth"
"""The file with the weights of torchvision's AlexNet."""
HEADS = "alex.pth"
"""The file with the weights of AlexNet's channels, from the package lpips (lpips/weights/v0.1)."""
MIN_SIDE = 31
"""The least height and width in pixels.

The last features of AlexNet are empty for smaller frames.
"""
_STRIDE_AND_PADDING = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""(stride, padding) of AlexNet's convolutions, by their index in `features`.

A 3 x 3 max pooling of stride 2 comes before the second and before the third.
"""
_TINY = 1e-20
_CHANNELS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def load(folder: str | Path | None, height: int, width: int, device: torch.device) -> Lpips | str:
    """Return the distance for frames of height x width pixels, or a text that says why it cannot be measured.

    folder: the folder of the weights, see `find_weights`. UserError, instead of the text, if a
    folder is given.
    """
    if min(height, width) < MIN_SIDE:
        why = f"LPIPS needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {height} x {width}"
        if folder is not None:
            raise UserError(why)
        return why
    found = find_weights(folder)
    return found if isinstance(found, str) else Lpips(*found, device)


def find_weights(folder: str | Path | None) -> tuple[Path, Path] | str:
    """Return the paths of BACKBONE and HEADS, or a text that says which file is missing.

    The files are searched for in `folder`, or without a folder where torchvision and the package
    lpips keep them. UserError, instead of the text, if a folder is given.
    """
    if folder is not None:
        paths = [_safe_or_given(Path(folder) / name) for name in (BACKBONE, HEADS)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UserError(
                f"{folder} has no {' and no '.join(missing)}; LPIPS needs {BACKBONE} and {HEADS} in one folder, or the same "
                "tensors as .safetensors"
            )
        return paths[0], paths[1]
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    package = importlib.util.find_spec("lpips")
    heads = None if package is None or package.origin is None else Path(package.origin).parent / "weights/v0.1" / HEADS
    place, home = backbone.parent, Path.home()
    # The text goes into result files, which must not name a user.
    shown = f"~/{place.relative_to(home)}" if place.is_relative_to(home) else place
    missing = [] if backbone.is_file() else [f"{BACKBONE} in {shown}, where torchvision keeps it"]
    missing += [] if heads is not None and heads.is_file() else [f"{HEADS}, which the package lpips brings"]
    return f"there is no {', and no '.join(missing)}" if missing else (backbone, heads)


def _safe_or_given(path: Path) -> Path:
    """Return the file with the suffix .safetensors in place of `path` if there is one."""
    safe = path.with_suffix(".safetensors")
    return safe if safe.is_file() else path


class Lpips:
    """The LPIPS distance of two clips, as a callable, and of videos in training.

    RunError if the weights cannot be read or belong to another network.
    """

    def __init__(self, backbone: Path, heads: Path, device: torch.device) -> None:
        features, linear = _read(backbone), _read(heads)
        try:
            self.layers = [
                (features[f"features.{place}.weight"].to(device), features[f"features.{place}.bias"].to(device), *how)
                for place, how in _STRIDE_AND_PADDING.items()
            ]
            self.heads = [linear[f"lin{i}.model.1.weight"].to(device) for i in range(len(_CHANNELS))]
        except KeyError as error:
            raise RunError(f"{backbone} or {heads} holds no {error}; are these the files of AlexNet and of LPIPS 0.1?") from error
        if [head.shape for head in self.heads] != [(1, channels, 1, 1) for channels in _CHANNELS]:
            raise RunError(f"{heads} belongs to another network than AlexNet")
        self.device = device

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return the mean distance of the frames of two clips, uint8 [T, H, W, 3].

        The distance of equal frames is 0.
        """
        frames = [[from_uint8(frame[None])[None].to(self.device) for frame in clip] for clip in (a, b)]
        return sum(self.distances(x, y).item() for x, y in zip(*frames, strict=True)) / len(a)

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean distance of the frames of each pair of videos [B, 3, T, H, W] in [-1, 1], float32 [B], with gradient.

        Frames must have at least MIN_SIDE x MIN_SIDE pixels.
        """
        with torch.autocast(self.device.type, enabled=False):
            pairs = zip(self._features(a), self._features(b), self.heads, strict=True)
            total = sum(F.conv2d((x - y).square(), head).mean(dim=(1, 2, 3)) for x, y, head in pairs)
        return total.view(len(a), -1).mean(dim=1)

    def _features(self, video: Tensor) -> list[Tensor]:
        """Return the features [B T, C, h, w] of the five convolutions for the frames of a video [B, 3, T, H, W].

        The features are normalized: at each position, the vector over channels has length 1.
        """
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x, found = (video.float().transpose(1, 2).flatten(0, 1) - shift) / scale, []
        for index, (weight, bias, stride, padding) in enumerate(self.layers):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            # The epsilon inside the root keeps the gradient finite where all features are 0, as in a black corner.
            found.append(x / (x.square().sum(dim=1, keepdim=True) + _TINY).sqrt())
        return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise any error. PyTorch's own message is not shown, because it advises to unpickle the file.
    except Exception as error:
        raise RunError(f"cannot read {path} as tensors ({type(error).__name__}); copy the file again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RunError(f"{path} holds no tensors by name; copy the file again")
    return found
