"""Reading of pictures and clips from files, as uint8 RGB arrays.

Frames are chosen by their time stamps and not by counting, so a clip of 30 fps or of variable rate that
is read at 12 fps plays at its true speed. A file is opened by its content, not by its name. Rotation, mirrors, EXIF
orientation and pixels that are not square are applied, colour profiles are converted to sRGB, and transparent parts are put
on white. A damaged file gives an error message of one line.

Pixels, frames and bytes are limited. The limits are checked against the header and against each
decoded frame. FFmpeg refuses a frame above the limit before it allocates memory for the frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lumos.errors import UserError
from lumos.video.av_clip import AvClip
from lumos.video.frames import fit, picture_rgb
from lumos.video.hdr import is_heif_picture
from lumos.video.pillow_clip import (
    FORMATS,
    PillowClip,
    is_film_of_jpegs,
    is_picture_file,
    is_still_file,
    open_picture,
)

MAX_PIXELS = 40_000_000
"""Largest number of pixels of a picture or of a frame. An 8K frame has 33 million. The demo allows fewer."""
MAX_FRAMES = 2_000
"""Largest number of frames of a clip that is read."""
KINDS_BYTES = 64
"""Bytes at the begin of a file of the family of mp4 among which its kinds stand."""
MAX_CLIP_BYTES = 2 << 30
"""Largest number of bytes of the frames of a clip in memory."""


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3].

    Raise UserError if the file is missing, cannot be read, holds a video or has more than ``max_pixels`` pixels.
    """
    with _reading(path, "picture", max_pixels):
        holds_picture = is_picture_file(Path(path))
        if not holds_picture:
            _check_no_heif(path)
    if not holds_picture and can_read(path):
        raise UserError(f"{path} holds a video and no picture; give it as a video, or save one of its frames as PNG or JPEG")
    with _reading(path, "picture", max_pixels), open_picture(path, max_pixels) as image:
        if image.format == "GIF" or (image.format == "PNG" and getattr(image, "is_animated", False)):
            return next(PillowClip(Path(path), max_pixels).frames(0.0)).rgb()
        return picture_rgb(ImageOps.exif_transpose(image), path)


