"""A request for Lumos-1: every value resolved and checked, nothing encoded yet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.data.buckets import bucket_for
from lumos.errors import UserError, shown
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.engine import cache_tokens
from lumos.models.lumos1.history_thinning import thins
from lumos.models.lumos1.sequence import Frame, build_prefix, clip_header, num_latent_frames, prompt_text, size_units
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.defaults import ClipDefaults, is_whole
from lumos.pipeline.inputs import (
    align,
    check_num_frames,
    check_prompt,
    clip_length,
    each_once,
    load_image,
    load_video,
    override,
    path_or_frames,
    without_effect,
)
from lumos.pipeline.request import Request, repeat_each, seeds_from
from lumos.video.io import MAX_FRAMES, fit
from tokenizer import TextTokenizer, VideoTokenizer


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


@dataclass(frozen=True)
class Settled:
    """A request that can be made: B clips of one shape."""

    sampling: GenerationSettings
    clip: ClipDefaults
    grid: tuple[int, int]  # rows and columns of codes
    conditional: list[Tensor]  # ids before the frames
    unconditional: list[Tensor] | None  # None: guidance is off
    later: dict[int, list[Tensor]]  # number of a new latent frame, from 0 -> ids before the frames from that one on
    given: list[np.ndarray]  # frames uint8 [T, H, W, 3] that each clip begins with, or empty
    new_frames: int  # latent frames to make
    seeds: list[int]

    @property
    def num_given_frames(self) -> int:
        return len(self.given[0]) if self.given else 0

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the clips."""
        return {**vars(self.sampling), **vars(self.clip), "num_given_frames": self.num_given_frames}


def settle(
    request: Request, config: LumosConfig, tokenizer: TextTokenizer, settings: GenerationSettings, defaults: ClipDefaults
) -> Settled:
    """Fill in what the request leaves open, check it, and read what it begins with. UserError for what cannot be made."""
    if request.generator is not None and request.seed is not None:
        raise UserError("both seed and generator are given; give one of them")
    if request.last_image is not None:
        raise UserError(
            "last_image cannot be kept: this kind of model makes each frame from those before it and was not trained towards a "
            "last one or one in between; give the first frame as image, or the first frames as video"
        )
    sampling = settings.changed(**{f.name: getattr(request, f.name) for f in fields(GenerationSettings)})
    repeats = request.num_videos_per_prompt
    lists = align(
        *repeat_each(repeats, request.prompt, request.negative_prompt, request.image, request.video), request.seed
    )
    count = len(lists["prompt"])
    if request.generator is not None:
        lists["seed"] = seeds_from(request.generator, count)
    prompts, negatives, images, videos, seeds = lists.values()
    clip = override(defaults, **{f.name: getattr(request, f.name, None) for f in fields(ClipDefaults)})
    check_num_frames(clip.num_frames, config.temporal_compression)
    if clip.num_frames == 1:
        without_effect("a picture (num_frames 1)", fps=request.fps, history_mask_ratio=request.history_mask_ratio)
        clip = override(clip, fps=1)
    if images[0] is not None and videos[0] is not None:
        raise UserError("both image and video are given; give the picture or the clip that the result begins with")
    if videos[0] is None:
        without_effect("a clip without video", num_given_frames=request.num_given_frames)
        if images[0] is None:
            without_effect("a clip without image or video", mask_given_frames=request.mask_given_frames or None)

    # 1. what is given
    pictures = each_once(load_image, images) if images[0] is not None else None
    if pictures and clip.target_size and request.height is None and request.width is None:
        clip = of_pictures(pictures, clip, config)
    rows, cols = (
        size_units(pixels, name, config) * config.pixels_per_size_unit // config.spatial_compression
        for name, pixels in (("height", clip.height), ("width", clip.width))
    )
    if pictures:
        given = each_once(lambda p: fit(p[None], clip.height, clip.width), pictures)
    elif videos[0] is not None:
        given = load_videos(videos, clip, request.num_given_frames, config.temporal_compression)
    else:
        given = []
    if given and len(given[0]) >= clip.num_frames:
        raise UserError(f"num_frames {clip.num_frames} leaves nothing to generate after {len(given[0])} given frames")

    # 2. what both branches read before the frames
    told = clip if sampling.history_frames is None else override(clip, num_frames=min(clip.num_frames, defaults.num_frames))

    def read(texts: Sequence[str | None]) -> list[Tensor]:
        return [prefix_ids(text, told, config, tokenizer) for text in texts]

    conditional, unconditional = read(prompts), None
    if sampling.guidance_scale != 1:
        unconditional = read(negatives)
    elif negatives[0] is not None:
        raise UserError("negative_prompt has no effect with guidance_scale 1; raise guidance_scale or leave it out")

    # 3. frames
    given_latents = num_latent_frames(len(given[0]), config.temporal_compression) if given else 0
    latents = num_latent_frames(clip.num_frames, config.temporal_compression)
    new_frames = latents - given_latents
    check_effect(latents, new_frames, request, sampling)
    later = {}
    for start, text in check_later(request.later_prompts, len(given[0]) if given else 0, clip, config.temporal_compression):
        later[num_latent_frames(start, config.temporal_compression) - given_latents] = read(for_each(text, start, repeats, count))
    longest = max(len(ids) for prefixes in (conditional, unconditional or (), *later.values()) for ids in prefixes)
    check_length(longest, Frame(0, rows, cols).end, latents, sampling, config)
    return Settled(sampling, clip, (rows, cols), conditional, unconditional, later, given, new_frames, seeds)


