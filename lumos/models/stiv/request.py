"""Requests for STIV: which frames are given, which pattern of the training that is, and in which passes the clip is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lumos.errors import UserError, shown
from lumos.models.stiv.configuration import PATTERNS, StivConfig
from lumos.models.stiv.flow import time_grid
from lumos.models.stiv.passes import SamplingPass, passes_of
from lumos.models.stiv.patterns import given_frames
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.solvers import call_times
from lumos.models.stiv.text_encoder import TextIds
from lumos.pipeline.defaults import CLIP_LIMITS, ClipDefaults
from lumos.pipeline.inputs import each_once, path_or_frames, without_effect
from lumos.pipeline.request import GIVE_FRAMES, Request, Resolved, check_needs_given, check_side
from lumos.pipeline.request import resolve as resolve_request
from lumos.video.frames import fit
from lumos.video.io import MAX_FRAMES, read_video
from lumos.wording import is_blank

TAKES = ("last_image", "given_frames", "interpolate", "views")
"""The arguments that STIV has beside those of all generators."""
VIEWS = 7
"""Views of an object: the given one, then azimuths of 30 to 330 degrees."""
OF_VIEWS = {"guidance_scale": 3.5, "null_image": "zeros"}
"""The published sampling options of views."""
LARGEST_SIDE = 2**13
WORDS = {
    "none": "no frame", "first": "the first frame", "prediction": "the first {} frames", "ends": "the first and the last frame",
    "interpolation": "every second frame", "views": "one view of an object",
}  # fmt: skip
"""The given frames of each pattern, in words; the number is that of `frames_to_predict_from`."""


@dataclass(frozen=True, kw_only=True)
class StivResolved(Resolved):
    """A request with all values filled in, in the form that the sampler takes.

    grid            rows and columns of a latent frame
    latent_frames   latent frames of the clip
    given_latents   the numbers of the given latent frames
    passes          the runs of the sampler; `new_frames` is their number
    patterns        the pattern of each pass
    ids             the ids of the prompts of all clips, then of the texts that guidance subtracts
    stride          the sampling stride that the network is told of a usual clip, 1 of a picture; of keyframes a multiple of it
    """

    grid: tuple[int, int]
    latent_frames: int
    given_latents: frozenset[int]
    passes: tuple[SamplingPass, ...]
    patterns: tuple[str, ...]
    ids: TextIds
    stride: int

    @property
    def kept_pixels(self) -> list[dict[int, np.ndarray]]:
        return list(self.given) if self.sampling.keep_given_pixels else super().kept_pixels

    @property
    def can_continue(self) -> bool:
        return len(self.passes) > 1

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the clips; under "sampler" what follows from them: patterns, times and runs of the network."""
        sampling = self.sampling
        grid = time_grid(sampling.num_inference_steps, sampling.shift)
        calls = len(call_times(sampling.solver, grid))
        return super().settings | {
            "sampler": {
                "pattern": " + ".join(dict.fromkeys(self.patterns)), "passes": len(self.passes),
                "model_calls": calls * len(self.passes), "time_grid": [round(t, 6) for t in grid],
                "strides": [self.stride * pace for pace in dict.fromkeys(part.pace for part in self.passes)],
            }
        }  # fmt: skip


