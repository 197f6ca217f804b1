"""Functions on frames as arrays: scaling and cropping, conversion to tensors and back, and contact sheets.

Shapes: B batch, T frames, H W rows and columns. Arrays are uint8 [T, H, W, 3], tensors are [3, T, H, W] in [-1, 1].
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

from lumos.errors import NotFinite, UserError, printable
from lumos.files import replacing
from lumos.video.colour import profile_of_picture
from lumos.video.hdr import check_profile

WHITE_IS_ZERO = "white is zero"
"""Key of the `info` of a picture whose levels are those of ink."""
WHITE_LEVEL = "white level"
"""Key of the `info` of a grey picture for the level of white, where the file states it and the mode does not."""
_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF
MAX_SCALED_PIXELS = 40_000_000
"""Largest number of pixels of a frame that covers its target and is not yet cropped. Only very thin pictures need more."""


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale frames uint8 [T, H, W, 3] so that they cover height x width, and crop the centre.

    Return frames uint8 [T, height, width, 3]. As in the published preparation, frames are halved with a
    box filter while both sides are at least twice the target, and then scaled bicubically. Raise
    UserError if height or width is below 1, or if the frames are so thin that covering the target would take
    more than MAX_SCALED_PIXELS.
    """
    if height < 1 or width < 1:
        raise UserError(f"cannot fit frames to {width}x{height} pixels; both must be positive")
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([_fit_one(Image.fromarray(frame), height, width) for frame in frames])


