"""Requests, which hold the arguments of a call, and resolved requests.

A resolved request has all values filled in and checked, and nothing is encoded yet. No network runs
to resolve a request, so a long list of requests can be checked before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from lumos.errors import UserError, shown
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.inputs import (
    align,
    check_num_frames,
    check_prompt,
    each_once,
    fit_to_pictures,
    load_image,
    load_videos,
    override,
    without_effect,
)
from lumos.pipeline.options import SamplingOptions, check_names
from lumos.settings import is_whole
from lumos.video.frames import as_uint8, fit, is_pictures
from lumos.wording import is_blank

MAX_VIDEOS_PER_PROMPT = 10_000  # limits memory: all clips are resolved before the first is made

@dataclass(frozen=True)
class Request:
    """The arguments of a call that decide its result, described in `lumos.pipeline.base.VideoPipeline.__call__`.

    `options` holds by name the sampling options that are not None. A blank negative_prompt becomes
    None, also in a list. A list of pictures as video is one clip. numpy scalars become Python
    numbers.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    image: Any = None
    video: Any = None
    last_image: Any = None
    given_frames: Mapping[int, Any] | Sequence[Mapping[int, Any]] | None = None
    interpolate: int | None = None
    views: bool | None = None
    num_given_frames: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    num_videos_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    later_prompts: Sequence[tuple[int, str | Sequence[str]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        changed = {name: value.item() for name, value in vars(self).items() if isinstance(value, np.generic)}
        changed["options"] = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.options.items()
            if value is not None
        }
        if isinstance(self.negative_prompt, list | tuple):
            changed["negative_prompt"] = [none_if_blank(text) for text in self.negative_prompt]
        else:
            changed["negative_prompt"] = none_if_blank(self.negative_prompt)
        if is_pictures(self.video):
            changed["video"] = as_uint8(self.video, "video")
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, prompt: str | Sequence[str], **arguments: Any) -> Request:
        """Return a request from arguments by name.

        Arguments that are not fields of a request become sampling options.
        """
        own = {name: arguments.pop(name) for name in ARGUMENTS if name in arguments}
        return cls(prompt, **own, options=arguments)


ARGUMENTS = tuple(entry.name for entry in fields(Request) if entry.name not in ("prompt", "options"))
"""The arguments of a call that decide its result, except the prompt and the sampling options."""
GIVE_FRAMES = ("image", "video", "last_image", "given_frames")
"""The arguments that give frames of the clip."""
OF_SOME_GENERATORS = ("given_frames", "interpolate", "views")
"""The arguments that only some generators take."""


def needs_words(interpolate: int | None, views: bool | None) -> bool:
    """Return whether a clip needs a prompt: clips whose pictures say enough may have an empty one."""
    return interpolate is None and not views


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A checked request for B clips of one shape, with all values that the generators need.

    sampling          the sampling options, with the model's defaults where the request has none
    clip              the shape of the clips
    prompts           a prompt for each clip
    negative_prompts  a negative prompt for each clip, or None
    later             (first frame, a prompt for each clip) for each later prompt
    given             the given frames of each clip: {frame number: picture uint8 [H, W, 3]}
    seeds             a seed for each clip
    new_frames        latent frames to make; for a generator that makes whole clips, its runs of the sampler
    """

    sampling: SamplingOptions
    clip: ClipDefaults
    prompts: list[str]
    negative_prompts: list[str | None]
    later: list[tuple[int, list[str]]]
    given: list[dict[int, np.ndarray]]
    seeds: list[int]
    new_frames: int = 1

    @property
    def num_given_frames(self) -> int:
        return len(self.given[0])

    @property
    def kept_pixels(self) -> list[dict[int, np.ndarray]]:
        """The pictures, by frame number, that take the place of decoded frames in each clip."""
        return [{} for _ in self.seeds]

    @property
    def can_continue(self) -> bool:
        """Whether the clips are made in parts that can be stored, see `lumos.pipeline.parts`."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the clips, in the form of the records beside results."""
        return {**vars(self.sampling), **vars(self.clip), "num_given_frames": self.num_given_frames}

    def settings_of(self, num_frames: int) -> dict[str, Any]:
        """Return the settings of clips that ended after `num_frames` frames."""
        return self.settings | {"num_frames": num_frames}


