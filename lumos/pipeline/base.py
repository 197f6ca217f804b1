"""`VideoPipeline`: strings and pictures in, frames out; what the pipelines of all generators share.

A call goes through four steps, each of which a caller can also do alone:

    request = Request.of("a red circle", num_frames=17)     what is asked for
    resolved = pipe.resolve(request)                        every value known and checked, nothing encoded
    encoded = pipe.encode(resolved)                         given frames and prompts as the network takes them
    for frames in pipe.stream_encoded(encoded): ...         latents, decoded to pixels as they are made
"""

from __future__ import annotations

import inspect
import itertools
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from lumos import registry
from lumos.errors import RunError, UserError
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.options import SamplingOptions
from lumos.pipeline.output import VideoPipelineOutput, as_output_type, check_output_type
from lumos.pipeline.placement import is_spread
from lumos.pipeline.request import ARGUMENTS, Request, Resolved
from lumos.runtime import pick_device
from lumos.video.frames import as_uint8

OnStep = Callable[[int, int, int, int], None]
"""Called after each step with (latent frame, of how many, step, of how many), counted from 0 among those that are made."""
StepCallback = Callable[["VideoPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""`callback_on_step_end` of a call: (pipe, step, places still open, tensors) -> tensors to take in place of those, or None."""
AfterStep = Callable[[int, int, Tensor], None]
"""Called inside of `VideoPipeline.latents` with (latent frame, step, state), where `state` may be changed in place."""


class Interrupted(Exception):
    """A callback has set `pipe._interrupt`."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A resolved request as the network takes it. given: latents that each clip begins with, [t, ...] each, or empty."""

    resolved: Resolved
    given: list[Tensor]

    def generators(self) -> list[torch.Generator]:
        """A CPU generator of its own for each clip, so that a clip does not depend on its batch."""
        return [torch.Generator().manual_seed(seed) for seed in self.resolved.seeds]


class VideoPipeline(ABC):
    """A generator's network with its tokenizers; the base class of every generator's pipeline.

    `settings` and `clip` are the model's own defaults for sampling and shape.
    """

    generator: ClassVar[str]
    """The generator's name in the registry."""
    sampling: ClassVar[type[SamplingOptions]]
    """The generator's sampling options."""
    tensor_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that a step callback may ask for."""

    model: nn.Module
    video_tokenizer: nn.Module
    settings: SamplingOptions
    clip: ClipDefaults
    _interrupt: bool = False
    _num_timesteps: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        """Give `__call__` of each pipeline a signature with the generator's sampling options, for help() and editors."""
        super().__init_subclass__(**options)
        if "sampling" in vars(cls):

            def call(self: VideoPipeline, *args: Any, **arguments: Any) -> VideoPipelineOutput | tuple:
                return VideoPipeline.__call__(self, *args, **arguments)

            call.__doc__, call.__name__ = VideoPipeline.__call__.__doc__, "__call__"
            call.__signature__ = signature_with(cls.sampling)
            cls.__call__ = call

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> VideoPipeline:
        """The pipeline of the generator that the model folder belongs to; `options` are those of that pipeline.

        NotFound if there is no such folder, UserError for a model type that no generator has.
        """
        return registry.generator_of(folder).load("pipeline").from_pretrained(folder, **options)

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder that `from_pretrained` reads whole."""

    @abstractmethod
    def resolve(self, request: Request) -> Resolved:
        """Check a request and fill in what it leaves open; no network runs. UserError for what cannot be made."""

    @abstractmethod
    def encode(self, resolved: Resolved) -> Encoded:
        """A resolved request as the network takes it: the video tokenizer and, if there is one, the text encoder run."""

    @abstractmethod
    def latents(self, encoded: Encoded, after_step: AfterStep) -> Iterator[Tensor]:
        """Latents [B, n, ...] on the CPU, one part of a clip after the other, or a whole clip at once."""

    @abstractmethod
    def decoder(self) -> Callable[[Tensor], np.ndarray]:
        """A function that takes the next latents [n, ...] of a clip and returns its next frames, uint8 [T, H, W, 3]."""

    @abstractmethod
    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """Latents [t, ...] on the CPU of frames uint8 [T, H, W, 3]."""

    @abstractmethod
    def prompt_tokens(self, prompt: str, clip: ClipDefaults) -> int:
        """Tokens of the text that the network reads for a prompt; UserError if it is empty or too long."""

    @abstractmethod
    def step_hook(
        self, callback: StepCallback, names: Sequence[str], encoded: Encoded, done: list[Tensor]
    ) -> AfterStep:
        """`callback_on_step_end` as a function of the network's state. `done` holds the latents that are made so far."""

    @abstractmethod
    def is_open(self, state: Tensor) -> bool:
        """Whether the latent frame of this state needs further steps."""

    @property
    @abstractmethod
    def temporal_compression(self) -> int:
        """Frames of each latent frame after the first: num_frames is 1 + a multiple of it."""

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """Height and width are multiples of so many pixels."""

    @property
    @abstractmethod
    def largest_side(self) -> int:
        """The most pixels of a clip's height or width."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or the last call, over all its new latent frames."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt`: the call then ends with the latent frames that are done."""
        return self._interrupt

    def to(self, *args: Any, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move network and video tokenizer, in place: `to("cuda")`, `to(torch.bfloat16)` or `to("cuda", torch.bfloat16)`."""
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        if is_spread(self.model):
            raise UserError("a decoder with a device_map stays where it is; load it again with another device or dtype")
        target = None if device is None else pick_device(device)
        self.model.to(device=target, dtype=dtype)
        self.video_tokenizer.to(device=target, dtype=dtype)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        on_step: OnStep = lambda frame, frames, step, steps: None,
        **arguments: Any,
    ) -> VideoPipelineOutput | tuple:
        """Make num_videos_per_prompt clips for each prompt; arguments and output are those of a pipeline of diffusers.

        prompt, negative_prompt, image, video, last_image, seed: one value, or a list of equal length.
        image: a path or picture, the first frame of the clip. last_image: its last frame, for generators that can reach one.
        video: a path or the frames of a clip, which is continued from its last `num_given_frames` frames (1 + a multiple of the
        temporal compression; default: what the video has, at most half of num_frames). Pictures and frames are taken in any form
        that `lumos.video.frames.as_uint8` knows; a list of PIL pictures as video is one clip. num_frames counts given frames
        too; 1 makes a picture. seed: one int seeds the clips with seed, seed + 1, ...; None draws it. A list of seeds or
        generators has one for each clip; a generator gives each clip a seed and moves on. Where an argument is None, the model's
        default counts.
        later_prompts: [(17, "it jumps"), ...]: what the clip shows from frame 17 on, counted from 0 with given frames; a start
        is 1 + a multiple of the temporal compression. The frames before it are then history under the new prompt, at the same
        distances. A list in place of a prompt has one for each of `prompt`.
        output_type: np, pil, pt, uint8 or latent, see VideoPipelineOutput; return_dict=False returns (frames,).
        callback_on_step_end(pipe, step, places still open, tensors) is called after every step; `step` counts on over the latent
        frames up to pipe.num_timesteps. `tensors` holds the tensors named in callback_on_step_end_tensor_inputs. The callback may
        return a dict with other values for them, and set pipe._interrupt to end the clip with the latent frames that are done.
        on_step(frame, frames, step, steps) is called at the same times; `steps` are those of this latent frame at most.
        All other arguments are the generator's sampling options. Raises UserError for what cannot be made, before any work.
        """
        # 1. Everything is checked before any work is done.
        check_output_type(output_type)
        encoded = self.encode(self.resolve(self.request(prompt, arguments)))
        resolved = encoded.resolved

        # 2. Latents are made, each step seen by the callbacks.
        done = [torch.stack(encoded.given)] if encoded.given else []
        hook = None
        if callback_on_step_end is not None:
            names = self.tensor_inputs[:1] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
            hook = self.step_hook(callback_on_step_end, names, encoded, done)

        def after_step(frame: int, step: int, state: Tensor) -> None:
            on_step(frame, resolved.new_frames, step, resolved.sampling.steps_of(frame))
            if hook is not None:
                hook(frame, step, state)
            if self._interrupt and self.is_open(state):
                raise Interrupted

        try:
            for part in self._begin(encoded, after_step):
                done.append(part)
                if self._interrupt:
                    break
        except Interrupted:
            if not done:
                raise RunError("the callback interrupted the call before its first latent frame was done") from None
        latents = torch.cat(done, dim=1)  # [B, t, ...]

        # 3. Latents become pixels, clip by clip to bound the decoder's memory.
        if output_type == "latent":
            frames = latents
        else:
            frames = as_output_type([self.decode_clip(clip) for clip in latents], output_type)
        settings = resolved.settings_of(1 + (latents.shape[1] - 1) * self.temporal_compression)
        return VideoPipelineOutput(frames, latents, resolved.seeds, settings) if return_dict else (frames,)

    def request(self, prompt: str | Sequence[str], arguments: Mapping[str, Any]) -> Request:
        """A request from the arguments of a call; TypeError for an unknown one."""
        known = (*ARGUMENTS, *self.sampling.declared())
        if unknown := [name for name in arguments if name not in known]:
            raise TypeError(f"unexpected argument {unknown[0]!r}; {type(self).__name__} takes {', '.join(('prompt', *known))}")
        return Request.of(prompt, **arguments)

    def stream(
        self, prompt: str | Sequence[str], *, on_step: OnStep = lambda *_: None, **arguments: Any
    ) -> Iterator[list[np.ndarray]]:
        """Make clips and yield their frames as soon as their latent frame is done: for each clip uint8 [n, H, W, 3].

        n is 1 for the first latent frame of a clip, then the temporal compression (given frames come at once, first). Joined,
        they are the frames of a call with the same arguments, which say what is made. Closing the iterator ends the work. Raises
        UserError here, before the first frame is asked for.
        """
        try:
            request = self.request(prompt, arguments)
        except TypeError as error:
            raise UserError(f"stream: {error}") from error
        return self.stream_encoded(self.encode(self.resolve(request)), on_step)

    def stream_encoded(self, encoded: Encoded, on_step: OnStep = lambda *_: None) -> Iterator[list[np.ndarray]]:
        """As `stream`, of an encoded request."""
        resolved = encoded.resolved
        decoders = [self.decoder() for _ in resolved.seeds]  # clip by clip, as a call decodes
        given = [torch.stack(encoded.given)] if encoded.given else []

        def after_step(frame: int, step: int, state: Tensor) -> None:
            on_step(frame, resolved.new_frames, step, resolved.sampling.steps_of(frame))

        for part in itertools.chain(given, self._begin(encoded, after_step)):
            yield [decode(clip) for decode, clip in zip(decoders, part, strict=True)]

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Frames of a clip's latents [t, ...]: uint8 [n, H, W, 3] of one latent frame after the other."""
        decode = self.decoder()
        for latent in latents.split(1):
            yield decode(latent)

    def decode_clip(self, latents: Tensor) -> np.ndarray:
        """All frames of a clip's latents [t, ...], uint8 [T, H, W, 3]."""
        return np.concatenate(list(self.decode(latents)))

    def reconstruct(self, frames: Any) -> np.ndarray:
        """A clip encoded and decoded by the video tokenizer, uint8 [T, H, W, 3]."""
        return self.decode_clip(self.encode_frames(as_uint8(frames)))

    def _begin(self, encoded: Encoded, after_step: AfterStep) -> Iterator[Tensor]:
        """`latents` of a new call."""
        resolved = encoded.resolved
        self._interrupt, self._num_timesteps = False, resolved.sampling.steps_before(resolved.new_frames)
        return self.latents(encoded, after_step)


def signature_with(sampling: type[SamplingOptions]) -> inspect.Signature:
    """The signature of a call with these sampling options."""
    whole = inspect.signature(VideoPipeline.__call__)
    own, last = list(whole.parameters.values())[:-1], inspect.Parameter.KEYWORD_ONLY
    request = inspect.signature(Request).parameters
    asked = [request[name].replace(kind=last) for name in ARGUMENTS]
    kinds = typing.get_type_hints(sampling)
    options = [inspect.Parameter(name, last, default=None, annotation=kinds[name] | None) for name in sampling.declared()]
    return whole.replace(parameters=[*own[:2], *asked, *options, *own[2:]])
