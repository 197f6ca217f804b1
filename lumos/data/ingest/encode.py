"""Encoding of one item into rows of codes, which every executor of `ingest` applies to the items."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lumos.data.buckets import bucket_for
from lumos.data.ingest.item import TOO_SHORT, Item, as_text, problem_of, problem_of_file
from lumos.data.ingest.manifest import as_file
from lumos.data.shards import format as shards
from lumos.errors import UserError
from lumos.runtime import pick_device, plain_defaults
from lumos.video.frames import fit, from_uint8
from lumos.video.reading import OpenVideo, is_still, open_video, read_image
from tokenizer import VideoTokenizer

T = TypeVar("T")
ReadClip = tuple[float, np.ndarray, tuple[int, int, float]]
"""Start in seconds, frames uint8 [T, H, W, 3], and the original height, original width and stride."""
TARGET_SIZES = {"256p": 352, "384p": 528, "480p": 656}  # square root of the area in pixels; reference, section 8.2


@dataclass(frozen=True)
class ClipSettings:
    """The format of the clips. All clips of a folder of shards have the same settings.

    fps              frames per second
    size             256p, 384p or 480p (buckets by aspect ratio), or HEIGHTxWIDTH in pixels
    num_frames       frames of a clip
    min_frames       a video of fewer than `num_frames` frames gives one clip if it has at least this
                     many; None: such a video is skipped
    clips_per_video  largest number of clips of a video
    per_frame_codes  whether to store, beside the codes of each clip, those of each frame as a picture
    """

    fps: int = 12
    size: str = "256p"
    num_frames: int = 25
    min_frames: int | None = None
    clips_per_video: int = 1
    per_frame_codes: bool = False

    def check(self, tokenizer: VideoTokenizer) -> None:
        """Raise UserError if `tokenizer` cannot encode clips of these settings into shards."""
        tokenizer.check_has_codes("ingest")
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
        """Return the (height, width) to which frames of this size are scaled and cropped.

        Raise UserError if `size` is unknown.
        """
        if self.size in TARGET_SIZES:
            return bucket_for(height, width, TARGET_SIZES[self.size])
        if not re.fullmatch(r"\d{1,5}x\d{1,5}", self.size):
            raise UserError(f"size {self.size!r} is unknown; allowed: {', '.join(TARGET_SIZES)} or HEIGHTxWIDTH, for example 64x64")
        down, across = self.size.split("x")
        return int(down), int(across)


class Skip(Exception):
    """The result of an item that gives no clip.

    `reason` is one of a few fixed texts, by which the report counts skipped items. `detail` is a message
    for the user.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


Result = list[dict[str, Any]] | Skip
"""The rows of the clips of an item, or why the item gives no clip."""


@dataclass(frozen=True)
class EncoderSpec:
    """The arguments with which a worker makes its :class:`ItemEncoder`.

    `tokenizer` is the folder of the tokenizer. If `device` is None, the worker uses a GPU if it has one.
    """

    tokenizer: str
    settings: ClipSettings
    device: str | None


@dataclass(eq=False)
class Begun:
    """An item whose first clip is read and whose file may be open. `clips` reads the others; it can be called once."""

    item: Item
    first: list[ReadClip]  # a list, so that the clip is freed when it is encoded
    others: Iterator[ReadClip]

    def clips(self) -> Iterator[ReadClip]:
        with closing(self.others):
            yield self.first.pop()
            yield from self.others


class ItemEncoder:
    """:func:`ingest_item` in two steps with a loaded tokenizer; each worker has one.

    `begin` reads, `finish` encodes. Different threads may do them, so that a worker reads one item while it encodes another.
    """

    @plain_defaults()
    def __init__(self, spec: EncoderSpec):
        self.settings = spec.settings
        self.tokenizer = VideoTokenizer.from_pretrained(spec.tokenizer, device=str(pick_device(spec.device)))

    def begin(self, item: Item) -> Begun | Skip:
        return begin(item, self.settings, self.tokenizer.temporal_compression)

    def finish(self, begun: Begun | Skip) -> Result:
        return finish(begun, self.settings, self.tokenizer)

    def __call__(self, item: Item) -> Result:
        return self.finish(self.begin(item))


def ingest_item(item: Item, settings: ClipSettings, tokenizer: VideoTokenizer) -> Result:
    """Read one item, scale and crop its frames to the bucket, and encode them.

    Return the rows of its clips. If the item's data make a reader fail, return a `Skip`. Any other
    error is a bug, and is raised.
    """
    return finish(begin(item, settings, tokenizer.temporal_compression if tokenizer else 1), settings, tokenizer)


def begin(item: Item, settings: ClipSettings, step: int) -> Begun | Skip:
    """Read the first clip of an item; for `step` see `_clips`, for the errors `ingest_item`."""
    clips = _clips_of_item(item, settings, step)
    try:
        return Begun(item, [next(clips)], clips)
    except Exception as error:
        return _as_skip(error)


