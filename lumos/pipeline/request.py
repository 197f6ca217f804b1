"""A request settled: every value known and checked, nothing encoded yet, so that many can be checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumos.errors import UserError, shown
from lumos.pipeline.defaults import is_whole
from lumos.video.frames import as_uint8, is_pictures

MAX_VIDEOS_PER_PROMPT = 10_000  # each is checked before the first is made


@dataclass(frozen=True)
class Request:
    """What a clip is asked for with; each field as the argument of `LumosPipeline.__call__` of that name.

    A negative_prompt without words is none, in a list too. A list of PIL pictures as video is one clip. Numbers may be numpy's.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    image: Any = None
    video: Any = None
    num_given_frames: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    history_mask_ratio: float | None = None
    mask_given_frames: bool | None = None
    guidance_interval: tuple[float, float] | None = None
    confidence_threshold: float | None = None
    later_steps: int | None = None
    history_frames: int | None = None
    history_thinning: bool | None = None
    num_videos_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    later_prompts: Sequence[tuple[int, str | Sequence[str]]] | None = None
    last_image: Any = None

    def __post_init__(self) -> None:
        changed = {name: value.item() for name, value in vars(self).items() if isinstance(value, np.generic)}
        if isinstance(self.negative_prompt, list | tuple):
            changed["negative_prompt"] = [none_if_blank(text) for text in self.negative_prompt]
        else:
            changed["negative_prompt"] = none_if_blank(self.negative_prompt)
        if is_pictures(self.video):
            changed["video"] = as_uint8(self.video, "video")
        for name, value in changed.items():
            object.__setattr__(self, name, value)


def none_if_blank(text: Any) -> Any:
    return None if isinstance(text, str) and not text.strip() else text


def repeat_each(count: int, prompt: Any, *others: Any) -> list[Any]:
    """`num_videos_per_prompt`: every entry of a list `count` times in a row; a single prompt alone becomes such a list."""
    if not is_whole(count) or not 1 <= count <= MAX_VIDEOS_PER_PROMPT:
        allowed = f"a whole number from 1 to {MAX_VIDEOS_PER_PROMPT}"
        raise UserError(f"num_videos_per_prompt {shown(count)} is not allowed; give {allowed}")
    values = [prompt, *others]
    if count > 1 and not any(isinstance(value, list | tuple) for value in values):
        values[0] = [prompt]
    return [[v for v in value for _ in range(count)] if isinstance(value, list | tuple) else value for value in values]


def seeds_from(generator: torch.Generator | Sequence[torch.Generator], count: int) -> list[int]:
    """A seed for each clip, drawn from its generator, or from the one generator in turn: each call moves them on."""
    generators = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    if wrong := [g for g in generators if not isinstance(g, torch.Generator)]:
        raise UserError(f"generator is {shown(wrong[0])}; give a torch.Generator or a list of them")
    if len(generators) != count:
        raise UserError(f"generator is a list of {len(generators)}, but there are {count} clips to make")
    return [int(torch.randint(2**31, (1,), generator=g, device=g.device)) for g in generators]
