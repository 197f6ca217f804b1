"""Handwritten digits: the UCI images that scikit-learn ships (1797 pictures of 8 x 8 pixels, no download)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lumos.errors import UserError

NUM_HELD_OUT = 360
"""The last 360 images are never used in training. The images come writer by writer, so these are other hands."""


@lru_cache(maxsize=1)
def load() -> tuple[np.ndarray, np.ndarray]:
    """All images as ink in [0, 1], float32 [1797, 8, 8], and what each shows, int [1797]. Read-only."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits need scikit-learn, which is not installed: pip install scikit-learn, or leave them out "
            "with kinds=('shapes',)"
        ) from error
    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def image_range(split: str) -> tuple[int, int]:
    """First image and the one after the last of a split: "train", "held_out" or "all"."""
    total = len(load()[1])
    return {"train": (0, total - NUM_HELD_OUT), "held_out": (total - NUM_HELD_OUT, total), "all": (0, total)}[split]
