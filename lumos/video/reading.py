"""Reading of pictures and clips from files, as uint8 RGB arrays.

Frames are chosen by their time stamps and not by counting, so a clip of 30 fps or of variable rate that
is read at 12 fps plays at its true speed. Rotation and EXIF orientation are applied, and transparent
parts are put on white. A damaged file gives an error message of one line.

Pixels, frames and bytes are limited. The limits are checked against the header and against each
decoded frame. FFmpeg refuses a frame above the limit before it allocates memory for the frame.
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
"""Largest number of pixels of a picture or of a frame. An 8K frame has 33 million. The demo allows fewer."""
MAX_FRAMES = 2_000
"""Largest number of frames of a clip that is read."""
MAX_CLIP_BYTES = 2 << 30
"""Largest number of bytes of the frames of a clip in memory."""
MAX_ANIMATION_PIXELS = 20_000_000_000
"""Largest number of pixels of all frames of an animated picture: about 10 000 frames of 1920 x 1080. A small file can
have many frames, because a frame can take a few bytes."""
_PADDING = 2**21  # extra pixels of a coded frame, whose sides are padded to whole blocks
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # without EPS, for which Pillow would start Ghostscript
_PILLOW_CLIPS = (".gif", ".webp", ".png", ".apng")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF
# Formats such as playlists, which make FFmpeg open other files or URLs, are not allowed, and the only protocol is "file".
_AV_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,ogg,flv,"
                        "asf,mxf,dv,nut,rm,mjpeg,yuv4mpegpipe,gif,apng",
    "protocol_whitelist": "file",
}


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3].

    Raise UserError if the file is missing, cannot be read or has more than ``max_pixels`` pixels.
    """
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
    """Return a clip as (frames uint8 [T, H, W, 3], frames per second).

    fps          frame n is the frame that is on screen at ``start + n / fps`` seconds; None: return all
                 frames and their average rate
    num_frames   number of frames; None: read to the end of the clip, or for ``max_seconds``
    start        time in seconds at which reading starts
    from_end     return the last ``num_frames`` frames, up to the last frame of the clip
    max_seconds  largest length in seconds
    size         (height, width) to which each frame is scaled and cropped, see ``lumos.video.frames.fit``
    max_frames   limit of the number of frames
    max_pixels   limit of the number of pixels of a frame
    threads      threads of the decoder, which also limit the frames that it keeps in memory; 0: one per core

    Raise UserError if the file is missing or damaged, if the clip is shorter than ``num_frames``, if it
    has more than ``max_frames`` frames or 2 GiB of frames, or if a frame has more than ``max_pixels``.
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
    """Return the largest ``num_frames`` for :func:`read_video` at ``fps`` with ``from_end``.

    Of a video only the time stamps are read; no frame is decoded.
    """
    with _reading(path, _kind(path), max_pixels):
        return math.floor(max(_open_clip(path, max_pixels).times(), default=-1.0) * fps + 1e-3) + 1


@dataclass(frozen=True)
class _Shown:
    """A frame and the time that it is on screen, in seconds from the start of the clip."""

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
    """Return the selected frames, and the total time in seconds that they are on screen."""
    frames: list[np.ndarray] = []
    span, held_bytes = 0.0, 0
    wanted = math.inf if num_frames is None else num_frames
    for shown in clip.frames(start):
        if shown.begin >= stop - 1e-3:  # time stamps have about this error, see _AvClip
            break
        if fps is None:
            copies = int(shown.end > start)
        else:  # number of sample times before the end of this frame that have no frame yet
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
    """Return the start in seconds from which ``num_frames`` frames end at the last frame of the clip.

    Raise UserError if the clip is too short.
    """
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
    """A clip that is read with FFmpeg.

    A frame counts as on screen a little before its time stamp (half a clock tick, at least 0.6 ms),
    because many files have time stamps that were rounded to milliseconds: the frame at 0.067 s is the
    frame for 2/30 s.
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
        # The options of `av.open` apply to the decoders with which FFmpeg probes a stream. The decoder of the
        # stream has its own options, so the limit is set there as well.
        limit = {"max_pixels": str(self.max_pixels + _PADDING)}
        # The path is absolute, so that FFmpeg does not take a part of a name such as "concat:a" for a protocol.
        with av.open(str(self.path.resolve()), metadata_errors="replace", options=_AV_OPTIONS | limit) as container:
            if not container.streams.video:
                raise UserError(f"{self.path} holds no video; give a file with a video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = limit
            stream.thread_type, stream.codec_context.thread_count = "AUTO", self.threads
            yield container, stream

    def times(self) -> list[float]:
        """Return the time stamp of each frame in seconds, read from the packets without decoding."""
        with self._open() as (container, stream):
            return [p.pts * self.tick - self.origin for p in container.demux(stream) if p.pts is not None]

    def frames(self, start: float) -> Iterator[_Shown]:
        """Yield the frames in order, beginning with the frame that is on screen at ``start`` or an earlier one."""
        if start > 1:
            near = self._decode(start)
            first = next(near, None)
            if first is not None and first.begin <= start:
                yield first
                yield from near
                return
        yield from self._decode(None)

    def _decode(self, seek: float | None) -> Iterator[_Shown]:
        """Yield the frames from a key frame at or before ``seek`` seconds; None: from the first frame."""
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
        """Yield each decoded frame; raise UserError for a frame of more than ``max_pixels``."""
        try:
            for frame in container.decode(stream):
                _check_pixels(self.path, frame.width, frame.height, self.max_pixels)
                yield frame
        except av.error.ArgumentError as error:  # the error of a decoder for a frame above `max_pixels`
            raise UserError(
                f"cannot read the video {self.path}: it holds a frame of more than {self.max_pixels / 1e6:g} megapixels, which is "
                "the limit, or is damaged; make it smaller or convert it to mp4 (H.264)"
            ) from error


class _PillowClip:
    """An animated picture (GIF, WebP, PNG) that is read with Pillow; a still picture is a clip of one frame."""

    fps = None  # `read_video` computes the rate, because each frame has its own duration

    def __init__(self, path: Path, max_pixels: int):
        self.path, self.max_pixels = path, max_pixels

    def times(self) -> list[float]:
        """Return the time in seconds at which each frame comes on screen."""
        return [shown.begin for shown in self.frames(0.0)]

    def frames(self, start: float) -> Iterator[_Shown]:
        """Yield all frames in order; ``start`` is not used."""
        with Image.open(self.path, formats=_PICTURE_FORMATS) as image:
            begin = pixels = 0
            for frame in ImageSequence.Iterator(image):
                _check_picture(self.path, frame, self.max_pixels)  # a GIF grows if a frame does not fit
                pixels += frame.width * frame.height
                if pixels > MAX_ANIMATION_PIXELS:
                    raise UserError(
                        f"{self.path} has over {MAX_ANIMATION_PIXELS / 1e6:g} megapixels in all its frames; convert it to mp4"
                    )
                frame.load()  # the duration of a WebP frame is known after decoding
                end = begin + (round(frame.info.get("duration", 0)) or 100)  # ms; 0 counts as 100, as in browsers
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
    """Return "picture" or "video" for messages about a file; a .png or .webp file is rarely animated."""
    return "picture" if Path(path).suffix.lower() in (".png", ".webp") else "video"


@contextmanager
def _reading(path: str | Path, what: str, max_pixels: int) -> Iterator[None]:
    """Context manager that turns any error of a decoder into a UserError of one line."""
    try:
        if not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UserError(f"the {what} {path} {found}; give the path of a {what} file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the lower limit `max_pixels` is checked instead
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
    """Raise UserError if the picture, or a tile of a TIFF, has more than ``max_pixels`` pixels.

    A tile can be larger than the picture.
    """
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
        raise UserError("from_end needs num_frames, and cannot be used with start or max_seconds")
