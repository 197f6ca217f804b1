"""Checks and loading of the inputs of a call: prompts, seeds, lengths, pictures and clips."""

from __future__ import annotations

import hashlib
import operator
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumos.data.buckets import bucket_for
from lumos.errors import UserError, shown
from lumos.pipeline.defaults import ClipDefaults
from lumos.settings import is_whole
from lumos.video.frames import as_uint8
from lumos.video.io import MAX_FRAMES, count_frames, fit, read_image, read_video
from lumos.wording import is_blank, one_line, wrong_character

MAX_SEED = 2**64 - 1


def check_prompt(prompt: Any, needs_words: bool = True, what: str = "prompt") -> str:
    """Return the prompt as the network reads it (`lumos.wording.one_line`).

    UserError if it is no text, has lost or control characters, or shows nothing and `needs_words`.
    """
    if not isinstance(prompt, str):
        raise UserError(f"the {what} is {shown(prompt)}; give a string")
    line = one_line(prompt)
    if wrong := wrong_character(line):
        raise UserError(f"the {what} {shown(prompt)} {wrong}")
    if is_blank(line):
        if needs_words:
            raise UserError(f"the prompt is empty ({shown(prompt)}); say in words what the clip shows")
        return ""
    return line


def check_num_frames(num_frames: int, stride: int, name: str = "num_frames") -> None:
    if not is_whole(num_frames):
        raise UserError(f"{name} {shown(num_frames)} is not allowed; give a whole number, 1 + a multiple of {stride}")
    if num_frames < 1 or (num_frames - 1) % stride:
        below = max(1, 1 + (num_frames - 1) // stride * stride)
        raise UserError(
            f"{name} {num_frames} is not allowed; it must be 1 + a multiple of {stride}, for example "
            f"{below} or {below + stride}"
        )


def override(defaults: Any, **given: Any) -> Any:
    """Return a copy of a settings dataclass in which the arguments that are not None replace fields."""
    values = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    return type(defaults)(**{**values, **{k: v for k, v in given.items() if v is not None}})


def align(
    prompt: Any, negative_prompt: Any = None, image: Any = None, video: Any = None, last_image: Any = None,
    given_frames: Any = None, seed: Any = None, *, needs_words: bool = True,
) -> dict[str, list]:  # fmt: skip
    """Return all arguments as lists of one length, by name, with a seed for each clip.

    A single value is repeated. UserError for lists of different lengths, and for an argument that
    is None for some clips only. needs_words: an empty prompt is an error.
    """
    given = {
        "prompt": prompt, "negative_prompt": negative_prompt, "image": image, "video": video, "last_image": last_image,
        "given_frames": given_frames, "seed": seed,
    }  # fmt: skip
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list | tuple)}
    count = max(lengths.values(), default=1)
    if not count:
        raise UserError(f"{next(iter(lengths))} is an empty list; give at least one, or a single value without a list")
    for name, length in lengths.items():
        if length != count:
            raise UserError(f"{name} is a list of {length}, but there are {count} clips to make: {lengths}")
    lists = {name: list(v) if name in lengths else [v] * count for name, v in given.items()}
    lists["prompt"] = [check_prompt(text, needs_words) for text in lists["prompt"]]
    lists["negative_prompt"] = [
        None if text is None else check_prompt(text, False, "negative prompt") for text in lists["negative_prompt"]
    ]
    for name in ("negative_prompt", "image", "video", "last_image", "given_frames"):
        if len({value is None for value in lists[name]}) > 1:
            raise UserError(f"{name} is given for some clips and None for others; make them in two calls")
    if "seed" not in lengths:
        first = secrets.randbelow(2**31) if seed is None else whole_seed(seed)
        lists["seed"] = [first + i for i in range(count)]
    lists["seed"] = [whole_seed(s) for s in lists["seed"]]
    return lists