def crop_offset(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns that `fit` cuts off above and left, in pixels of the scaled frame.

    original, size: (height, width) of the frames before and after.
    """
    (high, wide), (height, width) = original, size
    scale = max(width / wide, height / high)
    return (max(height, round(high * scale)) - height) // 2, (max(width, round(wide * scale)) - width) // 2


def _fit_one(image: Image.Image, height: int, width: int) -> np.ndarray:
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if across * down > MAX_SCALED_PIXELS:
        raise UserError(
            f"a picture of {image.width}x{image.height} pixels is too thin for {width}x{height} pixels: it would be scaled to "
            f"{across}x{down} pixels before it is cropped; crop it first"
        )
    image = image.resize((across, down), Image.Resampling.BICUBIC)
    left, top = (across - width) // 2, (down - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Convert a video [(B,) 3, T, H, W] in [-1, 1] to frames uint8 [(B,) T, H, W, 3].

    Raise NotFinite if a value is not finite.
    """
    if not torch.isfinite(video).all():
        raise NotFinite("the video holds values that are not finite; use dtype float32, or check the weights")
    levels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(-4, -1).contiguous().cpu().numpy()


def from_uint8(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert frames uint8 [(B,) T, H, W, 3] to a video float32 [(B,) 3, T, H, W] in [-1, 1].

    This is the inverse of :func:`to_uint8`.
    """
    frames = frames if isinstance(frames, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
    return (frames.movedim(-1, -4).float() / 127.5 - 1).contiguous()


def as_uint8(frames: Any, name: str = "frames", ndim: int = 4, also: str = "") -> np.ndarray:
    """Convert frames of any `output_type` of the pipeline to uint8 [T, H, W, 3].

    Frames can be an array [T, H, W, 3] or a tensor [T, 3, H, W], uint8 or floats in [0, 1], or a list of
    pictures. A fourth channel is opacity; transparent parts are put on white. With `ndim` 3 the input is one
    picture: an array [H, W, 3], a tensor [3, H, W] or a PIL picture. The result then is uint8 [H, W, 3].

    Raise UserError for other inputs. Its message calls the input `name`; `also` names other inputs that
    the caller accepts, for example "a path, ".
    """
    array = _as_array(frames, name)
    if np.issubdtype(array.dtype, np.floating) and array.size and array.min() >= 0 and array.max() <= 1:
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.uint8 and array.ndim == ndim and array.shape[-1] == 4:
        array = on_white(array)
    if array.dtype != np.uint8 or array.ndim != ndim or array.shape[-1] != 3 or 0 in array.shape:
        given = f"{frames.dtype} {list(frames.shape)}" if hasattr(frames, "shape") else f"of type {type(frames).__name__}"
        found = f"; these have values from {array.min():g} to {array.max():g}" if array.size and array.dtype.kind == "f" else ""
        array_form, tensor_form, pictures = (
            ("[T, H, W, 3]", "[T, 3, H, W]", "a list of pictures") if ndim == 4 else ("[H, W, 3]", "[3, H, W]", "a PIL picture")
        )
        raise UserError(
            f"{name} {given} cannot be read; give {also}uint8 or floats in [0, 1] as an array {array_form} or a tensor "
            f"{tensor_form}, or {pictures}{found}"
        )
    return array


def _as_array(frames: Any, name: str) -> np.ndarray:
    """Return frames as an array with the colours in the last axis; an empty array for other inputs."""
    if isinstance(frames, np.ndarray):
        return frames
    if isinstance(frames, Image.Image):
        return picture_rgb(upright(frames))
    if is_pictures(frames):
        pictures = [as_uint8(picture, name, ndim=3) for picture in frames]
        if len(sizes := {(width, height) for height, width, _ in (picture.shape for picture in pictures)}) > 1:
            raise UserError(f"{name} are pictures of different sizes {sorted(sizes)}; give one size")
        return np.stack(pictures)
    if isinstance(frames, torch.Tensor) and frames.ndim >= 3:
        return np.moveaxis((frames.float() if frames.is_floating_point() else frames).numpy(force=True), -3, -1)
    return np.empty(0)


def on_white(pictures: np.ndarray) -> np.ndarray:
    """Return pictures uint8 [..., 4] with opacity as the last channel on a white ground, uint8 [..., 3]."""
    opacity = pictures[..., 3:].astype(np.float32) / 255
    return (pictures[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


def upright(image: Image.Image) -> Image.Image:
    """Return a copy of a PIL picture, turned and mirrored as its EXIF says, with what `true_info` says of it."""
    info = true_info(image)  # not known after the copy, which reads the pixels
    turned = ImageOps.exif_transpose(image)
    turned.info |= info
    return turned


def true_info(image: Image.Image) -> dict[str, Any]:
    """Return what Pillow leaves out or says wrongly in the `info` of a picture that is not read yet."""
    info: dict[str, Any] = {}
    if (clear := _clear_colour(image)) is not None:
        info["transparency"] = clear
    if image.format == "TIFF" and image.mode not in ("1", "L", "P") and image.tag_v2.get(_PHOTOMETRIC) == 0:
        info[WHITE_IS_ZERO] = True  # Pillow turns only grey of up to 8 bits
    if image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(_BITS) == (12,):
        info[WHITE_LEVEL] = 4095
    if image.format == "PPM" and image.mode == "I":
        info[WHITE_LEVEL] = 65535  # Pillow scales the levels to it
    if (profile := profile_of_picture(image)) is not None:
        info["icc_profile"] = profile
    return info


def _clear_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return the transparent colour of a PNG whose pixels are not read yet, in the levels of its pixels; None for other pictures.

    Pillow reads grey of 2 and 4 bits and RGB of 16 bits as 8 bits, but leaves the transparent colour as it is in the file. Of
    16 bits the upper 8 are compared.
    """
    clear, tile = image.info.get("transparency"), getattr(image, "tile", ())
    levels = str(tile[0][3]) if image.format == "PNG" and tile else ""
    if isinstance(clear, int) and levels in ("L;2", "L;4"):
        return clear * 255 // (3 if levels == "L;2" else 15)
    if isinstance(clear, tuple) and levels == "RGB;16B":
        return tuple(value >> 8 for value in clear)
    return None


def picture_rgb(image: Image.Image, name: str | Path = "the given picture") -> np.ndarray:
    """Return a PIL picture of any mode as uint8 [H, W, 3] in sRGB; transparent parts are put on white.

    Raise UserError for levels whose range is not known, and for HDR. Its message calls the picture `name`.
    """
    shown = picture_in_srgb(image, name)
    if shown.mode == "RGBA":
        white = Image.new("RGBA", shown.size, "white")
        white.alpha_composite(shown)
        shown = white.convert("RGB")
    return np.array(shown)


def picture_in_srgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Return a PIL picture of any mode in sRGB: as RGBA if parts of it may be transparent, else as RGB; for errors see above."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        white = image.info.get(WHITE_LEVEL) or _top_level(values, image.mode, name)
        levels = np.minimum(values * (255 / white), 255)
        grey = Image.fromarray((255 - levels if image.info.get(WHITE_IS_ZERO) else levels).round().astype(np.uint8))
        grey.info = {key: image.info[key] for key in ("icc_profile",) if key in image.info}
        rgb = _in_srgb(grey, name).convert("RGB")
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # the value that is transparent
            rgb.putalpha(Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255))))
        return rgb
    image = _in_srgb(image, name)
    if image.has_transparency_data:  # of a palette too
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return image.convert("RGB")