def resolve(
    request: Request,
    settings: SamplingOptions,
    defaults: ClipDefaults,
    *,
    generator: str,
    size_unit: int,
    largest_side: int,
    temporal_compression: int,
    takes: Collection[str] = (),
) -> Resolved:
    """Fill in and check the values of a request, and read its pictures and clips.

    settings, defaults: the model's sampling options and shape of a clip. generator: the name of the
    generator, for messages. size_unit: height and width are multiples of this number of pixels, up
    to largest_side. temporal_compression: num_frames is 1 + a multiple of this number. takes: the
    arguments among OF_SOME_GENERATORS that this generator has. UserError if the clips cannot be made.
    """
    check_arguments(request, takes, generator)

    # 1. sampling options
    if request.generator is not None and request.seed is not None:
        raise UserError("both seed and generator are given; give one of them")
    check_names(request.options, type(settings), generator)
    sampling = settings.changed(**request.options)

    # 2. one entry for each clip
    repeats = request.num_videos_per_prompt
    lists = align(
        *repeat_each(
            repeats, request.prompt, request.negative_prompt, request.image, request.video, request.last_image,
            request.given_frames,
        ),
        request.seed,
        needs_words=needs_words(request.interpolate, request.views),
    )  # fmt: skip
    count = len(lists["prompt"])
    if request.generator is not None:
        lists["seed"] = seeds_from(request.generator, count)
    prompts, negatives, images, videos, last_images, by_number, seeds = lists.values()

    # 3. the shape of the clips
    clip = override(defaults, **{entry.name: getattr(request, entry.name, None) for entry in fields(ClipDefaults)})
    check_num_frames(clip.num_frames, temporal_compression)
    if clip.num_frames == 1:
        without_effect("a picture (num_frames 1)", fps=request.fps, **options_of_clips(request, sampling))
        clip = override(clip, fps=1)
    if images[0] is not None and videos[0] is not None:
        raise UserError("both image and video are given; give the picture or the clip that the result begins with")
    if videos[0] is None:
        without_effect("a clip without video", num_given_frames=request.num_given_frames)
    if not gives_frames(request):
        without_effect("a clip without image or video", **options_of_given_frames(request, sampling))

    # 4. given frames, by their numbers
    pictures = each_once(load_image, images) if images[0] is not None else None
    if pictures and clip.target_size and request.height is None and request.width is None:
        clip = fit_to_pictures(pictures, clip, size_unit)
    for name in ("height", "width"):
        check_side(getattr(clip, name), name, size_unit, largest_side)
    given: list[dict[int, np.ndarray]] = [{} for _ in range(count)]
    if pictures:
        begins = each_once(lambda picture: fit(picture[None], clip.height, clip.width), pictures)
    elif videos[0] is not None:
        begins = load_videos(videos, clip, request.num_given_frames, temporal_compression)
    else:
        begins = [[] for _ in range(count)]
    count_given = len(begins[0]) + (last_images[0] is not None)
    if count_given >= clip.num_frames:
        raise UserError(f"num_frames {clip.num_frames} leaves nothing to generate after {count_given} given frames")
    for frames, pictures_of_clip in zip(given, begins, strict=True):
        frames.update(enumerate(pictures_of_clip))
    if last_images[0] is not None:
        ends = each_once(lambda image: fit(load_image(image)[None], clip.height, clip.width)[0], last_images)
        for frames, picture in zip(given, ends, strict=True):
            frames[clip.num_frames - 1] = picture
    if by_number[0] is not None:
        for frames, pictures_of_clip in zip(given, by_number, strict=True):
            frames.update(check_given_frames(pictures_of_clip, frames, clip))
        if len({frozenset(frames) for frames in given}) > 1:
            raise UserError("given_frames has other frame numbers for some clips; make them in several calls")
    given = [dict(sorted(frames.items())) for frames in given]

    # 5. prompts over time
    begun = next(number for number in range(clip.num_frames) if number not in given[0])
    starts = check_later(request.later_prompts, begun, clip, temporal_compression)
    later = [(start, for_each(text, start, repeats, count)) for start, text in starts]
    return Resolved(
        sampling=sampling, clip=clip, prompts=prompts, negative_prompts=negatives, later=later, given=given, seeds=seeds
    )


def check_arguments(request: Request, takes: Collection[str], generator: str) -> None:
    """Raise UserError for an argument of OF_SOME_GENERATORS that is not in `takes`, or that has a wrong type."""
    for name in OF_SOME_GENERATORS:
        if getattr(request, name) not in (None, False) and name not in takes:
            raise UserError(f"{name} is not possible with models of the generator {generator}; leave it out")
    if request.interpolate is not None and not is_whole(request.interpolate):
        raise UserError(f"interpolate {shown(request.interpolate)} is not allowed; give a whole number")
    if request.views is not None and not isinstance(request.views, bool):
        raise UserError(f"views {shown(request.views)} is not allowed; give true or false")


def check_given_frames(frames: Any, others: Collection[int], clip: ClipDefaults) -> dict[int, np.ndarray]:
    """Return the argument `given_frames` of one clip with its pictures read and fitted to the size of `clip`.

    others: the numbers of the frames that other arguments give. UserError for an entry that is not a frame
    of the clip and its picture, and if no frame is left to generate.
    """
    last = clip.num_frames - 1
    if not isinstance(frames, Mapping):
        raise UserError(f"given_frames is {shown(frames)}; give a picture for each frame number, for example {{0: 'first.png'}}")
    frames = {int(number) if isinstance(number, np.integer) else number: picture for number, picture in frames.items()}
    for number in frames:
        if not is_whole(number) or not 0 <= number <= last:
            raise UserError(f"given_frames has the frame {shown(number)}; the frames of this clip are 0 to {last}")
        if number in others:
            raise UserError(f"frame {number} is given twice, by given_frames and by image, video or last_image; give it once")
    if len(frames) + len(others) > last:
        raise UserError(f"all {clip.num_frames} frames are given; leave out those that are to be made, or raise num_frames")
    return {number: fit(load_image(picture)[None], clip.height, clip.width)[0] for number, picture in frames.items()}


