"""One item to rows of codes: the function that every engine of `ingest` maps over the items."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumos.data.buckets import bucket_for
from lumos.data.ingest.item import TOO_SHORT, Item, as_text, problem_of, problem_of_file
from lumos.data.ingest.manifest import as_file
from lumos.data.shards import format as shards
from lumos.errors import UserError
from lumos.runtime import pick_device
from lumos.video.frames import fit, from_uint8
from lumos.video.reading import count_frames, read_image, read_video
from tokenizer import VideoTokenizer

TARGET_SIZES = {"256p": 352, "384p": 528, "480p": 656}  # reference, section 8.2


@dataclass(frozen=True)
class ClipSettings:
    """What a clip is. A folder of shards holds clips of one such setting.

    `fps` frames a second, `size` 256p, 384p, 480p (buckets by aspect ratio) or HEIGHTxWIDTH, `num_frames` of a clip, at
    least `min_frames` from a video that has fewer (None: such a video is skipped), up to `clips_per_video` from a long one.
    """

    fps: int = 12
    size: str = "256p"
    num_frames: int = 25
    min_frames: int | None = None
    clips_per_video: int = 1

    def check(self, tokenizer: VideoTokenizer) -> None:
        """UserError for what cannot be encoded."""
        step, stride = tokenizer.temporal_compression, tokenizer.spatial_compression
        for name in ("num_frames", "min_frames"):
            value = getattr(self, name)
            if value is not None and (value < 1 or (value - 1) % step):
                raise UserError(f"{name} {value} is not allowed; it must be 1 + a multiple of {step}")
        if self.min_frames is not None and self.min_frames > self.num_frames:
            raise UserError(f"min_frames {self.min_frames} is above num_frames {self.num_frames}")
        if self.clips_per_video < 1:
            raise UserError(f"clips_per_video {self.clips_per_video} is not allowed; give at least 1")
        if not 1 <= self.fps <= 1000:
            raise UserError(f"fps {self.fps} is not allowed; it must be 1 to 1000")
        height, width = self.target(1, 1)
        if height % stride or width % stride or not height or not width:
            raise UserError(f"size {self.size}: height and width must be multiples of {stride}")
        if tokenizer.num_codes > 1 << 16:
            raise UserError(f"the tokenizer has {tokenizer.num_codes} codes; shards hold at most {1 << 16}")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which a picture of this size is fitted."""
        if self.size in TARGET_SIZES:
            return bucket_for(height, width, TARGET_SIZES[self.size])
        if not re.fullmatch(r"\d{1,5}x\d{1,5}", self.size):
            raise UserError(f"size {self.size!r} is unknown; allowed: {', '.join(TARGET_SIZES)} or HEIGHTxWIDTH, for example 64x64")
        down, across = self.size.split("x")
        return int(down), int(across)


class Skip(Exception):
    """An item that gives no clip: `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


Result = list[dict[str, Any]] | Skip
"""The rows of an item's clips, or why there are none."""


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker needs to know to do :func:`ingest_item`; `device` None is a GPU if the worker has one."""

    tokenizer: str
    settings: ClipSettings
    device: str | None


class Encoder:
    """`ingest_item` with its tokenizer loaded: what each worker holds."""

    def __init__(self, spec: EncoderSpec):
        self.settings = spec.settings
        self.tokenizer = VideoTokenizer.from_pretrained(spec.tokenizer, device=str(pick_device(spec.device)))

    def __call__(self, item: Item) -> Result:
        return ingest_item(item, self.settings, self.tokenizer)


@torch.no_grad()
def ingest_item(item: Item, settings: ClipSettings, tokenizer: VideoTokenizer) -> Result:
    """Decode, fit to the bucket and encode one item: what every engine maps over the items.

    Whatever odd data does to a reader is a skip; an error that no data explains is a bug, and raised.
    """
    try:
        if problem := item.problem or problem_of_file(item.path):
            return Skip(*problem)
        with as_file(item) as file:
            clips = _clips(item, file, settings, tokenizer.temporal_compression)
            # One at a time: all clips of a long video at once would take as much memory as the video.
            return [_row(item, number, *clip, settings, tokenizer) for number, clip in enumerate(clips)]
    except Skip as skip:
        return skip
    except Exception as error:
        problem = problem_of(error)
        if problem is None:
            raise
        return Skip(*problem)


def _row(
    item: Item, number: int, start: float, frames: np.ndarray, settings: ClipSettings, tokenizer: VideoTokenizer
) -> dict[str, Any]:
    """The row of a clip of uint8 frames [T, H, W, 3] that begins at `start` seconds."""
    video = from_uint8(frames[None]).to(next(tokenizer.parameters()))  # [1, 3, T, H, W]
    codes = tokenizer.encode(video)[0].cpu().numpy().astype(np.uint16)  # [t, h, w]
    count, height, width = frames.shape[:3]
    row = {
        "id": item.id, "clip": number, "codes": codes, "num_frames": count, "height": height, "width": width,
        "fps": settings.fps if count > 1 else 1, "caption": item.caption,
        "source": as_text(f"{item.path}/{item.member}" if item.member else item.path), "start": start,
    }  # fmt: skip
    return row | {"checksum": shards.checksum(row)}


def _clips(item: Item, file: Path, settings: ClipSettings, step: int) -> Iterator[tuple[float, np.ndarray]]:
    """(start in s, frames uint8 [T, H, W, 3]) of each clip, read when it is asked for; all of one item have one size."""
    total = 1 if item.is_picture else count_frames(file, settings.fps)
    if item.is_picture and file.suffix.lower() in (".png", ".webp"):  # may be animated
        total = count_frames(file, settings.fps)
    if item.is_picture and total == 1:
        frames = read_image(file)[None]
        yield 0.0, fit(frames, *settings.target(*frames.shape[1:3]))
        return
    available = total - item.start * settings.fps
    if item.end is not None:
        available = min(available, (item.end - item.start) * settings.fps)
    available = int(max(available, 0) + 1e-3)
    count = settings.num_frames
    if available < count:
        count = (available - 1) // step * step + 1  # below 1 for none
        least = settings.min_frames or settings.num_frames
        if count < max(least, 1):
            read_video(file, max_seconds=60, size=settings.target(1, 1))  # a file that was cut off says so here
            name = item.member or item.path
            raise Skip(TOO_SHORT, f"{name}: {available} frames at {settings.fps} fps, {least} are needed")
    size = settings.target(*read_video(file, num_frames=1)[0].shape[1:3])
    for first in clip_starts(available, count, settings.clips_per_video):
        start = item.start + first / settings.fps
        yield start, read_video(file, fps=settings.fps, num_frames=count, start=start, size=size)[0]


def clip_starts(available: int, num_frames: int, clips: int) -> list[int]:
    """First frames of up to `clips` clips that do not overlap, with even gaps: one clip is the middle of the video."""
    clips = min(clips, available // num_frames)
    spare = available - clips * num_frames
    return [spare * (i + 1) // (clips + 1) + i * num_frames for i in range(clips)]
