"""The shape of the clips that a model makes when not told otherwise, and the file that holds its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from lumos.errors import UserError, shown
from lumos.models.lumos1.settings import CLIP_LIMITS

DEFAULTS_FILE = "pipeline.json"


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, float)


@dataclass(frozen=True)
class ClipDefaults:
    """What a model makes when not told otherwise; the defaults are those of the released 384p checkpoints.

    num_frames  RGB frames, 1 + a multiple of the temporal compression
    height, width, fps  pixels, pixels, frames per second
    target_size  given pictures choose the size from this area's buckets (reference, section 8.2); None: height x width
    """

    num_frames: int = 25
    height: int = 384
    width: int = 672
    fps: int = 12
    target_size: int | None = 528

    def __post_init__(self) -> None:
        for name, most in CLIP_LIMITS.items():
            value = getattr(self, name)
            if not (value is None and name == "target_size") and not (is_whole(value) and 1 <= value <= most):
                or_null = ", or null" if name == "target_size" else ""
                raise UserError(
                    f"{name} {shown(value)} is not allowed; give a whole number of at least 1, at most {most:,}{or_null}"
                )
