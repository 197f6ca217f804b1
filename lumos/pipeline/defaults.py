"""The default shape of a model's clips, its limits, and the file that holds it with the default sampling options."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lumos.errors import UserError, as_text, instead, shown
from lumos.files import read_json, write_json
from lumos.settings import is_whole
from lumos.shipped import shipped_folder

if TYPE_CHECKING:
    from lumos.pipeline.options import SamplingOptions

Options = TypeVar("Options", bound="SamplingOptions")

DEFAULTS_FILE = "pipeline.json"
MAX_DEFAULTS_BYTES = 2**20
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


def read_defaults(folder: Path, options: type[Options], clip: ClipDefaults = ClipDefaults()) -> tuple[Options, ClipDefaults]:
    """Return the defaults in the folder's pipeline.json, or `options()` and `clip` if there is no such file.

    options: the generator's sampling options. Raises UserError for a file that is damaged or has unknown or
    wrong settings.
    """
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return options(), clip
    stored = read_json(file, "a model's defaults", MAX_DEFAULTS_BYTES)
    if not isinstance(stored, dict):
        raise UserError(f"{file} must hold a JSON object of settings, not a {type(stored).__name__}")
    parts = [{f.name: stored.pop(f.name) for f in fields(c) if f.name in stored} for c in (options, ClipDefaults)]
    if wrong := next(iter(stored), None):
        names = [f.name for c in (options, ClipDefaults) for f in fields(c)]
        raise UserError(f"{file} has the unknown setting {as_text(wrong)}{instead(wrong, names)}")
    try:
        return options(**parts[0]), ClipDefaults(**parts[1])
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def write_defaults(folder: Path, settings: SamplingOptions, clip: ClipDefaults) -> None:
    """Write the defaults to the folder's pipeline.json."""
    write_json(folder / DEFAULTS_FILE, {**vars(settings), **vars(clip)})


def shipped_model() -> Path:
    """Return the path of the model that comes with Lumos.

    The path is relative if the working directory is the root of the repository, else absolute.
    """
    return shipped_folder(SHIPPED_MODEL)
