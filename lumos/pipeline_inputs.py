"""What a call is given, checked: prompts, seeds, lengths, pictures and clips, and parts that belong together."""

from __future__ import annotations

import operator
import random
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lumos.configuration import LumosConfig
from lumos.errors import UserError, shown
from lumos.frames import as_uint8
from lumos.generation.engine import cache_tokens
from lumos.generation.settings import ClipDefaults, GenerationSettings, is_whole
from lumos.generation.thinning import thins
from lumos.sequence import prompt_text
from lumos.video_io import count_frames, fit, read_image, read_video
from tokenizer import TextTokenizer, VideoTokenizer

MAX_SEED = 2**63 - 1


def prompt_ids(prompt: str, clip: ClipDefaults, config: LumosConfig, tokenizer: TextTokenizer) -> list[int]:
    """Ids of the text that the decoder reads for a prompt; UserError if it is empty or too long."""
    shape = {name: getattr(clip, name) for name in ("height", "width", "num_frames", "fps")}
    ids = tokenizer.encode(prompt_text(config, check_prompt(prompt), **shape))
    if len(ids) > config.max_prompt_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens; this model reads at most {config.max_prompt_tokens}: shorten it")
    return ids


def check_agreement(config: LumosConfig, text_tokenizer: TextTokenizer, video_tokenizer: VideoTokenizer) -> None:
    """UserError where the tokenizers cannot be this model's."""
    check_text_tokenizer(config, text_tokenizer)
    for what, ours, theirs in (
        ("codes", config.visual_token_count, video_tokenizer.num_codes),
        ("temporal compression", config.temporal_compression, video_tokenizer.temporal_compression),
        ("spatial compression", config.spatial_compression, video_tokenizer.spatial_compression),
    ):
        if ours != theirs:
            raise UserError(f"the model expects {what} {ours}, the video tokenizer has {theirs}: they do not belong together")


def check_text_tokenizer(config: LumosConfig, tokenizer: TextTokenizer) -> None:
    """UserError if it uses ids for text that mean something else to the model."""
    if reserved := [i for i in range(tokenizer.max_text_id + 1) if config.is_reserved(i) and tokenizer.is_text(i)]:
        raise UserError(f"the text tokenizer uses id {reserved[0]} for text, the model for itself: they do not belong together")


def check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"the prompt is {shown(prompt)}; give a string")
    if not prompt.strip():
        raise UserError(f"the prompt is empty ({shown(prompt)}); say in words what the clip shows")
    return prompt


def check_num_frames(num_frames: int, stride: int, name: str = "num_frames") -> None:
    if not is_whole(num_frames):
        raise UserError(f"{name} {shown(num_frames)} is not allowed; give a whole number, 1 + a multiple of {stride}")
    if num_frames < 1 or (num_frames - 1) % stride:
        below = max(1, 1 + (num_frames - 1) // stride * stride)
        raise UserError(
            f"{name} {num_frames} is not allowed; it must be 1 + a multiple of {stride}, for example "
            f"{below} or {below + stride}"
        )


def check_length(text: int, span: int, frames: int, settings: GenerationSettings, config: LumosConfig) -> None:
    """UserError if a frame would see more tokens than the model was made for; a warning if only positions go beyond that.

    text: tokens before the frames; span: of a frame; frames: latent frames of the clip.
    """
    seen, last = cache_tokens(text, span, frames, settings.history_frames), cache_tokens(text, span, frames)
    limit, bound = config.max_position_embeddings, settings.history_frames
    if seen > limit:
        way = "or bound what a frame sees with history_frames" if bound is None else f"or lower history_frames {bound}"
        raise UserError(
            f"the clip needs {seen} tokens, this model was made for at most {limit}; ask for fewer frames or a smaller size, {way}"
        )
    if last > limit:
        far = "text, first frame and old frames" if settings.history_thinning else "text and first frame"
        warnings.warn(
            f"the clip's positions go up to {last}, this model was made for {limit}: how far away {far} are is "
            "beyond what it may have learned"
        )


def override(defaults: Any, **given: Any) -> Any:
    """A copy of a settings dataclass with what is not None replaced."""
    values = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    return type(defaults)(**{**values, **{k: v for k, v in given.items() if v is not None}})


def align(prompt: Any, negative_prompt: Any = None, image: Any = None, video: Any = None, seed: Any = None) -> dict[str, list]:
    """Single values and lists -> lists of one length, by name."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt, "image": image, "video": video, "seed": seed}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list | tuple)}
    count = max(lengths.values(), default=1)
    if not count:
        raise UserError(f"{next(iter(lengths))} is an empty list; give at least one, or a single value without a list")
    for name, length in lengths.items():
        if length != count:
            raise UserError(f"{name} is a list of {length}, but there are {count} clips to make: {lengths}")
    lists = {name: list(v) if name in lengths else [v] * count for name, v in given.items()}
    for text in lists["prompt"]:
        check_prompt(text)
    for name in ("negative_prompt", "image", "video"):
        if len({value is None for value in lists[name]}) > 1:
            raise UserError(f"{name} is given for some clips and None for others; make them in two calls")
    if "seed" not in lengths:
        first = random.randrange(2**31) if seed is None else whole_seed(seed)
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


def without_effect(where: str, **options: Any) -> None:
    """Say which of these were given although they change nothing."""
    if given := [f"{name}={value}" for name, value in options.items() if value is not None]:
        warnings.warn(f"{', '.join(given)} has no effect on {where}", stacklevel=3)


def check_effect(latents: int, new_frames: int, asked: Any, settings: GenerationSettings) -> None:
    """Warnings for what was asked for although a clip of so many latent frames, `new_frames` of them made, is the same without.

    asked: has what was given, or None, by the names of GenerationSettings; settings: what came of it.
    """
    clip, history = f"a clip of {latents} latent frames", settings.history_frames
    if new_frames == 1:
        without_effect("a single new latent frame", later_steps=asked.later_steps)
    if history is None:
        return
    if latents <= 2 + history:
        without_effect(clip, history_frames=asked.history_frames, history_thinning=asked.history_thinning or None)
    elif not thins(latents, history):
        without_effect(f"{clip} with history_frames {history}", history_thinning=asked.history_thinning or None)


def load_image(image: Any) -> np.ndarray:
    """A path, a PIL picture, an array or a tensor -> uint8 [H, W, 3]."""
    return read_image(image) if isinstance(image, str | Path) else as_uint8(image, "image", ndim=3, also="a path, ")


def path_or_frames(video: Any) -> str | Path | np.ndarray:
    """A path as it is, or frames as uint8 [T, H, W, 3]."""
    return video if isinstance(video, str | Path) else as_uint8(video, "video", also="a path, ")


def clip_length(video: str | Path | np.ndarray, fps: int) -> int:
    """Frames that a clip has at this rate."""
    return len(video) if isinstance(video, np.ndarray) else count_frames(video, fps)


def load_video(video: str | Path | np.ndarray, clip: ClipDefaults, count: int) -> np.ndarray:
    """The last `count` frames of a path's clip at clip.fps, or of frames uint8 [T, H, W, 3], fitted to the clip's size."""
    size = (clip.height, clip.width)
    if not isinstance(video, np.ndarray):
        return read_video(video, fps=clip.fps, num_frames=count, from_end=True, size=size)[0]
    if len(video) < count:
        raise UserError(f"video has {len(video)} frames, {count} are needed; lower num_given_frames")
    return fit(video[-count:], *size)