def resolve(
    request: Request, config: StivConfig, settings: StivOptions, defaults: ClipDefaults, ids_of: Callable[[Sequence[str]], TextIds]
) -> StivResolved:
    """Resolve a request for this model.

    settings, defaults: sampling options and clip shape where the request does not set them. ids_of: returns the ids of
    texts. Raises UserError for a request that the model cannot fulfil.
    """
    # 1. uses other than a clip from its beginning
    check_uses(request, config)
    asked = request.options
    unit = config.spatial_compression * config.patch_size
    if request.views:
        request = of_views(request, config)
    elif request.interpolate is not None:
        request = of_interpolation(request, config, defaults, unit)
    elif request.video is not None and request.num_given_frames is None:
        request = replace(request, num_given_frames=frames_to_predict_from(config))

    # 2. what every generator needs
    common = resolve_request(
        request, settings, defaults, generator="stiv", size_unit=unit, largest_side=LARGEST_SIDE,
        temporal_compression=config.temporal_compression if config.latents_are_causal else 1,
        takes=TAKES,
    )  # fmt: skip
    sampling, clip = common.sampling, common.clip
    if common.num_given_frames == 0 and sampling.image_guidance_scale is not None:
        sampling = sampling.for_text_alone()
    nulls = [text or "" for text in common.negative_prompts]
    if not sampling.is_guided:
        if any(nulls):
            raise UserError("negative_prompt has no effect with guidance_scale 1; raise guidance_scale or leave it out")
        of_guidance = {name: asked.get(name) for name in ("guidance_renorm", "null_image")}
        without_effect("a clip without guidance (guidance_scale 1)", **of_guidance)

    # 3. latent frames, in passes
    frames = config.latent_frames(clip.num_frames)
    given = latents_of(common.given[0], config)
    longest = VIEWS if request.views else longest_pass(config, defaults)
    if config.latents_are_causal and frames > longest:
        raise UserError(
            f"num_frames {clip.num_frames} is more than the {config.pixel_frames(longest)} that this model makes at once; longer "
            f"clips are filled between keyframes, which needs latents of single frames, and this model has {config.latents} latents"
        )
    passes = tuple(passes_of(frames, given, longest, sampling.keyframe_stride, config.temporal_patch_size))
    if len(passes) == 1:
        without_effect("a clip that is made at once", keyframe_stride=asked.get("keyframe_stride"))
    shape = (clip.height // config.spatial_compression, clip.width // config.spatial_compression)
    for length in {len(part.frames) for part in passes}:
        config.grid(length, *shape)
    use = "views" if request.views else "interpolation" if request.interpolate else None
    patterns = tuple(pattern_of(part, config, use) for part in passes)

    # 4. the text of both branches
    ids = ids_of([*common.prompts, *nulls])
    return StivResolved(
        **vars(common) | {"new_frames": len(passes), "sampling": sampling}, grid=shape, latent_frames=frames, given_latents=given,
        passes=passes, patterns=patterns, ids=ids, stride=config.micro_stride if frames > 1 else 1,
    )  # fmt: skip


def check_uses(request: Request, config: StivConfig) -> None:
    """Raise UserError for arguments that this kind of model does not take, or that exclude each other."""
    if request.later_prompts:
        raise UserError("later_prompts are not possible: this kind of model makes all frames of a clip at once; give one prompt")
    check_needs_given(request, "image_guidance_scale")
    for use, own in (("interpolate", "video"), ("views", "image")):
        if not is_asked(request, use):
            continue
        if getattr(request, own) is None:
            raise UserError(f"{use} needs {own}; give it too, or leave {use} out")
        others = [*(name for name in GIVE_FRAMES if name != own), "num_given_frames", *{"interpolate", "views"} - {use}]
        if wrong := [name for name in others if is_asked(request, name)]:
            raise UserError(f"{wrong[0]} has no effect with {use}; leave one of them out")
    if config.latents_are_causal:
        for name in TAKES:
            if name != "given_frames" and is_asked(request, name):
                raise UserError(
                    f"{name} needs latents of single frames; this model has {config.latents} latents, of which a later one "
                    "depends on all frames before it"
                )


def is_asked(request: Request, name: str) -> bool:
    """Return whether an argument is given. A value of False is as none."""
    value = getattr(request, name)
    return value is not None and value is not False


def check_pattern(name: str, config: StivConfig) -> None:
    """Raise UserError for a pattern of given frames that the model was not trained on."""
    if name not in config.patterns:
        raise UserError(
            f"this model was not trained on the pattern {in_words(name, config, ' given')}; it was trained on: {trained_on(config)}"
        )


def trained_on(config: StivConfig) -> str:
    return ", ".join(in_words(name, config) for name in config.patterns)


def in_words(name: str, config: StivConfig, more: str = "") -> str:
    """Return the name of a pattern, with what it gives in brackets."""
    return f"{name} ({WORDS[name].format(frames_to_predict_from(config))}{more})"


def of_views(request: Request, config: StivConfig) -> Request:
    """Return the request for views of an object with its published options, where the request does not set them."""
    check_pattern("views", config)
    texts = request.prompt if isinstance(request.prompt, list | tuple) else [request.prompt]
    if any(isinstance(text, str) and not is_blank(text) for text in texts) or request.negative_prompt is not None:
        raise UserError("views are made from the image alone; leave the prompt and negative_prompt out")
    if request.num_frames not in (None, VIEWS):
        raise UserError(f"num_frames {shown(request.num_frames)} is not allowed with views, which are {VIEWS}; leave it out")
    return replace(request, num_frames=VIEWS, options={**OF_VIEWS, **request.options})


def of_interpolation(request: Request, config: StivConfig, defaults: ClipDefaults, unit: int) -> Request:
    """Return the request with the frames of its clip as every second given frame, at twice the frame rate.

    A file is read at half of the request's fps, or at its own frame rate. UserError for another factor than 2, for a clip of one
    frame, and for clips of different lengths.
    """
    check_pattern("interpolation", config)
    if request.interpolate != 2:
        raise UserError(f"interpolate {request.interpolate} is not allowed; give 2, and interpolate the result again for more")
    height, width = (defaults.height if request.height is None else request.height,
                     defaults.width if request.width is None else request.width)  # fmt: skip
    check_side(height, "height", unit, LARGEST_SIDE)
    check_side(width, "width", unit, LARGEST_SIDE)

    def frames_of(video: Any) -> tuple[np.ndarray, float]:
        video = path_or_frames(video)
        if isinstance(video, str | Path):
            return read_video(video, fps=request.fps and request.fps / 2, size=(height, width))
        return fit(video[: MAX_FRAMES + 1], height, width), (request.fps or 2 * defaults.fps) / 2

    videos = request.video if isinstance(request.video, list | tuple) else [request.video]
    read = each_once(frames_of, videos)
    if len(shapes := {(len(frames), round(2 * rate)) for frames, rate in read}) > 1:
        said = ", ".join(f"{count} frames at {rate / 2:g} fps" for count, rate in sorted(shapes))
        raise UserError(f"the videos have different lengths or rates ({said}); make them in several calls")
    ((count, fps),) = shapes
    if not 2 <= count <= MAX_FRAMES:
        raise UserError(f"interpolate needs a clip of 2 to {MAX_FRAMES:,} frames; this one has {count}")
    if request.num_frames not in (None, 2 * count - 1):
        raise UserError(
            f"num_frames {shown(request.num_frames)} is not allowed; {count} frames become {2 * count - 1}: leave it out"
        )
    given = [{2 * n: frame for n, frame in enumerate(frames)} for frames, _ in read]
    return replace(
        request, video=None, given_frames=given if isinstance(request.video, list | tuple) else given[0],
        height=height, width=width, num_frames=2 * count - 1, fps=max(1, min(fps, CLIP_LIMITS["fps"])),
    )  # fmt: skip


def latents_of(numbers: Collection[int], config: StivConfig) -> frozenset[int]:
    """Return the numbers of the latent frames of given frames. UserError for frames that causal latents cannot give."""
    if not config.latents_are_causal:
        return frozenset(numbers)
    step, count = config.temporal_compression, len(numbers)
    if count and (set(numbers) != set(range(count)) or (count - 1) % step):
        raise UserError(
            f"frames {listed(numbers)} are given; with {config.latents} latents the given frames are the first 1 + {step} k"
        )
    return frozenset(range(1 + (count - 1) // step if count else 0))


def frames_to_predict_from(config: StivConfig) -> int:
    """Return the number of given frames of the pattern prediction."""
    return config.pixel_frames(len(given_frames("prediction", CLIP_LIMITS["num_frames"], config.latents)))


def longest_pass(config: StivConfig, defaults: ClipDefaults) -> int:
    """Return the most latent frames that the model makes at once: those of its training, else those of its usual clip."""
    if config.trained_grid is not None:
        return config.trained_grid["time"] * config.temporal_patch_size
    return config.latent_frames(defaults.num_frames)


def pattern_of(part: SamplingPass, config: StivConfig, use: str | None = None) -> str:
    """Return a pattern that gives the frames of a pass and that the model was trained on; UserError if there is none.

    use: the pattern that is meant where several give the same frames; views are made by no other.
    """
    places, count = part.places, len(part.frames)
    names = ["views"] if use == "views" else sorted((name for name in PATTERNS if name != "views"), key=lambda name: name != use)
    fitting = [name for name in names if places == places_of(name, count, config)]
    if trained := [name for name in fitting if name in config.patterns]:
        return trained[0]
    if fitting:
        check_pattern(fitting[0], config)
    raise UserError(
        f"frames {listed(places)} of {count} are given, which is no pattern of this model; it was trained on: {trained_on(config)}"
    )


def places_of(name: str, frames: int, config: StivConfig) -> frozenset[int] | None:
    """Return the frames that a pattern gives, or None if it does not fit into a clip of `frames` latent frames."""
    try:
        return given_frames(name, frames, config.latents)
    except UserError:
        return None


def listed(numbers: Collection[int], most: int = 10) -> str:
    found = sorted(numbers)
    return ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")
