"""Requests for Lumos-1.

A request is first resolved into the ids that the decoder reads, and then encoded: the codes of given
frames are appended to these ids. Given frames are those that the clip begins with. For a model that was
trained on the pattern "ends" they may also be the first and the last frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumos.errors import UserError
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.engine import cache_tokens
from lumos.models.lumos1.history_thinning import thins
from lumos.models.lumos1.sequence import Frame, build_prefix, clip_header, last_token, num_latent_frames, prompt_text
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.base import Encoded
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.inputs import check_prompt, override, without_effect
from lumos.pipeline.request import Request, Resolved, check_needs_given
from lumos.pipeline.request import resolve as resolve_request
from tokenizer import TextTokenizer, VideoTokenizer


def prompt_ids(prompt: str, clip: ClipDefaults, config: LumosConfig, tokenizer: TextTokenizer) -> list[int]:
    """Return the ids of the text that the decoder reads for a prompt.

    Raises UserError if the prompt is empty or too long.
    """
    shape = {name: getattr(clip, name) for name in ("height", "width", "num_frames", "fps")}
    ids = tokenizer.encode(prompt_text(config, check_prompt(prompt), **shape))
    if len(ids) > config.max_prompt_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens; this model reads at most {config.max_prompt_tokens}: shorten it")
    return ids


def check_agreement(config: LumosConfig, text_tokenizer: TextTokenizer, video_tokenizer: VideoTokenizer) -> None:
    """Raise UserError if one of the tokenizers does not fit the model."""
    check_text_tokenizer(config, text_tokenizer)
    video_tokenizer.check_has_codes("Lumos-1")
    for what, ours, theirs in (
        ("codes", config.visual_token_count, video_tokenizer.num_codes),
        ("temporal compression", config.temporal_compression, video_tokenizer.temporal_compression),
        ("spatial compression", config.spatial_compression, video_tokenizer.spatial_compression),
    ):
        if ours != theirs:
            raise UserError(f"the model expects {what} {ours}, the video tokenizer has {theirs}: they do not belong together")


def check_text_tokenizer(config: LumosConfig, tokenizer: TextTokenizer) -> None:
    """Raise UserError if the tokenizer gives text an id that is reserved in the model."""
    if reserved := [i for i in config.reserved_ids(tokenizer.max_text_id + 1) if tokenizer.is_text(i)]:
        raise UserError(f"the text tokenizer uses id {reserved[0]} for text, the model for itself: they do not belong together")


def check_length(text: int, span: int, frames: int, settings: GenerationSettings, config: LumosConfig) -> None:
    """Check the length of a clip against `max_position_embeddings`.

    text: tokens before the frames. span: tokens of a latent frame. frames: latent frames of the clip.

    Raises UserError if a frame would attend to more tokens than that. Warns if only the positions exceed
    it, which can happen with `history_frames`.
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


def check_effect(latents: int, new_frames: int, given: Mapping[str, Any], settings: GenerationSettings) -> None:
    """Warn of options that have no effect on a clip.

    latents: latent frames of the clip, `new_frames` of which are sampled.
    given: the sampling options that the user set, by name. settings: all sampling options.
    """
    asked = {name: given.get(name) or None for name in ("later_steps", "history_frames", "history_thinning")}
    clip, history = f"a clip of {latents} latent frames", settings.history_frames
    if new_frames == 1:
        without_effect("a single new latent frame", later_steps=asked["later_steps"])
    if max(map(settings.steps_of, range(min(new_frames, 2)))) == 1:
        without_effect("latent frames of one step", step_reuse=given.get("step_reuse"))
    if history is None:
        return
    if latents <= 2 + history:
        without_effect(clip, history_frames=asked["history_frames"], history_thinning=asked["history_thinning"])
    elif not thins(latents, history):
        without_effect(f"{clip} with history_frames {history}", history_thinning=asked["history_thinning"])


def largest_side(config: LumosConfig) -> int:
    """Return the largest height or width, in pixels, that the size tokens of a frame can state."""
    return (config.number_token_count - 1) * config.pixels_per_size_unit


@dataclass(frozen=True, kw_only=True)
class LumosResolved(Resolved):
    """A request with all defaults filled in, and with the ids that the decoder reads before the frames.

    grid             rows and columns of codes in a latent frame
    conditional      the ids before the frames of each clip
    unconditional    the same with the negative prompt or without text; None if guidance is off
    later_prefixes   {new latent frame, from 0: ids of each clip that replace `conditional` from that frame on}
    has_last         whether the last frame is given
    """

    grid: tuple[int, int]
    conditional: list[Tensor]
    unconditional: list[Tensor] | None
    later_prefixes: dict[int, list[Tensor]]
    has_last: bool = False


def takes_of(config: LumosConfig) -> tuple[str, ...]:
    """Return the arguments of a call that this model has beside those of all models."""
    return ("last_image", "given_frames") if "ends" in config.patterns else ()