@torch.no_grad()
@plain_defaults()
def finish(begun: Begun | Skip, settings: ClipSettings, tokenizer: VideoTokenizer) -> Result:
    """Encode an item that is begun, and read its other clips; for the result and the errors see `ingest_item`."""
    if isinstance(begun, Skip):
        return begun
    try:
        with closing(begun.clips() if settings.clips_per_video == 1 else one_ahead(begun.clips())) as clips:
            # Encode one clip at a time, because all clips of a long video together need as much memory as the video.
            return [_row(begun.item, number, *clip, settings, tokenizer) for number, clip in enumerate(clips)]
    except Exception as error:
        return _as_skip(error)


def _as_skip(error: Exception) -> Skip:
    """Return why an item gives no clip; raise the error if it is a bug."""
    if isinstance(error, Skip):
        return error
    problem = problem_of(error)
    if problem is None:
        raise error
    return Skip(*problem)


def _clips_of_item(item: Item, settings: ClipSettings, step: int) -> Iterator[ReadClip]:
    if problem := item.problem or problem_of_file(item.path):
        raise Skip(*problem)
    with as_file(item) as file:
        yield from _clips(item, file, settings, step)


def _row(
    item: Item, number: int, start: float, frames: np.ndarray, origin: tuple[int, int, float], settings: ClipSettings,
    tokenizer: VideoTokenizer,
) -> dict[str, Any]:  # fmt: skip
    """Return the row of a clip with frames uint8 [T, H, W, 3] that begins at `start` seconds of its video.

    origin: the values of `shards.ORIGIN`.
    """
    video = from_uint8(frames[None]).to(next(tokenizer.parameters()))  # [1, 3, T, H, W]
    codes = tokenizer.encode(video)[0].cpu().numpy().astype(np.uint16)  # [t, h, w]
    count, height, width = frames.shape[:3]
    row = {
        "id": item.id, "clip": number, "codes": codes, "num_frames": count, "height": height, "width": width,
        "fps": settings.fps if count > 1 else 1, "caption": item.caption,
        "source": as_text(f"{item.path}/{item.member}" if item.member else item.path), "start": start,
        **dict(zip(shards.ORIGIN, origin, strict=True)),
    }  # fmt: skip
    if settings.per_frame_codes:
        row[shards.FRAME_CODES] = tokenizer.encode_frames(video)[0].cpu().numpy().astype(np.uint16)  # [T, h, w]
    return row | {"checksum": shards.checksum(row)}


def _clips(item: Item, file: Path, settings: ClipSettings, step: int) -> Iterator[ReadClip]:
    """Yield each clip of an item.

    A clip is read only when the iterator reaches it. All clips of an item have the same size. `step` is
    the temporal compression of the tokenizer. Raise Skip if the video is too short.
    """
    if is_still(file):
        frames = read_image(file)[None]
        yield 0.0, fit(frames, *settings.target(*frames.shape[1:3])), (*frames.shape[1:3], 1.0)
        return
    with open_video(file, threads=1) as video:  # each worker has one core
        yield from _clips_of_video(item, video, settings, step)


def _clips_of_video(item: Item, video: OpenVideo, settings: ClipSettings, step: int) -> Iterator[ReadClip]:
    """Do the same as `_clips` for an open video."""
    total = video.count_frames(settings.fps)
    available = total - item.start * settings.fps
    if item.end is not None:
        available = min(available, (item.end - item.start) * settings.fps)
    available = int(max(available, 0) + 1e-3)
    count = settings.num_frames
    if available < count:
        count = (available - 1) // step * step + 1  # below 1 if there is no frame
        least = settings.min_frames or settings.num_frames
        if count < max(least, 1):
            video.read(max_seconds=60, size=settings.target(1, 1))  # raises the right error if the file is cut off
            name = item.member or item.path
            raise Skip(TOO_SHORT, f"{name}: {available} frames at {settings.fps} fps, {least} are needed")
    first_frame, rate = video.read(num_frames=1)
    height, width = first_frame.shape[1:3]
    size, origin = settings.target(height, width), (height, width, rate / settings.fps if count > 1 else 1.0)
    for first in clip_starts(available, count, settings.clips_per_video):
        start = item.start + first / settings.fps
        yield start, video.read(fps=settings.fps, num_frames=count, start=start, size=size)[0], origin


def one_ahead(made: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator that a thread advances, so that the next item is made while the caller works on one."""
    end = object()
    with closing(made), ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        due = pool.submit(next, made, end)
        while (item := due.result()) is not end:
            due = pool.submit(next, made, end)
            yield item


def clip_starts(available: int, num_frames: int, clips: int) -> list[int]:
    """Return the first frame of each of up to `clips` clips that do not overlap.

    The gaps before, between and after the clips are equal, so a single clip is the middle of the video.
    """
    clips = min(clips, available // num_frames)
    spare = available - clips * num_frames
    return [spare * (i + 1) // (clips + 1) + i * num_frames for i in range(clips)]