def check_side(pixels: int, name: str, unit: int, largest: int) -> None:
    """Raise UserError for a height or width that is not a multiple of the model's size unit, or that is too large."""
    if pixels <= 0 or pixels % unit:
        down = max(unit, pixels // unit * unit)
        raise UserError(f"{name} {pixels} is not a multiple of {unit}; the nearest sizes are {down} and {down + unit}")
    if pixels > largest:
        raise UserError(f"{name} {pixels} is too large for this model; allowed: {unit} to {largest}")


def options_of_clips(request: Request, sampling: SamplingOptions) -> dict[str, Any]:
    """Return the sampling options of a request that have no effect on a single picture."""
    return {name: request.options[name] for name, option in sampling.declared().items()
            if name in request.options and not option.for_pictures and not option.is_trade}  # fmt: skip


def gives_frames(request: Request) -> bool:
    """Return whether an argument gives a frame; a `given_frames` without entries gives none."""
    by_number = request.given_frames
    of_number = any(by_number) if isinstance(by_number, list | tuple) else by_number
    return bool(of_number) or any(getattr(request, name) is not None for name in GIVE_FRAMES if name != "given_frames")


def check_needs_given(request: Request, name: str) -> None:
    """Raise UserError if the sampling option `name` is asked for, which a clip without a given frame cannot have."""
    if request.options.get(name) is not None and not gives_frames(request):
        raise UserError(f"{name} {shown(request.options[name])} needs a given frame; give an image, or leave it out")


def options_of_given_frames(request: Request, sampling: SamplingOptions) -> dict[str, Any]:
    """Return the sampling options of a request that only have an effect on given frames."""
    return {name: request.options[name] or None for name, option in sampling.declared().items()
            if name in request.options and option.for_given_frames}  # fmt: skip


def none_if_blank(text: Any) -> Any:
    return None if isinstance(text, str) and is_blank(text) else text


def repeat_each(count: int, prompt: Any, *others: Any) -> list[Any]:
    """Return the arguments for `num_videos_per_prompt` = count: every entry of a list is repeated `count` times in a row.

    If no argument is a list, the single prompt becomes a list of `count` prompts.
    """
    if not is_whole(count) or not 1 <= count <= MAX_VIDEOS_PER_PROMPT:
        allowed = f"a whole number from 1 to {MAX_VIDEOS_PER_PROMPT}"
        raise UserError(f"num_videos_per_prompt {shown(count)} is not allowed; give {allowed}")
    values = [prompt, *others]
    if count > 1 and not any(isinstance(value, list | tuple) for value in values):
        values[0] = [prompt]
    return [[v for v in value for _ in range(count)] if isinstance(value, list | tuple) else value for value in values]


def seeds_from(generator: torch.Generator | Sequence[torch.Generator], count: int) -> list[int]:
    """Return a seed for each clip, drawn from its generator, or one after the other from a single generator.

    The draws advance the generators, so that the next call gives other clips.
    """
    generators = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    if wrong := [g for g in generators if not isinstance(g, torch.Generator)]:
        raise UserError(f"generator is {shown(wrong[0])}; give a torch.Generator or a list of them")
    if len(generators) != count:
        raise UserError(f"generator is a list of {len(generators)}, but there are {count} clips to make")
    return [int(torch.randint(2**31, (1,), generator=g, device=g.device)) for g in generators]


def check_later(later: Any, given: int, clip: ClipDefaults, stride: int) -> list[tuple[int, Any]]:
    """Return `later_prompts` as a list of (first frame, prompt or list of prompts), checked.

    given: the number of given frames that the clip begins with. UserError for a malformed entry, and for
    a first frame that is not 1 + a multiple of `stride`, not in increasing order, or not in the clip.
    """
    form = "give (first frame, prompt) pairs, for example [(17, 'it jumps')]"
    if later is not None and not isinstance(later, list | tuple):
        raise UserError(f"later_prompts is {shown(later)}; {form}")
    before = given  # the frame at which the previous prompt begins to make frames
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
    """Return a later prompt for each of `count` clips. text: one text for all clips, or a list with one for each prompt."""
    texts = [t for t in text for _ in range(repeats)] if isinstance(text, list | tuple) else [text] * count
    if len(texts) != count:
        raise UserError(f"the later prompt at frame {start} is a list of {len(text)}, but there are {count // repeats} prompts")
    return [check_prompt(t) for t in texts]
