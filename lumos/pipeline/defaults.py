"""The shape of the clips that a model makes when not told otherwise, and the file that holds its defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lumos.errors import UserError, shown
from lumos.settings import is_whole

DEFAULTS_FILE = "pipeline.json"
SHIPPED_MODEL = "checkpoints/lumos-tiny"
MAX_FRAMES = 1_000_000
MAX_SIDE = 2**14
CLIP_LIMITS = {"num_frames": MAX_FRAMES, "height": MAX_SIDE, "width": MAX_SIDE, "fps": 1000, "target_size": MAX_SIDE}
"""The most that a clip may be asked for, whatever the model; what a model can make is its config's matter."""


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

    def scaled(self, after: int, before: int) -> ClipDefaults:
        """The clip with all sides times after / before."""
        sides = {name: getattr(self, name) for name in ("height", "width", "target_size")}
        return replace(self, **{name: side and side * after // before for name, side in sides.items()})


def shipped_model() -> Path:
    """The model in the repository, from its root or from anywhere when installed in place."""
    here = Path(SHIPPED_MODEL)
    return here if here.is_dir() else Path(__file__).parents[2] / SHIPPED_MODEL
