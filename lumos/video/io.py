"""Input and output of pictures and clips as uint8 RGB arrays [T, H, W, 3].

Other modules import from here. Reading is implemented in ``lumos.video.reading``, functions on arrays
in ``lumos.video.frames``, and writing in this file. The suffix of a path selects the format. A file is
written completely or not at all (see ``lumos.files``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lumos.durable import put_file
from lumos.errors import RunError, UserError, shown
from lumos.files import check_writable, file_identity, replacing, replacing_folder, write_json
from lumos.video.frames import as_uint8, contact_sheet, fit, from_uint8, to_uint8
from lumos.video.reading import MAX_FRAMES, MAX_PIXELS, count_frames, read_image, read_video

__all__ = [
    "MAX_FRAMES",
    "MAX_PIXELS",
    "SUFFIXES",
    "check_output",
    "contact_sheet",
    "count_frames",
    "fit",
    "from_uint8",
    "read_image",
    "read_video",
    "to_uint8",
    "write_frames",
    "write_json",
    "write_video",
]

Put = Callable[[Path, Path], object]
SUFFIXES = (".mp4", ".gif", ".webp", ".png")


def check_output(
    path: str | Path, num_frames: int | None = None, fps: float = 1, keep: Container[Hashable] = ()
) -> None:  # fmt: skip
    """Raise UserError if :func:`write_video` cannot write ``path``; call this function before a long run.

    ``keep`` has the results of :func:`file_identity` for files that must not be overwritten. Raise
    UserError also if ``path`` is one of these files. The check leaves no file behind.
    """
    path = Path(path)
    _check_fps(path, fps)
    folder = _frame_folder(path, _suffix(path), num_frames or 1)
    check_writable(path if folder is None else folder / "00000.png")
    if any(file_identity(file) in keep for file in (path, *(folder.glob("*") if folder else ()))):
        raise UserError(f"{folder or path} is or holds an input of this run, or another of its files; choose another name")


def write_video(
    path: str | Path, frames: Any, fps: float, metadata: Mapping[str, Any] | None = None, put: Put = put_file
) -> Path:  # fmt: skip
    """Write a clip in the format of the suffix of ``path``, and return the path of the file or folder written.

    .mp4   H.264, yuv420p; an odd height or width gets one more row or column
    .gif   animation
    .webp  lossless animation
    .png   a picture for one frame; for several frames the folder ``path`` without its suffix, with
           00000.png, 00001.png, ...

    ``frames`` are in any form that :func:`as_uint8` accepts, and ``fps`` is in frames per second.
    ``metadata`` is written as JSON into the comment of the file. The file is written completely or not
    at all. ``put`` is what gives a finished file its name. Raise UserError for a suffix, fps or frames that cannot be written,
    and RunError if writing fails.
    """
    path = Path(path)
    suffix, frames = _suffix(path), as_uint8(frames)
    if suffix == ".mp4":
        return write_frames(path, [frames], fps, metadata, put)
    _check_fps(path, fps)
    comment = _comment(metadata, suffix)
    folder = _frame_folder(path, suffix, len(frames))
    if folder is not None:
        with replacing_folder(folder) as temporary:
            for n, frame in enumerate(frames):
                _write_png(temporary / f"{n:05d}.png", frame, comment)
        return folder
    with replacing(path, put) as temporary:
        if suffix == ".png":
            _write_png(temporary, frames[0], comment)
        else:
            _write_animation(temporary, suffix, frames, fps, comment)
    return path


def write_frames(
    path: str | Path, parts: Iterable[Any], fps: float, metadata: Mapping[str, Any] | None = None, put: Put = put_file
) -> Path:  # fmt: skip
    """Write a clip as :func:`write_video` does, from an iterable of parts with frames of one size.

    An .mp4 file is written part by part, and no part is kept in memory. Other formats are written when
    all parts have arrived. If the iterable raises an error, no file is left behind.
    """
    path = Path(path)
    if _suffix(path) != ".mp4":
        return write_video(path, np.concatenate([as_uint8(part) for part in parts]), fps, metadata, put)
    _check_fps(path, fps)
    with replacing(path, put) as temporary:
        _write_mp4(temporary, parts, fps, _comment(metadata, ".mp4"))
    return path


def _comment(metadata: Mapping[str, Any] | None, suffix: str) -> str:
    """Return metadata as JSON for the comment of a file, or "" without metadata."""
    if not metadata:
        return ""
    # A WebP file has its comment in EXIF, which is ASCII, so other characters are escaped. Bytes of file names that are not
    # UTF-8 are escaped everywhere.
    text = json.dumps(dict(metadata), ensure_ascii=suffix == ".webp", default=str)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _frame_folder(path: Path, suffix: str, num_frames: int) -> Path | None:
    """Return the folder for several PNG frames, or None for every other output.

    Raise UserError if the folder has other files than numbered frames, or if it is a file.
    """
    if suffix != ".png" or num_frames == 1:
        return None
    folder = path.with_suffix("")
    if folder.is_dir() and any(not re.fullmatch(r"\d{5,}\.png", p.name) for p in folder.iterdir()):
        raise UserError(f"the folder {folder} holds other files than numbered frames; choose another name")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but the numbered frames need a folder of that name; choose another name")
    return folder


def _check_fps(path: Path, fps: float) -> None:
    if not 0 < fps <= (50 if _suffix(path) == ".gif" else 1000):
        raise UserError(f"fps {fps} cannot be written to {path}; it must be above 0 and at most 1000 (gif: 50)")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: the suffix {shown(suffix)} is unknown; use one of {', '.join(SUFFIXES)}")
    return suffix


def _write_mp4(path: Path, parts: Iterable[Any], fps: float, comment: str) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    try:  # the path is absolute, as FFmpeg takes the begin of a name such as take:1.mp4 for that of a protocol
        with av.open(os.path.abspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata["comment"] = comment
            # The macroblock tree of x264 makes different files from the same frames, so it is off.
            # Without this option, crf 20 gives about the quality of crf 17 with it.
            stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "mbtree": "0"})
            stream.pix_fmt = "yuv420p"
            # The conversion from RGB below is that of BT.601 with limited range; the file states it for players.
            stream.codec_context.colorspace = 6
            stream.codec_context.color_range = 1
            size = None
            for part in map(as_uint8, parts):
                if size is None:
                    size = part.shape[1:3]
                    stream.height, stream.width = (side + side % 2 for side in size)
                if part.shape[1:3] != size:
                    raise UserError(f"frames of {list(part.shape[1:3])} pixels come after frames of {list(size)}; give one size")
                for frame in part:
                    frame = np.pad(frame, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise RunError(f"cannot write the video ({error.strerror or error}); check free space, or try .webp") from error


def _write_png(path: Path, frame: np.ndarray, comment: str) -> None:
    info = PngInfo()
    if comment:
        info.add_itxt("comment", comment)
    Image.fromarray(frame).save(path, "PNG", pnginfo=info)


def _write_animation(path: Path, suffix: str, frames: np.ndarray, fps: float, comment: str) -> None:
    unit = 10 if suffix == ".gif" else 1  # ms, resolution of time stamps of the format
    stamps = [round(n * 1000 / fps / unit) * unit for n in range(len(frames) + 1)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    common = {"save_all": True, "append_images": rest, "duration": [b - a for a, b in pairwise(stamps)], "loop": 0}
    if suffix == ".gif":
        first.save(path, "GIF", comment=comment.encode(), **common)
    else:
        exif = Image.Exif()
        if comment:
            exif[0x010E] = comment  # ImageDescription
        first.save(path, "WEBP", lossless=True, quality=60, exif=exif, **common)
