"""What the checkers share: the clips that they take, and the word for a motion."""

from __future__ import annotations

import numpy as np

from lumos.data.synthetic.render import SPEED
from lumos.data.synthetic.scene import DIRECTIONS, GROWTH
from lumos.errors import UserError

MAX_BACKGROUND_DISTANCE = 50.0
MAX_STILL_WAY = 9.0


def as_clip(video: np.ndarray) -> np.ndarray:
    """The video, if it is a clip; UserError else."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise UserError(f"video {video.dtype} {list(video.shape)} cannot be checked: give uint8 [T, H, W, 3]")
    return video


def line_ends(frames: np.ndarray, values: np.ndarray, num_frames: int) -> tuple[float, float]:
    """First and last value of the straight line through the values, least squares."""
    if len(frames) == 1:
        return float(values[0]), float(values[0])
    slope, start = np.polyfit(frames, values, 1)
    return float(start), float(start + slope * (num_frames - 1))


def motion_word(way: tuple[float, float], growth: float, num_frames: int, scale: float) -> str:
    """The word for a motion. The limits lie halfway between what the world shows and no change."""
    dx, dy = way
    long, short = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    moved = long > min(0.5 * SPEED[0] * (num_frames - 1), MAX_STILL_WAY) * scale
    change = next((word for word, g in GROWTH.items() if (growth > g**0.5 if g > 1 else growth < g**0.5)), None)
    if num_frames == 1 or (not moved and change is None):
        return "still"
    if moved and (change is not None or short > 0.5 * long):
        return "unclear"
    return change or max(DIRECTIONS, key=lambda word: dx * DIRECTIONS[word][0] + dy * DIRECTIONS[word][1])
