"""Pictures and clips from files, as uint8 RGB arrays.

Reading trusts time stamps, not frame counts: a 30 fps or variable-rate clip read at 12 fps is a true 12 fps clip. It
is bounded (pixels, frames, bytes), honours rotation and EXIF orientation, lays transparency on white, and turns any
damaged file into one line. The bounds hold for what arrives as well as for what a header states: every frame is checked,
and FFmpeg refuses a frame over the limit before it allocates memory for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence
from PIL.TiffImagePlugin import TiffImageFile

from lumos.errors import UserError
from lumos.video.frames import fit, picture_rgb

MAX_PIXELS = 40_000_000
"""Pixels of one picture, or of one frame of a clip: an 8K frame has 33 million. The demo allows fewer."""
MAX_FRAMES = 2_000
MAX_CLIP_BYTES = 2 << 30
MAX_ANIMATION_PIXELS = 20_000_000_000
"""Pixels of all frames of an animated picture, whose frames may take a few bytes each: 10 000 frames of 1920 x 1080."""
_PADDING = 2**21  # pixels by which a coded frame may exceed the shown one: both sides are padded to whole blocks
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: it would start Ghostscript
_PILLOW_CLIPS = (".gif", ".webp", ".png", ".apng")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF
# Playlists and others that would make FFmpeg open what they name are not among them, and neither is any protocol but files.
_AV_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,ogg,flv,"
                        "asf,mxf,dv,nut,rm,mjpeg,yuv4mpegpipe,gif,apng",
    "protocol_whitelist": "file",
}


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as uint8 [H, W, 3]; UserError if missing, unreadable or larger than ``max_pixels``."""
    with _reading(path, "picture", max_pixels), Image.open(path, formats=_PICTURE_FORMATS) as image:
        _check_picture(path, image, max_pixels)
        return picture_rgb(ImageOps.exif_transpose(image))


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
    threads: int = 0,
) -> tuple[np.ndarray, float]:
    """A clip as (uint8 [T, H, W, 3], fps).

    ``fps``: frame n is what the clip shows at ``start + n / fps`` seconds; None keeps every frame and returns their
    average rate. ``num_frames``: exactly so many (UserError if the clip is shorter), reading stops there; with
    ``from_end`` they are the last ones, ending on the clip's last frame. Without ``num_frames`` the clip is read to its
    end, or for ``max_seconds``. ``size`` (height, width): each frame is fitted as it is read. UserError for a missing
    or damaged file, for more than ``max_frames`` frames or 2 GiB of them, and for a frame of more than ``max_pixels``.
    ``threads``: how many the decoder starts, which bounds the frames that it holds; 0 is as many as there are cores.
    """
    _check_request(path, fps, num_frames, start, from_end, max_seconds, max_frames)
    with _reading(path, _kind(path), max_pixels):
        clip = _open_clip(path, max_pixels, threads)
        if from_end:
            start = _start_of_last(path, clip.times(), num_frames, fps)
        stop = math.inf if max_seconds is None else start + max_seconds
        frames, span = _collect(path, clip, fps, num_frames, start, stop, size, max_frames)
    rate = fps or clip.fps or len(frames) / max(span, 1e-3)
    if not frames or (num_frames is not None and len(frames) < num_frames):
        raise UserError(
            f"{path} has only {len(frames)} frames at {rate:g} fps from {start:g} s on, {num_frames or 1} are needed; "
            f"ask for fewer frames, start earlier or raise fps"
        )
    return np.stack(frames), float(rate)


def count_frames(path: str | Path, fps: float, *, max_pixels: int = MAX_PIXELS) -> int:
    """How many frames :func:`read_video` can give at ``fps`` with ``from_end``; reads the time stamps only."""
    with _reading(path, _kind(path), max_pixels):
        return math.floor(max(_open_clip(path, max_pixels).times(), default=-1.0) * fps + 1e-3) + 1


@dataclass(frozen=True)
class _Shown:
    """A frame and the seconds from which and until which it is on screen, counted from the start of the clip."""

    begin: float
    end: float
    rgb: Callable[[], np.ndarray]


