"""Functions that both checkers use: the check of a clip, and the choice of the word for a motion."""

from __future__ import annotations

import numpy as np

from lumos.data.synthetic.sampling import SPEED
from lumos.data.synthetic.scene import DIRECTIONS, GROWTH
from lumos.errors import UserError

MAX_BACKGROUND_DISTANCE = 50.0
"""The most colour distance (Euclidean in RGB, 0 to 255) of a background from its palette colour."""
MAX_STILL_WAY = 9.0
"""The most pixels, at 64 x 64, that an object may move in a clip of any length and still count as still."""


def as_clip(video: np.ndarray) -> np.ndarray:
    """Return the video as an array; UserError if it is not uint8 [T, H, W, 3] with at least one pixel."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise UserError(f"video {video.dtype} {list(video.shape)} cannot be checked: give uint8 [T, H, W, 3]")
    return video


def line_ends(frames: np.ndarray, values: np.ndarray, num_frames: int) -> tuple[float, float]:
    """Fit a straight line to the values by least squares, and return its values at the first and last frame of the clip.

    frames: the numbers of the frames in which the values were measured; num_frames: the number of
    frames of the clip.
    """
    if len(frames) == 1:
        return float(values[0]), float(values[0])
    slope, start = np.polyfit(frames, values, 1)
    return float(start), float(start + slope * (num_frames - 1))


def motion_word(way: tuple[float, float], growth: float, num_frames: int, scale: float) -> str:
    """Return the word for a motion, one of MOTIONS or "unclear".

    way: displacement (x, y) in pixels from the first to the last frame. growth: the last size
    divided by the first. scale: the shorter side of the frame divided by 64. The limits lie halfway
    between no change and the least change of a synthetic scene.
    """
    dx, dy = way
    long, short = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    moved = long > min(0.5 * SPEED[0] * (num_frames - 1), MAX_STILL_WAY) * scale
    change = next((word for word, g in GROWTH.items() if (growth > g**0.5 if g > 1 else growth < g**0.5)), None)
    if num_frames == 1 or (not moved and change is None):
        return "still"
    if moved and (change is not None or short > 0.5 * long):
        return "unclear"
    return change or max(DIRECTIONS, key=lambda word: dx * DIRECTIONS[word][0] + dy * DIRECTIONS[word][1])