def _top_level(values: np.ndarray, mode: str, name: str | Path) -> int:
    """Return the level of white of a grey picture of mode I;16, I or F: 1, 255 or 65535.

    A picture of 32 bits does not state it. It is 255 for whole numbers up to 255, into which Pillow converts 8 bits.
    """
    if mode.startswith("I;16"):
        return 65535
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if mode == "I" and low >= 0 and high <= 65535:
        return 255 if high <= 255 else 65535
    if mode == "F" and low >= 0 and (high <= 1 or 2 <= high <= 255):
        return 1 if high <= 1 else 255
    allowed = "0 to 255 or 0 to 65535" if mode == "I" else "0 to 1 or 0 to 255"
    raise UserError(f"{name} has grey levels from {low:g} to {high:g}, whose white is not known; scale them to {allowed}")


def _in_srgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Return a picture with the colours of its ICC profile as sRGB; a picture without a usable profile as it is."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    check_profile(name, profile)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in ("RGB", "GRAY", "CMYK") or (space == "GRAY" and image.mode not in ("L", "1", "LA", "La")):
            return image
        opacity = None
        if image.has_transparency_data:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            opacity = image.getchannel("A")
        colours = image.convert({"GRAY": "L"}.get(space, space))
        made = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        if opacity is not None:
            made.putalpha(opacity)
        return made
    except (ImageCms.PyCMSError, OSError, ValueError):  # a profile that is damaged or of a device of another kind
        return image


def is_pictures(value: Any) -> bool:
    """Return whether `value` is a list of at least one picture: a PIL picture, an array [H, W, C] or a tensor [C, H, W]."""
    return isinstance(value, list | tuple) and bool(value) and all(
        isinstance(item, Image.Image) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 3) for item in value
    )


