"""Clips that are read with Pillow: animated pictures, and still pictures as clips of one frame."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from lumos.errors import UserError
from lumos.video import apng, gif
from lumos.video.apng import ApngFrame
from lumos.video.av_clip import Shown, check_pixels
from lumos.video.colour import profile_of_codes
from lumos.video.frames import picture_in_srgb, picture_rgb, true_info
from lumos.video.gif import GifFrame
from lumos.video.hdr import check_profile, check_transfer, picture_codes, picture_transfer

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
"""The formats that are read, without EPS, for which Pillow would start Ghostscript."""
MAX_ANIMATION_PIXELS = 20_000_000_000
"""Largest number of pixels of all frames of an animated picture: about 10 000 frames of 1920 x 1080. A small file can
have many frames, because a frame can take a few bytes."""
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
Part = TypeVar("Part", GifFrame, ApngFrame)
_TILE_WIDTH, _TILE_LENGTH, _SUBFILE, _DNG_VERSION = 322, 323, 254, 50706  # tags of a TIFF
_REDUCED = 1  # a bit of _SUBFILE


def is_picture_file(path: Path) -> bool:
    """Return whether the content of a file is that of a picture, still or animated, whatever its name."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False


def is_still_file(path: Path) -> bool:
    """Return whether the content of a file is that of a picture that does not move. No picture is decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format in ANIMATED:
                return getattr(image, "n_frames", 1) - bool(getattr(image, "default_image", False)) <= 1
    except UnidentifiedImageError:
        return False
    return not is_film_of_jpegs(path)


def is_film_of_jpegs(path: Path) -> bool:
    """Return whether a file is a film of JPEG pictures one after another: whether the second is as large as the first.

    A photograph with a preview behind it is none, and neither is one of several pictures with a table of them (MPO).
    """
    with path.open("rb") as file:
        if file.read(3) != b"\xff\xd8\xff":
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            first, *more = islice(_jpeg_sizes(data), 2)
            return first is not None and more == [first]


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # not those without a length that stand inside of a picture
_START, _END, _TABLE = 0xD8, 0xD9, 0xE2
_NO_SIZES = (0xC4, 0xC8, 0xCC)  # of 0xC0 to 0xCF, the others begin a frame and state its size


def _jpeg_sizes(data: mmap.mmap) -> Iterator[bytes | None]:
    """Yield the height and width, in bytes, of each JPEG picture that begins where the one before ends; None for the end."""
    at, size = 2, None
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker == _END:
            yield size
            if data[at : at + 2] != bytes((0xFF, _START)):
                break
            at, size = at + 2, None
        elif marker == _TABLE and data[at + 2 : at + 6] == b"MPF\0":
            break
        else:
            if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZES:
                size = data[at + 3 : at + 7]
            at += max(int.from_bytes(data[at : at + 2]), 2)
    yield None


def open_picture(path: str | Path, max_pixels: int) -> Image.Image:
    """Open a picture.

    Raise UserError if it, or a tile of a TIFF, which can be larger, has more than ``max_pixels`` pixels, and if it is HDR.
    """
    image = Image.open(path, formats=FORMATS)
    try:
        _check_picture(path, image, max_pixels)
        _check_no_raw(path, image)
        check_transfer(path, picture_transfer(path, image.format or ""), "picture")
        check_profile(path, image.info.get("icc_profile"))
        if image.format == "PNG" or not image.info.get("icc_profile"):  # in a PNG, codes come before a profile
            for codes in picture_codes(path, image.format or "")[:1]:
                image.info["icc_profile"] = profile_of_codes(*codes)
                image.info["srgb"] = 0  # what the file says in other forms does not count
        image.info |= true_info(image)
        if image.format == "WEBP" and getattr(image, "is_animated", False) and image.mode == "RGB":
            # What no frame covers is transparent, even if no frame is; Pillow's decoder knows it, but leaves it out.
            image._mode = image.rawmode = "RGBA"
    except UserError:
        image.close()
        raise
    return image


class PillowClip:
    """An animated picture (GIF, WebP, PNG, AVIF); a still picture is a clip of one frame.

    The default picture of an animated PNG is no frame if the file says so.
    """

    fps = None  # `read_video` computes the rate, because each frame has its own duration

    def __init__(self, path: Path, max_pixels: int):
        self.path, self.max_pixels = path, max_pixels
        with Image.open(path, formats=FORMATS) as image:
            self.is_gif = image.format == "GIF"
            self.is_apng = image.format == "PNG" and getattr(image, "is_animated", False)
        self.rounding = 5e-3 if self.is_gif else 5e-4  # half of the unit of the durations
        self.early = self.rounding + 1e-6

    def times(self) -> list[float]:
        """Return the time in seconds at which each frame comes on screen."""
        return [shown.begin + self.early for shown in self.frames(0.0)]

    def last_time(self) -> float:
        """Return the time in seconds at which the last frame comes on screen."""
        return max(self.times())

    def close(self) -> None:
        """Do nothing: the file is open only while frames are read."""

    def frames(self, start: float) -> Iterator[Shown]:
        """Yield all frames in order; ``start`` is not used."""
        begin = pixels = 0  # begin in ms
        read = self._gif_frames if self.is_gif else self._apng_frames if self.is_apng else self._frames
        with closing(read()) as frames:
            for frame, duration in frames:
                pixels += frame.width * frame.height
                if pixels > MAX_ANIMATION_PIXELS:
                    raise UserError(
                        f"{self.path} has over {MAX_ANIMATION_PIXELS / 1e6:g} megapixels in all its frames; convert it to mp4"
                    )
                end = begin + duration
                yield Shown(begin / 1000 - self.early, end / 1000 - self.early, partial(self._rgb, frame))
                begin = end

    def _frames(self) -> Iterator[tuple[Image.Image, float]]:
        """Yield each frame and its duration in ms."""
        with open_picture(self.path, self.max_pixels) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                _check_picture(self.path, frame, self.max_pixels)
                if image.format not in ANIMATED and number:
                    return  # the other pictures of a TIFF or of a photograph are no frames
                frame.load()  # the duration of a WebP frame is known after decoding
                yield frame, frame.info.get("duration", 0) or 100  # 0 counts as 100, as in browsers

    def _gif_frames(self) -> Iterator[tuple[Image.Image, float]]:
        size = gif.screen_size(self.path)
        check_pixels(self.path, *size, self.max_pixels)
        yield from gif.composed(self._small_enough(gif.parts(self.path)), size)

    def _apng_frames(self) -> Iterator[tuple[Image.Image, float]]:
        with open_picture(self.path, self.max_pixels) as image:
            colours = {key: image.info[key] for key in ("icc_profile", "srgb") if key in image.info}
            image.getexif()  # reads on to where it may stand
            about = {key: image.info[key] for key in ("exif",) if key in image.info}

        def rgba(part: Image.Image) -> Image.Image:
            part.info |= true_info(part) | colours
            return picture_in_srgb(part, self.path).convert("RGBA")

        for screen, duration in apng.composed(self._small_enough(apng.parts(self.path)), image.size, rgba):
            screen.info |= about
            yield screen, duration

    def _small_enough(self, stored: Iterator[Part]) -> Iterator[Part]:
        for part in stored:
            check_pixels(self.path, part.width, part.height, self.max_pixels)
            yield part

    def _rgb(self, frame: Image.Image) -> np.ndarray:
        return picture_rgb(ImageOps.exif_transpose(frame), self.path)


def _check_picture(path: str | Path, image: Image.Image, max_pixels: int) -> None:
    check_pixels(path, image.width, image.height, max_pixels)
    if isinstance(image, TiffImageFile):
        width, length = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        check_pixels(path, width, length, max_pixels, "tiles of ")


def _check_no_raw(path: str | Path, image: Image.Image) -> None:
    """Raise UserError for the raw data of a camera, whose file looks like a TIFF of a small preview."""
    if isinstance(image, TiffImageFile):
        with open(path, "rb") as file:
            is_canon = file.read(10)[8:] == b"CR"
        if is_canon or _DNG_VERSION in image.tag_v2 or image.tag_v2.get(_SUBFILE, 0) & _REDUCED:
            raise UserError(
                f"{path} begins with a preview, as raw photographs of cameras do, which cannot be read; convert it to PNG or JPEG"
            )
