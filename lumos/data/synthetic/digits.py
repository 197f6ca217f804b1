"""Handwritten digits: 1,797 pictures of 8 x 8 pixels of the UCI repository, in `pictures/digits` with their license."""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from lumos.errors import UserError

PICTURES = Path(__file__).parent / "pictures" / "digits" / "digits.npz"
NUM_HELD_OUT = 360
"""The last 360 images are never used in training. The images come writer by writer, so these are other hands."""


@lru_cache(maxsize=1)
def load() -> tuple[np.ndarray, np.ndarray]:
    """All images as ink in [0, 1], float32 [1797, 8, 8], and the digit that each shows, int64 [1797]. Read-only."""
    try:
        with np.load(PICTURES, allow_pickle=False) as file:
            images, labels = (file["images"] / 16).astype(np.float32), file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the digits {PICTURES} cannot be read: {error}. They come with Lumos: install Lumos again") from error
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def image_range(split: str) -> tuple[int, int]:
    """First image and the one after the last of a split: "train", "held_out" or "all"."""
    total = len(load()[1])
    return {"train": (0, total - NUM_HELD_OUT), "held_out": (total - NUM_HELD_OUT, total), "all": (0, total)}[split]
