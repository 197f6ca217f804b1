"""Items: the videos and pictures to ingest, their names, and the reasons for which an item is skipped."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass

from lumos.errors import is_out_of_memory
from lumos.video.hdr import HighDynamicRange
from lumos.wording import is_blank, wrong_character

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm")
CLIPS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".gif", ".apng", ".wmv", ".asf", ".ts", ".mts",
    ".m2ts", ".flv", ".f4v", ".3gp", ".3g2", ".mxf", ".dv", ".vob", ".y4m", ".ivf", ".mjpeg", ".qt", ".nut", ".h264", ".hevc",
)  # fmt: skip
MEDIA = PICTURES + CLIPS
OTHER_MEDIA = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jxr", ".tga", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef",
    ".arw", ".orf", ".rw2", ".raf", ".svg", ".rm", ".rmvb", ".swf", ".264", ".265", ".h265", ".av1", ".obu", ".divx", ".mjpg",
    ".m2v", ".mpe",
)  # fmt: skip
"""Suffixes of pictures and clips that mostly cannot be read. In a folder, those that cannot are skipped items."""
NOT_MEDIA = (
    ".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".md", ".yaml", ".yml", ".xml", ".html", ".srt",
    ".vtt", ".log", ".lock", ".py", ".tar", ".zip", ".gz", ".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".db", ".ini",
    ".pdf", ".wav", ".mp3", ".flac", ".m4a", ".aac",
)  # fmt: skip
"""Suffixes of files in a folder that are not opened to see whether they are media. Files with other suffixes are."""

BAD_ROW, DUPLICATE = "bad row", "duplicate"
NO_CAPTION, BAD_CAPTION, LONG_CAPTION = "no caption", "bad caption", "long caption"
BROKEN_TAR, NO_END, BROKEN_TABLE = "broken tar", "tar without an end", "broken table"
MISSING, NOT_A_FILE, UNREADABLE, TOO_SHORT = "missing file", "not a file", "unreadable", "too short"
HDR = "high dynamic range"
OUT_OF_MEMORY = "out of memory"

MAX_CAPTION_LENGTH = 10_000
"""Largest number of characters of a caption. Long captions by people or models have about a tenth of it."""

WRITTEN_FOR_NOTHING = ("nan", "NaN", "None", "none", "null", "NULL", "<NA>", "N/A", "#N/A", "undefined")
"""What programs write for a caption that is missing, as pandas and Python do where a table is made text."""

_ODD = r"[\ud800-\udfff]"
_ODD_IN_ROW = rf"{_ODD}|\Ar(?=ow [0-9]+\Z)|@(?=[0-9.e+-]+\Z)|\((?=again [0-9]+\)\Z)"


@dataclass(frozen=True)
class Item:
    """A video or picture to ingest.

    id            name of the item, the same in every ingest of its source
    path          the file, or a tar file
    start, end    part of the video in seconds; end None: to the end of the video
    member        name of the file inside the tar; its bytes are offset .. offset + size of the tar
    problem       (reason, detail) if the item cannot be used
    """

    id: str
    path: str
    caption: str = ""
    start: float = 0.0
    end: float | None = None
    member: str | None = None
    offset: int = 0
    size: int = 0
    problem: tuple[str, str] | None = None


def as_text(name: str) -> str:
    r"""Return a name as valid UTF-8 text; different names give different texts.

    Python represents a byte that is not UTF-8 as a lone surrogate, which is replaced by an escape, for
    example ``\udcff``. If a name contains such an escape literally, its backslashes are doubled. All
    other names are returned unchanged.
    """
    return _escaped(name, _ODD)


def row_name(path: str) -> str:
    """Return a path of a table as `as_text` does, and also escape text that looks like a part of an id.

    Ingest makes ids with the parts "row N", "@START-END" and "(again N)".
    """
    return _escaped(path, _ODD_IN_ROW)


def _escaped(name: str, odd: str) -> str:
    def escape(found: re.Match[str]) -> str:
        code = ord(found[2])
        return found[1] * 2 + (f"\\u{code:04x}" if code > 255 else f"\\x{code:02x}")

    literal = r"\\+(?=x[0-9a-f]{2}|ud[89a-f][0-9a-f]{2})"
    return re.sub(rf"(?<!\\)(?:(\\*)({odd})|{literal})", lambda found: escape(found) if found[2] else found[0] * 2, name)


def problem_of(error: BaseException) -> tuple[str, str] | None:
    """Return (reason, detail) if bad data can make a reader raise this error.

    Return None if the error is a bug or is not caused by the item.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _took_too_much(cause):
            return OUT_OF_MEMORY, (str(cause).splitlines() or ["out of memory"])[0]
        cause = cause.__cause__
    if isinstance(error, HighDynamicRange):
        return HDR, str(error)
    if isinstance(error, (OSError, ValueError, OverflowError, RecursionError)):
        return UNREADABLE, str(error) or type(error).__name__
    return None


def _took_too_much(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    The message of an OSError is not searched, because it contains a file name, which can be any text.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def problem_of_file(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return (reason, detail) if `path` is not a regular file, else None. Pipes and devices are never opened."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING, f"there is no file {path}"
    except OSError as error:
        return UNREADABLE, f"cannot read {path}: {error.strerror}"
    except ValueError as error:  # a zero byte or a lone surrogate
        return MISSING, f"there can be no file of this name: {error}"
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return NOT_A_FILE, f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}; only regular files are read"


def problem_of_caption(caption: str) -> tuple[str, str] | None:
    """Return (reason, detail) if a caption, as one line, shows nothing, is not text or is too long, else None."""
    if wrong := wrong_character(caption):
        return BAD_CAPTION, f"the caption {wrong}"
    if is_blank(caption):
        return NO_CAPTION, "no caption in the source, beside the file or in --captions"
    if caption in WRITTEN_FOR_NOTHING:
        return NO_CAPTION, f"the caption is {caption!r}, which programs write where there is none"
    if len(caption) > MAX_CAPTION_LENGTH:
        return LONG_CAPTION, f"the caption has {len(caption):,} characters; at most {MAX_CAPTION_LENGTH:,} are allowed"
    return None