def contact_sheet(
    clips: Sequence[np.ndarray],
    labels: Sequence[str],
    path: str | Path,
    *,
    columns: int = 6,
    cell: int = 96,
    across: int = 1,
) -> Path:
    """Draw clips uint8 [T, H, W, 3] into one PNG file and return its path.

    Each clip is drawn as ``columns`` evenly spaced frames under its label of up to two lines. ``cell``
    is the width of a frame in pixels, and ``across`` is the number of clips in a row of the sheet.
    Raise UserError if there is no clip, if there are not as many labels as clips, or if a number is below 1.
    """
    if not clips or len(clips) != len(labels):
        raise UserError(
            f"a contact sheet needs at least one clip and as many labels as clips; given {len(clips)} clips, {len(labels)} labels"
        )
    if min(columns, cell, across) < 1:
        raise UserError(f"columns {columns}, cell {cell} and across {across} must all be at least 1")
    font = ImageFont.load_default(13)
    gap, line = 4, 16
    tallest = max(round(cell * clip.shape[1] / clip.shape[2]) for clip in clips)
    strip_width = columns * (cell + gap) + 2 * gap
    texts = [_lines(label, font, strip_width - 2 * gap, 2) for label in labels]
    text_height = line * max(map(len, texts)) + gap
    strip_height = text_height + tallest + 2 * gap
    rows = math.ceil(len(clips) / across)
    sheet = Image.new("RGB", (min(across, len(clips)) * strip_width, rows * strip_height), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (clip, text_lines) in enumerate(zip(clips, texts, strict=True)):
        left, top = (n % across) * strip_width + gap, (n // across) * strip_height
        for row, text in enumerate(reversed(text_lines), 1):  # the last line is directly above the frames
            draw.text((left, top + text_height - 2 - row * line), text, fill="black", font=font)
        for column, t in enumerate(np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)):
            picture = Image.fromarray(clip[t]).resize((cell, round(cell * clip.shape[1] / clip.shape[2])))
            sheet.paste(picture, (left + column * (cell + gap), top + text_height))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
    return Path(path)


def animated_sheet(
    clips: Sequence[np.ndarray],
    labels: Sequence[str],
    path: str | Path,
    fps: float,
    *,
    cell: int = 128,
    across: int = 4,
    hold: float = 0.8,
) -> Path:
    """Write clips uint8 [T, H, W, 3] side by side into one looping .webp or .gif file and return its path.

    The label of a clip is below it, on up to five lines. ``cell`` is the width of a clip in pixels, and
    ``across`` is the number of clips in a row. A shorter clip stays on its last frame until the longest
    clip ends, and then all clips stay for ``hold`` seconds. Raise UserError for another suffix, if there
    is no clip, or if there are not as many labels as clips.
    """
    check_animated(path)
    if not clips or len(clips) != len(labels):
        raise UserError(
            f"an animated sheet needs at least one clip and as many labels as clips; given {len(clips)} clips, {len(labels)} labels"
        )
    font, gap, line = ImageFont.load_default(11), 6, 13
    texts = [_lines(label, font, cell, 5) for label in labels]
    lines = max(map(len, texts))
    tallest = max(round(cell * clip.shape[1] / clip.shape[2]) for clip in clips)
    wide, high = cell + gap, tallest + lines * line + gap
    rows = math.ceil(len(clips) / across)
    page = Image.new("RGB", (min(across, len(clips)) * wide + gap, rows * high + gap), "white")
    draw = ImageDraw.Draw(page)
    places = [(gap + (n % across) * wide, gap + (n // across) * high) for n in range(len(clips))]
    for (left, top), text_lines in zip(places, texts, strict=True):
        for n, text in enumerate(text_lines):
            draw.text((left, top + tallest + n * line), text, fill="black", font=font)
    pages = []
    for t in range(max(map(len, clips))):
        page = page.copy()
        for (left, top), clip in zip(places, clips, strict=True):
            picture = Image.fromarray(clip[min(t, len(clip) - 1)])
            page.paste(picture.resize((cell, round(cell * clip.shape[1] / clip.shape[2]))), (left, top))
        pages.append(page)
    waits = [round(1000 / fps)] * (len(pages) - 1) + [round(1000 / fps + 1000 * hold)]
    with replacing(path) as temporary:
        options = {"quality": 80, "method": 6} if Path(path).suffix.lower() == ".webp" else {}
        pages[0].save(temporary, Path(path).suffix[1:], save_all=True, append_images=pages[1:], duration=waits, loop=0, **options)
    return Path(path)


def check_animated(path: str | Path) -> None:
    """Raise UserError unless the suffix of `path` is one that `animated_sheet` writes."""
    if Path(path).suffix.lower() not in (".webp", ".gif"):
        raise UserError(f"{path} cannot be animated; name a .webp or .gif file")


def _lines(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """Break a label into at most `most` lines of whole words; shorten lines that are wider than `width` pixels."""
    words, lines = printable(" ".join(label.split())).split(), []
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_shortened(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*lines, _shortened(" ".join(words), font, width)] if words else lines


def _shortened(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the label, cut and with "..." at its end if it is wider than `width` pixels."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    fitting = bisect_right(range(len(label)), width, key=lambda count: font.getlength(label[:count] + "..."))
    return label[: max(0, fitting - 1)] + "..."


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two clips or pictures, uint8 [..., H, W, 3]; infinity for equal clips.

    The ratio is that of 255^2 to the mean squared error over all values.
    """
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
