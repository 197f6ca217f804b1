"""The limits of what a visitor may ask for and of what the server keeps.

Each limit is a field of `Limits` and a flag of `python -m lumos demo`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.errors import RunError, UserError
from lumos.settings import is_number

if TYPE_CHECKING:
    from lumos.demo.reading import Allowed
    from lumos.pipeline.defaults import ClipDefaults
    from lumos.pipeline.options import SamplingOptions
    from lumos.pipeline.request import Request

FORM_BYTES = 2**20  # most bytes of a request's body without its file


class TooLarge(UserError):
    """An upload is larger than its limit."""


class ServerBusy(RunError):
    """The server cannot take the request now, for example because the queue is full.

    seconds: when the client may try again.
    """

    def __init__(self, message: str, seconds: int = 5):
        super().__init__(message)
        self.seconds = seconds


def bound(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """The limits of the page and of the API.

    A limit that is None is set from the model by `of_model`.
    """

    max_prompt_length: int = bound(500, "most characters of a prompt, and of a negative prompt")
    max_frames: int | None = bound(None, "most frames of a clip, given frames included; default: 2 n - 1 for the model's default n")
    max_side: int | None = bound(None, "most pixels of a clip's height and width; default: the longer side of the model's default")
    max_steps: int = bound(100, "most decoding steps of each latent frame, or steps of the solver of STIV")
    max_upload_mb: float = bound(20, "most megabytes of an uploaded file")
    max_upload_seconds: float = bound(60, "most seconds that an uploaded clip may last")
    max_upload_megapixels: float = bound(25, "most megapixels of an uploaded picture, and of a frame of an uploaded clip")
    max_reading_seconds: float = bound(20, "most seconds that reading an upload may take")
    max_reading_mb: int = bound(2048, "most megabytes of memory that reading an upload may take")
    queue_length: int = bound(8, "most requests that wait; further requests are refused")
    keep_uploads_mb: float = bound(1000, "most megabytes of uploads, also of those still arriving; old uploads are removed")
    keep_results: int = bound(200, "most results on the disk; the oldest is removed first, but not before its delivery")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            allowed = is_number(value) and isfinite(value) and (value >= 1 or (value > 0 and entry.type == "float"))
            if value is not None and not allowed:
                least = "a number above 0" if entry.type == "float" else "a whole number of at least 1"
                raise UserError(f"--{entry.name.replace('_', '-')} {value} is not allowed; give {least}")
        if self.keep_uploads_mb < self.max_upload_mb:
            raise UserError(
                f"--keep-uploads-mb {self.keep_uploads_mb:g} holds not even one upload of --max-upload-mb {self.max_upload_mb:g}; "
                "raise it, or lower the other"
            )

    def of_model(self, clip: ClipDefaults, sampling: SamplingOptions) -> Limits:
        """Return a copy in which the defaults of the model replace None.

        UserError if the defaults of the model exceed a limit.
        """
        side = max(clip.height, clip.width)
        limits = replace(self, max_frames=self.max_frames or 2 * clip.num_frames - 1, max_side=self.max_side or side)
        for name, own in (("max_frames", clip.num_frames), ("max_side", side), ("max_steps", sampling.num_inference_steps)):
            if getattr(limits, name) < own:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(limits, name)} is less than the model's own {own}; give at least that")
        return limits

    @property
    def of_reading(self) -> Allowed:
        from lumos.demo.reading import Allowed

        return Allowed(
            self.max_reading_seconds, int(self.max_upload_megapixels * 1e6), self.max_reading_mb, self.max_upload_seconds
        )

    @property
    def upload_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)

    def check(self, request: Request) -> None:
        """Raise UserError if a value of the request is out of bounds, TooLarge for an upload that is too large."""
        from lumos.pipeline.inputs import check_prompt
        from lumos.pipeline.request import needs_words

        check_prompt(request.prompt, needs_words(request.interpolate, request.views))
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(request, name) or "")
            if length > self.max_prompt_length:
                raise UserError(f"{name} has {length} characters; at most {self.max_prompt_length} are allowed: shorten it")
        for name, most in (
            ("num_frames", self.max_frames),
            ("height", self.max_side),
            ("width", self.max_side),
            *((name, self.max_steps) for name in request.options if name.endswith("steps")),
        ):
            value = request.options.get(name, getattr(request, name, None))
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name} {value} is not allowed here; give 1 to {most}")
        for upload in (request.image, request.video, request.last_image):
            if upload is not None and (size := Path(upload).stat().st_size) > self.upload_bytes:
                raise TooLarge(
                    f"{Path(upload).name} has {size / 2**20:.3g} MB; at most {self.max_upload_mb:g} MB are allowed: make it smaller"
                )