def of_pictures(pictures: Sequence[np.ndarray], clip: ClipDefaults, config: LumosConfig) -> ClipDefaults:
    """The clip in the size, of its area's buckets, that the pictures ask for."""
    sizes = {bucket_for(*p.shape[:2], clip.target_size, config.pixels_per_size_unit) for p in pictures}
    if len(sizes) > 1:
        raise UserError(f"the pictures ask for different sizes {sorted(sizes)}; give height and width, or make them apart")
    ((height, width),) = sizes
    return override(clip, height=height, width=width)


def load_videos(videos: Sequence[Any], clip: ClipDefaults, count: int | None, stride: int) -> list[np.ndarray]:
    """The frames that each clip continues; count None: what all the videos have, at most half of the clip."""
    videos = each_once(path_or_frames, videos)
    if count is None:
        wanted = 1 + min(clip.num_frames // 2, MAX_FRAMES - 1) // stride * stride
        counts = {1 + (min(wanted, n) - 1) // stride * stride for n in each_once(lambda v: clip_length(v, clip.fps), videos)}
        if len(counts) > 1:
            raise UserError(f"the videos would give {sorted(counts)} frames each; set num_given_frames, or make them apart")
        (count,) = counts
    check_num_frames(count, stride, "num_given_frames")
    return each_once(lambda v: load_video(v, clip, count), videos)


def prefix_ids(prompt: str | None, clip: ClipDefaults, config: LumosConfig, tokenizer: TextTokenizer) -> Tensor:
    """Ids before the frames; prompt None: without text."""
    text = None if prompt is None else prompt_ids(prompt, clip, config, tokenizer)
    duration, fps = clip_header(clip.num_frames, clip.fps)
    return torch.tensor(build_prefix(text, fps=fps, duration=duration, config=config))


def check_later(later: Any, given: int, clip: ClipDefaults, stride: int) -> list[tuple[int, Any]]:
    """`later_prompts` as (start, prompt or list of prompts) in order; UserError where a start cannot be one."""
    form = "give (first frame, prompt) pairs, as [(17, 'it jumps')]"
    if later is not None and not isinstance(later, list | tuple):
        raise UserError(f"later_prompts is {shown(later)}; {form}")
    before = given  # the first frame that the prompt before makes
    for pair in later or ():
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and is_whole(pair[0])):
            raise UserError(f"later_prompts holds {shown(pair)}; {form}")
        check_num_frames(pair[0], stride, "the first frame of a later prompt")
        if not before < pair[0] < clip.num_frames:
            raise UserError(
                f"a later prompt cannot begin at frame {pair[0]}; give more than {before}, where the prompt before it begins to "
                f"make frames, and less than num_frames {clip.num_frames}"
            )
        before = pair[0]
    return [(start, text) for start, text in later or ()]


def for_each(text: Any, start: int, repeats: int, count: int) -> list[Any]:
    """A later prompt, one for all or a list with one for each prompt, for each of `count` clips."""
    texts = [t for t in text for _ in range(repeats)] if isinstance(text, list | tuple) else [text] * count
    if len(texts) != count:
        raise UserError(f"the later prompt at frame {start} is a list of {len(text)}, but there are {count // repeats} prompts")
    return [check_prompt(t) for t in texts]


@dataclass(frozen=True)
class Prepared:
    """A request that can be made, as the decoder takes it: B clips of one shape."""

    sampling: GenerationSettings
    clip: ClipDefaults
    grid: tuple[int, int]  # rows and columns of codes
    conditional: list[Tensor]  # ids before the first new frame
    unconditional: list[Tensor] | None  # None: guidance is off
    later: dict[int, list[Tensor]]  # number of a new latent frame, from 0 -> ids as `conditional` from that one on
    given: list[Tensor]  # codes [t, h, w] that each clip begins with, or empty
    num_given_frames: int
    new_frames: int  # latent frames to make
    seeds: list[int]

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def settled(self, latent_frames: int, temporal_compression: int) -> dict[str, Any]:
        """Everything that was settled, of a clip of so many latent frames."""
        made = 1 + (latent_frames - 1) * temporal_compression
        return {**vars(self.sampling), **vars(self.clip), "num_frames": made, "num_given_frames": self.num_given_frames}