def _collect(
    path: str | Path,
    clip: _AvClip | _PillowClip,
    fps: float | None,
    num_frames: int | None,
    start: float,
    stop: float,
    size: tuple[int, int] | None,
    max_frames: int,
) -> tuple[list[np.ndarray], float]:
    """The frames asked for and the seconds that they were on screen."""
    frames: list[np.ndarray] = []
    span, held_bytes = 0.0, 0
    wanted = math.inf if num_frames is None else num_frames
    for shown in clip.frames(start):
        if shown.begin >= stop - 1e-3:  # stamps are that uncertain, see _AvClip
            break
        if fps is None:
            copies = int(shown.end > start)
        else:  # sample instants up to the end of this frame that have no frame yet
            due = math.ceil((min(shown.end, stop) - start) * fps - 1e-6)
            copies = int(min(max(due - len(frames), 0), wanted - len(frames), max_frames + 1))
        if not copies:
            continue
        picture = shown.rgb() if size is None else fit(shown.rgb()[None], *size)[0]
        if frames and picture.shape != frames[0].shape:
            raise UserError(f"{path} changes its frame size midway; cut it there, or convert it to one size")
        frames += [picture] * copies
        span += shown.end - shown.begin
        held_bytes += picture.nbytes * copies
        if len(frames) > max_frames:
            raise UserError(f"{path} has more than {max_frames} frames; set num_frames, max_seconds or a lower fps")
        if held_bytes > MAX_CLIP_BYTES:
            raise UserError(f"{path} takes over {MAX_CLIP_BYTES >> 30} GiB as frames; read fewer or smaller ones")
        if len(frames) >= wanted:
            break
    return frames, span


def _start_of_last(path: str | Path, times: list[float], num_frames: int, fps: float | None) -> float:
    """The start at which ``num_frames`` frames end on the last one; below zero if the clip is too short for them."""
    times = sorted(times)
    if fps is None:
        first = times[-num_frames] if num_frames <= len(times) else -1.0
    else:
        first = times[-1] - (num_frames - 1) / fps if times else -1.0
    if first < -1e-3 / (fps or 1):
        raise UserError(
            f"{path} is too short for its last {num_frames} frames{f' at {fps:g} fps' if fps else ''}: it has "
            f"{len(times)} frames in {times[-1] if times else 0:.2f} s; ask for fewer frames or raise fps"
        )
    return max(first, 0.0)


class _AvClip:
    """A clip read through FFmpeg.

    Frames count as on screen a little early (half a clock tick, at least 0.6 ms): many files hold stamps that were once
    rounded to milliseconds, and a frame stamped 0.067 is the one to show at 2/30 s.
    """

    def __init__(self, path: Path, max_pixels: int, threads: int):
        self.path, self.max_pixels, self.threads = path, max_pixels, threads
        with self._open() as (_, stream):
            _check_pixels(path, stream.codec_context.width, stream.codec_context.height, max_pixels)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.fps = float(rate)
            self.tick = float(stream.time_base)
            self.early = max(self.tick / 2, 6e-4) + 1e-6
            self.origin = (stream.start_time or 0) * self.tick
            self.length = None if stream.duration is None else stream.duration * self.tick

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        # These options reach the decoders that FFmpeg runs to find out what a stream holds; the one that decodes here has its own.
        limit = {"max_pixels": str(self.max_pixels + _PADDING)}
        # An absolute path, so that FFmpeg cannot take the name for one of its protocols.
        with av.open(str(self.path.resolve()), metadata_errors="replace", options=_AV_OPTIONS | limit) as container:
            if not container.streams.video:
                raise UserError(f"{self.path} holds no video; give a file with a video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = limit
            stream.thread_type, stream.codec_context.thread_count = "AUTO", self.threads
            yield container, stream

    def times(self) -> list[float]:
        """When each frame comes on screen, from the packets alone (nothing is decoded)."""
        with self._open() as (container, stream):
            return [p.pts * self.tick - self.origin for p in container.demux(stream) if p.pts is not None]

    def frames(self, start: float) -> Iterator[_Shown]:
        """Frames in order, at the latest from the one that is on screen at ``start``."""
        if start > 1:
            near = self._decode(start)
            first = next(near, None)
            if first is not None and first.begin <= start:
                yield first
                yield from near
                return
        yield from self._decode(None)

    def _decode(self, seek: float | None) -> Iterator[_Shown]:
        with self._open() as (container, stream):
            if seek is not None:
                container.seek(int((seek + self.origin) / self.tick), stream=stream)
            held, held_begin = None, 0.0
            for frame in self._decoded(container, stream):
                if frame.time is None:
                    begin = 0.0 if held is None else held_begin + 1 / self.fps
                else:
                    begin = frame.time - self.origin - self.early
                if held is not None:
                    yield _Shown(held_begin, begin, partial(_frame_rgb, held))
                held, held_begin = frame, begin
            if held is None:
                raise UserError(f"{self.path} holds no frame that can be decoded; convert it to mp4 (H.264)")
            end = held_begin + (held.duration * self.tick if held.duration else 1 / self.fps)
            if self.length is not None and end < 0.9 * self.length - 0.1:
                raise UserError(f"{self.path} is cut off: {end:.1f} s of {self.length:.1f} s are there; copy it again")
            yield _Shown(held_begin, end, partial(_frame_rgb, held))

    def _decoded(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        """Every frame, none of more than ``max_pixels``."""
        try:
            for frame in container.decode(stream):
                _check_pixels(self.path, frame.width, frame.height, self.max_pixels)
                yield frame
        except av.error.ArgumentError as error:  # what a decoder answers to a size that it is not to decode
            raise UserError(
                f"cannot read the video {self.path}: it holds a frame of more than {self.max_pixels / 1e6:g} megapixels, which is "
                "the limit, or is damaged; make it smaller or convert it to mp4 (H.264)"
            ) from error


class _PillowClip:
    """An animated picture (GIF, WebP, PNG); a still one is a clip of one frame."""

    fps = None  # known from the frames that were read: each has its own duration

    def __init__(self, path: Path, max_pixels: int):
        self.path, self.max_pixels = path, max_pixels

    def times(self) -> list[float]:
        return [shown.begin for shown in self.frames(0.0)]

    def frames(self, start: float) -> Iterator[_Shown]:
        with Image.open(self.path, formats=_PICTURE_FORMATS) as image:
            begin = pixels = 0
            for frame in ImageSequence.Iterator(image):
                _check_picture(self.path, frame, self.max_pixels)  # a GIF grows where a frame does not fit
                pixels += frame.width * frame.height
                if pixels > MAX_ANIMATION_PIXELS:
                    raise UserError(
                        f"{self.path} has over {MAX_ANIMATION_PIXELS / 1e6:g} megapixels in all its frames; convert it to mp4"
                    )
                frame.load()  # WebP knows the duration of a frame only once it is decoded
                end = begin + (round(frame.info.get("duration", 0)) or 100)  # ms; browsers show "0" as 100 too
                yield _Shown(begin / 1000 - 1e-6, end / 1000 - 1e-6, partial(picture_rgb, frame))
                begin = end


def _open_clip(path: str | Path, max_pixels: int, threads: int = 0) -> _AvClip | _PillowClip:
    if Path(path).suffix.lower() in _PILLOW_CLIPS:
        return _PillowClip(Path(path), max_pixels)
    return _AvClip(Path(path), max_pixels, threads)


def _frame_rgb(frame: av.VideoFrame) -> np.ndarray:
    if any(component.is_alpha for component in frame.format.components):
        rgb = picture_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        rgb = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))


