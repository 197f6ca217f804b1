"""What the pipeline's call shares with those of diffusers: generators, clips per prompt, output types, the step callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import ModelOutput

from lumos.configuration import LumosConfig
from lumos.errors import UserError, shown
from lumos.frames import as_uint8, is_pictures
from lumos.generation.engine import code_offsets
from lumos.generation.settings import ClipDefaults, GenerationSettings, is_whole
from lumos.sequence import Frame

if TYPE_CHECKING:
    from lumos.pipeline import LumosPipeline

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")
TENSOR_INPUTS = ("codes", "history")
MAX_VIDEOS_PER_PROMPT = 10_000  # each is checked before the first is made

StepCallback = Callable[["LumosPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class LumosPipelineOutput(ModelOutput):
    """What a call gives; also by index and as a tuple, like every output of diffusers.

    frames    in the asked output_type: np float32 [B, T, H, W, 3] in [0, 1]; pt the same as a tensor [B, T, 3, H, W]; pil a list
              of pictures for each clip; uint8 a list of arrays [T, H, W, 3]; latent the codes
    codes     int64 [B, t, h, w]
    seeds     the seed of each clip
    settings  everything that was settled
    """

    frames: Any = None
    codes: Tensor | None = None
    seeds: list[int] | None = None
    settings: dict[str, Any] | None = None


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


class Interrupted(Exception):
    """A callback has set `pipe._interrupt`."""


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {shown(output_type)} is unknown; allowed: {', '.join(OUTPUT_TYPES)}")


def as_output_type(clips: list[np.ndarray], output_type: str) -> Any:
    """Clips uint8 [T, H, W, 3] of one size -> np, pil, pt or uint8 frames (see LumosPipelineOutput).

    The floats are value / 255 in float32, so that diffusers' export_to_video, which writes (frame * 255).astype(uint8), gives
    the clip back exactly.
    """
    if output_type == "uint8":
        return clips
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]
    frames = np.stack(clips).astype(np.float32) / 255
    return torch.from_numpy(frames).movedim(-1, 2).contiguous() if output_type == "pt" else frames


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


def step_callback(
    pipe: LumosPipeline,
    callback: StepCallback,
    names: Sequence[str],
    *,
    grid: tuple[int, int],
    steps_before: Callable[[int], int],
    history: Callable[[], Tensor],
    config: LumosConfig,
) -> Callable[[int, int, Tensor], None]:
    """`callback_on_step_end` as a function of (frame, step, ids [B, n] of the frame's span), which it may change in place.

    grid: rows and columns of codes. steps_before(frame): steps of all the latent frames before it. history(): their codes
    [B, t, h, w].
    UserError for what is no function, names that are not offered, and codes of another shape or out of range.
    """
    if not callable(callback):
        raise UserError(f"callback_on_step_end is {shown(callback)}; give a function of (pipe, step, codes still masked, tensors)")
    if isinstance(names, str):
        raise UserError(f"callback_on_step_end_tensor_inputs is the text {shown(names)}; give a list of names, as [{shown(names)}]")
    if unknown := [name for name in names if name not in TENSOR_INPUTS]:
        raise UserError(f"callback_on_step_end_tensor_inputs {unknown} are not offered; allowed: {', '.join(TENSOR_INPUTS)}")
    offsets = code_offsets(Frame(0, *grid))

    def hook(frame: int, step: int, ids: Tensor) -> None:
        at = offsets.to(ids.device)
        tokens = ids[:, at]
        codes = (tokens - config.visual_token_start).masked_fill(tokens == config.mask_token_id, -1).view(-1, *grid)
        offered = {"codes": lambda: codes.clone(), "history": history}
        still_masked = int((codes < 0).sum(dim=(1, 2)).max())
        result = callback(pipe, steps_before(frame) + step, still_masked, {name: offered[name]() for name in names})
        if result is not None and not isinstance(result, Mapping):
            raise UserError(f"the callback gave {shown(result)}; give nothing, or a dict as {{'codes': ...}}")
        if result and "codes" in result:
            changed = check_codes(result["codes"], codes, config).to(ids.device)
            ids[:, at] = torch.where(changed < 0, tokens.view_as(changed), changed + config.visual_token_start).flatten(1)

    return hook


def check_codes(changed: Any, codes: Tensor, config: LumosConfig) -> Tensor:
    """What a callback gives back in place of `codes`: other values, but -1 (still masked) at the same places."""
    if not isinstance(changed, Tensor) or changed.shape != codes.shape or changed.is_floating_point():
        given = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"the callback gave codes {given}; give whole numbers {list(codes.shape)}")
    changed = changed.to(codes)
    if not torch.equal(changed < 0, codes < 0) or changed.min() < -1 or changed.max() >= config.visual_token_count:
        raise UserError(
            f"the callback gave codes that cannot be taken: 0 to {config.visual_token_count - 1} where a code is decided, "
            "-1 where it is still masked"
        )
    return changed
