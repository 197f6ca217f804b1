"""Small pictures that move in the small worlds: 64 Noto emoji (Google, Apache-2.0), known by name.

They are not part of this project. `python -m lumos fetch-sprites` takes them from the npm package
emoji-datasource-google and puts them where `load` finds them; only making clips of them needs the pictures, their
captions and a trained model do not.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lumos.errors import UserError
from lumos.files import user_cache

PACKAGE = "emoji-datasource-google@16.0.0"
SIDE = 64
"""Pixels of a picture's side."""

SPRITES = {
    "airplane": "2708-fe0f", "apple": "1f34e", "ball": "26bd", "balloon": "1f388", "banana": "1f34c", "bee": "1f41d",
    "bell": "1f514", "bicycle": "1f6b2", "bus": "1f68c", "butterfly": "1f98b", "cactus": "1f335", "cake": "1f382",
    "car": "1f697", "carrot": "1f955", "cat": "1f431", "cookie": "1f36a", "cow": "1f42e", "crab": "1f980",
    "crown": "1f451", "dog": "1f436", "dolphin": "1f42c", "doughnut": "1f369", "drum": "1f941", "duck": "1f986",
    "fish": "1f41f", "fox": "1f98a", "frog": "1f438", "ghost": "1f47b", "gift": "1f381", "guitar": "1f3b8",
    "hamburger": "1f354", "hammer": "1f528", "heart": "2764-fe0f", "helicopter": "1f681", "key": "1f511", "koala": "1f428",
    "ladybug": "1f41e", "lemon": "1f34b", "lion": "1f981", "moon": "1f319", "mushroom": "1f344", "octopus": "1f419",
    "owl": "1f989", "panda": "1f43c", "penguin": "1f427", "pig": "1f437", "pineapple": "1f34d", "pizza": "1f355",
    "pumpkin": "1f383", "robot": "1f916", "rocket": "1f680", "sailboat": "26f5", "snail": "1f40c", "snowman": "26c4",
    "star": "2b50", "strawberry": "1f353", "sunflower": "1f33b", "tractor": "1f69c", "train": "1f682", "tree": "1f333",
    "trophy": "1f3c6", "turtle": "1f422", "umbrella": "2602-fe0f", "whale": "1f433",
}  # fmt: skip
"""Name of a sprite -> Unicode code points, which name its file in the package."""


def folder() -> Path:
    """Where the pictures are: $LUMOS_SPRITES, or lumos/sprites in the user's cache folder."""
    return Path(os.environ.get("LUMOS_SPRITES") or user_cache("sprites"))


def load(name: str) -> np.ndarray:
    """A sprite as premultiplied RGBA in [0, 1], float32 [SIDE, SIDE, 4], its ink filling the square. Read-only."""
    return _read(folder() / f"{name}.png")


@lru_cache(maxsize=128)
def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            image = _filled(picture.convert("RGBA"))
    except FileNotFoundError:
        raise UserError(
            f"the picture of the sprite {path.stem!r} is missing: {path}. Fetch all with `python -m lumos fetch-sprites`, or "
            "leave sprites out: kinds [shapes, digits] (data.options.kinds=[shapes,digits] in a training)"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise UserError(f"{path} cannot be read: {error}; fetch it again with `python -m lumos fetch-sprites`") from error
    pixels = np.asarray(image, np.float32) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)
    pixels.setflags(write=False)
    return pixels


def _filled(image: Image.Image) -> Image.Image:
    """The inked part in the middle of a square, SIDE x SIDE."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        raise ValueError("it is empty")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