def whole_seed(seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value <= MAX_SEED:
        raise UserError(f"seed {shown(seed)} is not allowed; give a whole number from 0 to {MAX_SEED}")
    return value


def generator_of(seed: int) -> torch.Generator:
    """Return a CPU generator for the seed of a clip, from 0 to MAX_SEED.

    Torch's generator reads 32 bits of a seed, so a larger one is replaced by a hash of all its bits.
    """
    if seed >= 1 << 32:
        seed = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=4).digest(), "little")
    return torch.Generator().manual_seed(seed)


def without_effect(where: str, **options: Any) -> None:
    """Warn about the options that are not None, because they have no effect on `where`, for example "a picture"."""
    if given := [f"{name}={value}" for name, value in options.items() if value is not None]:
        warnings.warn(f"{', '.join(given)} has no effect on {where}", stacklevel=3)


def load_image(image: Any) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3]. image: a path, a PIL picture, an array or a tensor."""
    return read_image(image) if isinstance(image, str | Path) else as_uint8(image, "image", ndim=3, also="a path, ")


def path_or_frames(video: Any) -> str | Path | np.ndarray:
    """Return a path unchanged, or frames as uint8 [T, H, W, 3]."""
    return video if isinstance(video, str | Path) else as_uint8(video, "video", also="a path, ")


def clip_length(video: str | Path | np.ndarray, fps: int) -> int:
    """Return how many frames a clip has at `fps` frames per second."""
    return len(video) if isinstance(video, np.ndarray) else count_frames(video, fps)


def load_video(video: str | Path | np.ndarray, clip: ClipDefaults, count: int) -> np.ndarray:
    """Return the last `count` frames of a video, fitted to the size of `clip`, uint8 [count, H, W, 3].

    video: a path, which is read at clip.fps frames per second, or frames uint8 [T, H, W, 3].
    UserError if there are too few frames.
    """
    size = (clip.height, clip.width)
    if not isinstance(video, np.ndarray):
        return read_video(video, fps=clip.fps, num_frames=count, from_end=True, size=size)[0]
    if len(video) < count:
        raise UserError(f"video has {len(video)} frames, {count} are needed; give a longer clip, or a lower num_given_frames")
    return fit(video[-count:], *size)


def each_once(made_of: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return made_of(item) for each item.

    Items that are the same path or object share one result, computed once.
    """
    keys = [str(item) if isinstance(item, str | Path) else id(item) for item in items]
    made = {key: made_of(item) for key, item in dict(zip(keys, items, strict=True)).items()}
    return [made[key] for key in keys]


def fit_to_pictures(pictures: Sequence[np.ndarray], clip: ClipDefaults, size_unit: int) -> ClipDefaults:
    """Return the clip with the height and width of the bucket, of area target_size squared, that fits the pictures.

    UserError if the pictures need different buckets.
    """
    sizes = {bucket_for(*p.shape[:2], clip.target_size, size_unit) for p in pictures}
    if len(sizes) > 1:
        raise UserError(f"the pictures ask for different sizes {sorted(sizes)}; give height and width, or use several calls")
    ((height, width),) = sizes
    return override(clip, height=height, width=width)


def load_videos(videos: Sequence[Any], clip: ClipDefaults, count: int | None, stride: int) -> list[np.ndarray]:
    """Return the given frames of each clip, uint8 [count, H, W, 3], from the ends of the videos.

    count: 1 + a multiple of `stride`; None: as many frames as the videos have, at most half of the
    clip. UserError if count is None and the videos have different numbers of frames to give.
    """
    videos = each_once(path_or_frames, videos)
    if count is None:
        wanted = 1 + min(clip.num_frames // 2, MAX_FRAMES - 1) // stride * stride
        counts = {1 + (min(wanted, n) - 1) // stride * stride for n in each_once(lambda v: clip_length(v, clip.fps), videos)}
        if len(counts) > 1:
            raise UserError(f"the videos would give {sorted(counts)} frames each; set num_given_frames, or use several calls")
        (count,) = counts
    check_num_frames(count, stride, "num_given_frames")
    return each_once(lambda v: load_video(v, clip, count), videos)
