"""Clips as animated pictures in memory, for pages of a browser or a notebook."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def data_url(frames: Sequence[np.ndarray], fps: float) -> str:
    """Return frames, uint8 [H, W, 3] each, as an animated WebP in a data URL; one frame gives a picture that does not move."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=85, method=0)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