def _kind(path: str | Path) -> str:
    """What people take the file for; a png or webp is rarely animated."""
    return "picture" if Path(path).suffix.lower() in (".png", ".webp") else "video"


@contextmanager
def _reading(path: str | Path, what: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever a decoder raises for a foreign file into one line."""
    try:
        if not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UserError(f"the {what} {path} {found}; give the path of a {what} file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, a lower one, is checked instead
            yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; the limit is "
            f"{max_pixels / 1e6:g} megapixels: make it smaller"
        ) from error
    except MemoryError as error:
        raise UserError(f"reading the {what} {path} takes more memory than there is; make it smaller or shorter") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        better = "PNG or JPEG" if what == "picture" else "mp4 (H.264)"
        raise UserError(
            f"cannot read the {what} {path} ({reason}): it is damaged, cut off or of an unknown format; "
            f"copy it again or convert it to {better}"
        ) from error


def _check_picture(path: str | Path, image: Image.Image, max_pixels: int) -> None:
    """UserError if the picture, or a tile of a TIFF, which may be larger than the picture, has over ``max_pixels``."""
    _check_pixels(path, image.width, image.height, max_pixels)
    if isinstance(image, TiffImageFile):
        width, length = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        _check_pixels(path, width, length, max_pixels, "tiles of ")


def _check_pixels(path: str | Path, width: int, height: int, max_pixels: int, of: str = "") -> None:
    if width * height > max_pixels:
        raise UserError(
            f"{path} has {of}{width}x{height} pixels ({width * height / 1e6:.1f} megapixels); the limit is "
            f"{max_pixels / 1e6:g} megapixels: make it smaller"
        )


def _check_request(
    path: str | Path,
    fps: float | None,
    num_frames: int | None,
    start: float,
    from_end: bool,
    max_seconds: float | None,
    max_frames: int,
) -> None:
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"fps {fps} for {path}; it must be above 0 and at most 1000")
    if num_frames is not None and not 1 <= num_frames <= max_frames:
        raise UserError(f"num_frames {num_frames} for {path}; it must be 1 to {max_frames}")
    if not 0 <= start < math.inf:
        raise UserError(f"start {start} s for {path}; it must be 0 or more")
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds {max_seconds} for {path}; it must be above 0")
    if from_end and (num_frames is None or start or max_seconds is not None):
        raise UserError("from_end needs num_frames, and goes with neither start nor max_seconds")