def check_given(numbers: Collection[int], num_frames: int, stride: int, settings: GenerationSettings) -> bool:
    """Return whether the last of the frames `numbers`, those that are given, is the clip's last frame.

    Raises UserError unless they are the frames that the clip begins with, 1 + a multiple of `stride`, or the first and
    the last one, and for a last frame together with history_frames.
    """
    count = len(numbers)
    if set(numbers) == set(range(count)) and (count == 0 or (count - 1) % stride == 0):
        return False
    if set(numbers) != {0, num_frames - 1}:
        raise UserError(
            f"frames {', '.join(map(str, sorted(numbers)))} are given; this model makes clips from their first 1 + {stride} k "
            "frames, or from the first and the last one: give an image for the first, and last_image for the last"
        )
    if settings.history_frames is not None:
        raise UserError(
            f"history_frames {settings.history_frames} does not work with a given last frame, which every frame sees; leave one out"
        )
    return True


def resolve(
    request: Request, config: LumosConfig, tokenizer: TextTokenizer, settings: GenerationSettings, defaults: ClipDefaults
) -> LumosResolved:
    """Resolve a request for this model.

    settings, defaults: sampling options and clip shape where the request does not set them.
    Raises UserError for a request that the model cannot fulfil.
    """
    # 1. what every generator needs
    takes = takes_of(config)
    for name in ("last_image", "given_frames"):
        if getattr(request, name) is not None and name not in takes:
            raise UserError(
                f"{name} cannot be kept: this kind of model makes each frame from those before it and was not trained towards a "
                "last one or one in between; give the first frame as image, or the first frames as video"
            )
    check_needs_given(request, "image_guidance_scale")
    stride = config.temporal_compression
    common = resolve_request(
        request, settings, defaults, generator="lumos1", size_unit=config.pixels_per_size_unit, largest_side=largest_side(config),
        temporal_compression=stride, takes=takes,
    )  # fmt: skip
    sampling, clip = common.sampling, common.clip
    has_last = check_given(common.given[0], clip.num_frames, stride, sampling)
    if common.num_given_frames == 0 and sampling.image_guidance_scale is not None:
        sampling = sampling.for_text_alone()
    grid = (clip.height // config.spatial_compression, clip.width // config.spatial_compression)

    # 2. the ids of both branches before the frames
    # With a bounded history a clip may be longer than those of training. Its text and header then state the
    # default length at most, because the model knows no longer one.
    told = clip if sampling.history_frames is None else override(clip, num_frames=min(clip.num_frames, defaults.num_frames))

    def read(texts: Sequence[str | None]) -> list[Tensor]:
        return [prefix_ids(text, told, config, tokenizer) for text in texts]

    conditional, unconditional = read(common.prompts), None
    if sampling.is_guided:
        unconditional = read(common.negative_prompts)
    elif common.negative_prompts[0] is not None:
        raise UserError("negative_prompt has no effect with guidance_scale 1; raise guidance_scale or leave it out")

    # 3. latent frames
    begins = common.num_given_frames - has_last
    given_latents = num_latent_frames(begins, stride) if begins else 0
    latents = num_latent_frames(clip.num_frames, stride)
    if has_last:
        last_token(latents - 1, config)  # checked before any work
    check_effect(latents, latents - given_latents, request.options, sampling)
    later = {num_latent_frames(start, stride) - given_latents: read(prompts) for start, prompts in common.later}
    longest = max(len(ids) for prefixes in (conditional, unconditional or (), *later.values()) for ids in prefixes)
    check_length(longest + has_last, Frame(0, *grid).end, latents + has_last, sampling, config)
    return LumosResolved(
        **vars(common) | {"new_frames": latents - given_latents, "sampling": sampling}, grid=grid, conditional=conditional,
        unconditional=unconditional, later_prefixes=later, has_last=has_last,
    )  # fmt: skip


def prefix_ids(prompt: str | None, clip: ClipDefaults, config: LumosConfig, tokenizer: TextTokenizer) -> Tensor:
    """Return the ids before the frames, int64 [L]. With prompt None they hold no text."""
    text = None if prompt is None else prompt_ids(prompt, clip, config, tokenizer)
    duration, fps = clip_header(clip.num_frames, clip.fps)
    return torch.tensor(build_prefix(text, fps=fps, duration=duration, config=config))


@dataclass(frozen=True, kw_only=True)
class LumosEncoded(Encoded):
    """A resolved request whose prefixes end with the codes of the given frames, as `generate_frames` takes them.

    without_given   the third branch, see `generate_frames`; None without it
    """

    resolved: LumosResolved
    conditional: list[Tensor]
    unconditional: list[Tensor] | None
    without_given: list[Tensor] | None
    later: dict[int, list[Tensor]]
