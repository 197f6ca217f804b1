"""LPIPS, the learned perceptual distance of two pictures (Zhang et al. 2018, arXiv 1801.03924): AlexNet, version 0.1.

Its weights are two files that other projects publish, and they are only read, never fetched. The computation is written out
here because the package lpips needs torchvision for one small network and downloads what it does not find.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lumos.errors import RunError, UserError

BACKBONE = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet."""
HEADS = "alex.pth"
"""The weights of its channels, from the package lpips (lpips/weights/v0.1)."""
MIN_SIDE = 31
"""Pixels below which AlexNet's last features are empty."""
_STRIDE_AND_PADDING = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""Of AlexNet's convolutions, by their place in `features`. The second and third come after a 3 x 3 maximum of stride 2."""
_CHANNELS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def load(folder: str | Path | None, height: int, width: int, device: torch.device) -> Lpips | str:
    """The distance of frames of that size, with the weights of `find_weights`; else why it cannot be measured.

    UserError if a folder is given and it cannot.
    """
    if min(height, width) < MIN_SIDE:
        why = f"LPIPS needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {height} x {width}"
        if folder is not None:
            raise UserError(why)
        return why
    found = find_weights(folder)
    return found if isinstance(found, str) else Lpips(*found, device)


def find_weights(folder: str | Path | None) -> tuple[Path, Path] | str:
    """Paths of BACKBONE and HEADS: in `folder`, or where torchvision and lpips keep them; else what is missing.

    UserError if a folder is given that lacks one.
    """
    if folder is not None:
        paths = Path(folder) / BACKBONE, Path(folder) / HEADS
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UserError(f"{folder} has no {' and no '.join(missing)}; LPIPS needs {BACKBONE} and {HEADS} in one folder")
        return paths
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    package = importlib.util.find_spec("lpips")
    heads = None if package is None or package.origin is None else Path(package.origin).parent / "weights/v0.1" / HEADS
    place, home = backbone.parent, Path.home()
    shown = f"~/{place.relative_to(home)}" if place.is_relative_to(home) else place  # a result names no user
    missing = [] if backbone.is_file() else [f"{BACKBONE} in {shown}, where torchvision keeps it"]
    missing += [] if heads is not None and heads.is_file() else [f"{HEADS}, which the package lpips brings"]
    return f"there is no {', and no '.join(missing)}" if missing else (backbone, heads)


class Lpips:
    """The distance as a function of two clips."""

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
        """Mean distance of the frames of two clips uint8 [T, H, W, 3]; 0 is the same picture."""
        total = 0.0
        for first, second in zip(a, b, strict=True):
            for x, y, head in zip(self._features(first), self._features(second), self.heads, strict=True):
                total += F.conv2d((x - y).square(), head).mean().item()
        return total / len(a)

    def _features(self, frame: np.ndarray) -> list[Tensor]:
        """uint8 [H, W, 3] -> features [1, C, h, w] of the five convolutions, of length one in every place."""
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x = torch.tensor(frame, device=self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        x, found = (x - shift) / scale, []
        for index, (weight, bias, stride, padding) in enumerate(self.layers):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file anything, and PyTorch's advice would be to unpickle it
        raise RunError(f"cannot read {path} as tensors ({type(error).__name__}); copy the file again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RunError(f"{path} holds no tensors by name; copy the file again")
    return found
