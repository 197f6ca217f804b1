"""The default shape of a model's clips, its limits, and the file that holds it."""

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
"""The largest values for any model. The config of a model may set lower limits."""


@dataclass(frozen=True)
class ClipDefaults:
    """The default shape of a model's clips. The values below are those of the released 384p checkpoints.

    num_frames     RGB frames, 1 + a multiple of the temporal compression
    height, width  pixels
    fps            frames per second
    target_size    side of a square in pixels. A given picture then selects, from the buckets of this area, the height and width
                   that fit its aspect ratio (reference, section 8.2). None: the clip has height x width.
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
        """Return a copy with height, width and target_size multiplied by after / before."""
        sides = {name: getattr(self, name) for name in ("height", "width", "target_size")}
        return replace(self, **{name: side and side * after // before for name, side in sides.items()})


def shipped_model() -> Path:
    """Return the path of the model in the repository.

    The path is relative if the working directory is the root of the repository, else absolute,
    which works for an installation in place (`pip install -e`).
    """
    here = Path(SHIPPED_MODEL)
    return here if here.is_dir() else Path(__file__).parents[2] / SHIPPED_MODEL