def is_still(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Return whether a file holds a picture that does not move, by its content; False also for other files.

    Raise UserError if the file is missing or too damaged to tell.
    """
    with _reading(path, _kind(path), max_pixels):
        return is_still_file(Path(path))


def can_read(path: str | Path) -> bool:
    """Return whether a file holds a picture or a video, by its content, as far as its header tells."""
    try:
        with open_video(path):
            return True
    except UserError:
        return False


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
    with open_video(path, max_pixels=max_pixels, threads=threads) as video:
        return video.read(
            fps=fps, num_frames=num_frames, start=start, from_end=from_end, max_seconds=max_seconds, size=size,
            max_frames=max_frames,
        )  # fmt: skip


def count_frames(path: str | Path, fps: float, *, max_pixels: int = MAX_PIXELS) -> int:
    """Return the largest ``num_frames`` for :func:`read_video` at ``fps`` with ``from_end``.

    Of a video only time stamps are read, of mp4 and matroska files only those at the end; no frame is decoded.
    """
    with open_video(path, max_pixels=max_pixels) as video:
        return video.count_frames(fps)


class OpenVideo:
    """A file from which several parts are read, see :func:`open_video`. An error of its methods is a UserError of one line."""

    def __init__(self, path: str | Path, clip: AvClip | PillowClip, max_pixels: int):
        self.path, self.clip, self.max_pixels = path, clip, max_pixels

    def count_frames(self, fps: float) -> int:
        """Do the same as :func:`count_frames`."""
        with _reading(self.path, _kind(self.path), self.max_pixels):
            return math.floor((self.clip.last_time() + self.clip.rounding) * fps + 1e-6) + 1

    def read(
        self,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        start: float = 0.0,
        from_end: bool = False,
        max_seconds: float | None = None,
        size: tuple[int, int] | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> tuple[np.ndarray, float]:
        """Do the same as :func:`read_video`."""
        path, clip = self.path, self.clip
        _check_request(path, fps, num_frames, start, from_end, max_seconds, max_frames)
        with _reading(path, _kind(path), self.max_pixels):
            if from_end:
                start = _start_of_last(path, clip, num_frames, fps)
            stop = math.inf if max_seconds is None else start + max_seconds
            frames, span = _collect(path, clip, fps, num_frames, start, stop, size, max_frames)
        rate = fps or clip.fps or len(frames) / max(span, 1e-3)
        if not frames or (num_frames is not None and len(frames) < num_frames):
            raise UserError(
                f"{path} has only {len(frames)} frames at {rate:g} fps from {start:g} s on, {num_frames or 1} are needed; "
                f"ask for fewer frames, start earlier or raise fps"
            )
        return np.stack(frames), float(rate)


@contextmanager
def open_video(path: str | Path, *, max_pixels: int = MAX_PIXELS, threads: int = 0) -> Iterator[OpenVideo]:
    """Open a file to read several parts of it; mp4 and matroska files are opened once for all parts.

    Raise UserError if the file is missing or cannot be opened; for the arguments see :func:`read_video`.
    """
    with ExitStack() as held:
        with _reading(path, _kind(path), max_pixels):
            clip = _open_clip(path, max_pixels, threads)
        held.callback(clip.close)
        yield OpenVideo(path, clip, max_pixels)


def _collect(
    path: str | Path,
    clip: AvClip | PillowClip,
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
        if shown.begin + clip.early >= stop - clip.rounding:
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


def _start_of_last(path: str | Path, clip: AvClip | PillowClip, num_frames: int, fps: float | None) -> float:
    """Return the start in seconds from which ``num_frames`` frames end at the last frame of the clip.

    Raise UserError if the clip is too short.
    """
    times = sorted(clip.times())
    if fps is None:
        first = times[-num_frames] if num_frames <= len(times) else -1.0
    else:
        first = times[-1] - (num_frames - 1) / fps if times else -1.0
    if first < -clip.rounding - 1e-6:
        raise UserError(
            f"{path} is too short for its last {num_frames} frames{f' at {fps:g} fps' if fps else ''}: it has "
            f"{len(times)} frames in {times[-1] if times else 0:.2f} s; ask for fewer frames or raise fps"
        )
    if fps is not None:
        # The time of the last frame may be rounded down, and that of the first one up: by this much more than `early`.
        first += max(2 * clip.rounding - clip.early, 0) + 1e-6
    return max(first, 0.0)


def _open_clip(path: str | Path, max_pixels: int, threads: int = 0) -> AvClip | PillowClip:
    """Open a clip by its content: a picture with Pillow, all else, and a film of single pictures, with FFmpeg."""
    path = Path(path)
    if not is_picture_file(path):
        _check_no_heif(path)
        return AvClip(path, max_pixels, threads)
    if is_film_of_jpegs(path):
        return AvClip(path, max_pixels, threads, "mjpeg")
    return PillowClip(path, max_pixels)


def _check_no_heif(path: str | Path) -> None:
    """Raise UserError for what FFmpeg would read wrongly, of files in the container of HEIF that Pillow cannot read.

    Of a photograph in HEIC it would show one of many tiles, neither turned nor in sRGB; of an AVIF that is cut off, some frames.
    """
    with open(path, "rb") as file:
        kinds = file.read(KINDS_BYTES)
    if kinds[4:8] == b"ftyp" and (b"avif" in kinds or b"avis" in kinds) and "AVIF" in FORMATS:
        raise UserError(
            f"cannot read the picture {path}: it is an AVIF that is damaged or cut off; copy it again or convert it to PNG or JPEG"
        )
    if is_heif_picture(path):
        raise UserError(f"{path} is a HEIF picture (.heic), which cannot be read; convert it to PNG or JPEG")


_PICTURES = (
    ".png", ".webp", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2",
    ".j2k", ".tga", ".ico", ".psd", ".exr", ".hdr", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
)  # fmt: skip


def _kind(path: str | Path) -> str:
    """Return "picture" or "video" for messages about a file; a .png or .webp file is rarely animated."""
    return "picture" if Path(path).suffix.lower() in _PICTURES else "video"


@contextmanager
def _reading(path: str | Path, what: str, max_pixels: int) -> Iterator[None]:
    """Context manager that turns any error of a decoder into a UserError of one line."""
    try:
        if not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "does not exist"
            raise UserError(f"the {what} {path} {found}; give the path of a {what} file")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, and of sizes above the lower limit `max_pixels`
            yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; the limit is "
            f"{max_pixels / 1e6:g} megapixels: make it smaller"
        ) from error
    except (MemoryError, BlockingIOError) as error:  # the second one if a decoder gets no memory for its threads
        raise UserError(f"reading the {what} {path} takes more memory than there is; make it smaller or shorter") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        better = "PNG or JPEG" if what == "picture" else "mp4 (H.264)"
        raise UserError(
            f"cannot read the {what} {path} ({reason}): it is damaged, cut off or of an unknown format; "
            f"copy it again or convert it to {better}"
        ) from error


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
