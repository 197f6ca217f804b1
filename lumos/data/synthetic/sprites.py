"""Sprites: small pictures that move in synthetic scenes, 64 Noto emoji (Google, Apache-2.0).

The pictures and their license are in `pictures/sprites`. They come from the npm package
emoji-datasource-google 16.0.0. They are needed to draw clips of sprites and to check such clips, but
not for captions or for a trained model.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lumos.errors import UserError

PICTURES = Path(__file__).parent / "pictures" / "sprites"
SIDE = 64
"""Height and width of a picture in pixels."""

SPRITES = (
    "airplane", "apple", "ball", "balloon", "banana", "bee", "bell", "bicycle", "bus", "butterfly", "cactus", "cake", "car",
    "carrot", "cat", "cookie", "cow", "crab", "crown", "dog", "dolphin", "doughnut", "drum", "duck", "fish", "fox", "frog",
    "ghost", "gift", "guitar", "hamburger", "hammer", "heart", "helicopter", "key", "koala", "ladybug", "lemon", "lion", "moon",
    "mushroom", "octopus", "owl", "panda", "penguin", "pig", "pineapple", "pizza", "pumpkin", "robot", "rocket", "sailboat",
    "snail", "snowman", "star", "strawberry", "sunflower", "tractor", "train", "tree", "trophy", "turtle", "umbrella", "whale",
)  # fmt: skip
"""Names of the sprites."""


def folder() -> Path:
    """Return the folder of the pictures: $LUMOS_SPRITES, or the folder that comes with Lumos."""
    return Path(os.environ.get("LUMOS_SPRITES") or PICTURES)


def load(name: str) -> np.ndarray:
    """Return a sprite as premultiplied RGBA in [0, 1], float32 [SIDE, SIDE, 4], read-only.

    The picture is scaled so that its opaque part fills the square. Raise UserError if its file is
    missing or damaged.
    """
    return _read(folder() / f"{name}.png")


@lru_cache(maxsize=128)
def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            image = _filled(picture.convert("RGBA"))
    except FileNotFoundError:
        raise UserError(
            f"the picture of the sprite {path.stem!r} is missing: {path}. {_remedy()}, or leave sprites out: "
            "kinds [shapes, digits] (data.options.kinds=[shapes,digits] in a training)"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise UserError(f"{path} cannot be read: {error}. {_remedy()}") from error
    pixels = np.asarray(image, np.float32) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)
    pixels.setflags(write=False)
    return pixels


def _remedy() -> str:
    if os.environ.get("LUMOS_SPRITES"):
        return "LUMOS_SPRITES names this folder: unset it to use the pictures that come with Lumos"
    return "This picture comes with Lumos: install Lumos again"


def _filled(image: Image.Image) -> Image.Image:
    """Return the opaque part of a picture in the middle of a square, SIDE x SIDE.

    Raise ValueError if the picture has no opaque part.
    """
    box = image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        raise ValueError("it is empty")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
