"""Pictures and clips in and out: files on one side, uint8 RGB arrays [T, H, W, 3] on the other.

Reading trusts time stamps, not frame counts: a 30 fps or variable-rate clip read at 12 fps is a true 12 fps clip. It
is bounded (pixels, frames, bytes), honours rotation and EXIF orientation, lays transparency on white, and turns any
damaged file into one line. Writing picks the form by suffix and never leaves half a file (see ``lumos.files``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from lumos.errors import RunError, UserError
from lumos.files import check_writable as _check_writable
from lumos.files import replacing, write_json

__all__ = [
    "check_writable",
    "fit",
    "from_uint8",
    "read_image",
    "read_video",
    "to_uint8",
    "write_json",
    "write_video",
]

MAX_PIXELS = 40_000_000  # one picture or one frame of a clip
MAX_FRAMES = 2_000
MAX_CLIP_BYTES = 2 << 30
SUFFIXES = (".mp4", ".gif", ".webp", ".png")
_PILLOW_CLIPS = (".gif", ".webp", ".png", ".apng")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as uint8 [H, W, 3]; UserError if missing, unreadable or larger than ``max_pixels``."""
    with _reading(path, "picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right below
        with Image.open(path) as image:
            _check_pixels(path, image.width, image.height, max_pixels)
            return _rgb(ImageOps.exif_transpose(image))


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    start: float = 0.0,
    from_end: bool = False,
    max_seconds: float | None = None,
    size: tuple[int, int] | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, float]:
    """A clip as (uint8 [T, H, W, 3], fps).

    ``fps``: frame n is what the clip shows at ``start + n / fps`` seconds; None keeps every frame and returns the
    average rate. ``num_frames``: exactly so many (UserError if the clip is shorter), reading stops there; with
    ``from_end`` they are the last ones, ending on the clip's last frame. Without ``num_frames`` the clip is read to its
    end, or for ``max_seconds``. ``size`` (height, width): each frame is fitted as it is read. UserError for a missing
    or damaged file, and for more than ``max_frames`` frames or 2 GiB.
    """
    _check_reading_arguments(path, fps, num_frames, start, from_end, max_seconds, max_frames)
    with _reading(path, "video"):
        clip = _Clip.open(Path(path), max_pixels)
        rate = float(fps or clip.fps)
        if from_end:
            start = clip.start_of_last(num_frames, fps)
        end = float("inf") if max_seconds is None else start + max_seconds
        frames: list[np.ndarray] = []
        wanted = num_frames or max_frames + 1
        budget = MAX_CLIP_BYTES
        for shown in clip.frames(start):
            if shown.begin >= end or len(frames) == wanted:
                break
            if fps is None:
                copies = int(shown.end > start)
            else:
                copies = 0
                while (instant := start + (len(frames) + copies) / fps) < min(shown.end, end):
                    copies += int(instant >= 0)
                    if len(frames) + copies == wanted:
                        break
            if copies:
                picture = shown.rgb()
                frames += [picture if size is None else fit(picture[None], *size)[0]] * copies
                budget -= copies * frames[-1].nbytes
            if len(frames) > max_frames:
                raise UserError(f"{path} has more than {max_frames} frames; set num_frames, max_seconds or a lower fps")
            if budget < 0:
                raise UserError(f"{path} is too large to read at once; set num_frames, max_seconds or a smaller size")
    if not frames or (num_frames is not None and len(frames) < num_frames):
        raise UserError(
            f"{path} has only {len(frames)} frames at {rate:g} fps from {max(start, 0.0):g} s on, "
            f"{num_frames or 1} are needed; ask for fewer, start earlier or raise fps"
        )
    return np.stack(frames), rate
