"""Handwritten digits: 1,797 images of 8 x 8 pixels from the UCI Machine Learning Repository.

The images and their license are in `pictures/digits`.
"""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from lumos.errors import UserError

PICTURES = Path(__file__).parent / "pictures" / "digits" / "digits.npz"
NUM_HELD_OUT = 360
"""Number of images, the last ones, that training never uses. The images are sorted by writer, so these images
are by other writers."""


@lru_cache(maxsize=1)
def load() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, float32 [1797, 8, 8] in [0, 1] (1 is ink), and their digits, int64 [1797].

    The arrays are read-only. Raise UserError if the file cannot be read.
    """
    try:
        with np.load(PICTURES, allow_pickle=False) as file:
            images, labels = (file["images"] / 16).astype(np.float32), file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the digits {PICTURES} cannot be read: {error}. They come with Lumos: install Lumos again") from error
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def image_range(split: str) -> tuple[int, int]:
    """Return (first, last + 1) of the images of a split: "train", "held_out" or "all"."""
    total = len(load()[1])
    return {"train": (0, total - NUM_HELD_OUT), "held_out": (total - NUM_HELD_OUT, total), "all": (0, total)}[split]
