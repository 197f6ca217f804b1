"""`VideoPipeline`, the base class of the pipelines of all generators.

A pipeline makes clips from prompts, pictures and other clips. A call goes through four steps, and a
caller can also do each step alone:

    request = Request.of("a red circle", num_frames=17)     the arguments of the call
    resolved = pipe.resolve(request)                        all values filled in and checked, nothing encoded yet
    encoded = pipe.encode(resolved)                         prompts and given frames encoded for the network
    for frames in pipe.stream_encoded(encoded): ...         latents, decoded to pixels as they are made

Given frames are those of a picture or clip that the caller passes in and that the new clip
contains. A latent frame is one step of the video tokenizer's time axis: the first holds one frame,
each later one `temporal_compression` frames.
"""

from __future__ import annotations

import inspect
import itertools
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from lumos import registry
from lumos.data.trained_on import TrainedOn
from lumos.errors import RunError, UserError, meant
from lumos.pipeline.adapters import HasAdapters
from lumos.pipeline.calls import PipelineCalls
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.hub import DOWNLOAD, local_folder, model_card, upload
from lumos.pipeline.inputs import generator_of
from lumos.pipeline.notes import given_pictures, picture_note, size_note
from lumos.pipeline.offload import HasOffload
from lumos.pipeline.options import SamplingOptions
from lumos.pipeline.output import VideoPipelineOutput, as_output_type, check_output_type, with_pixels
from lumos.pipeline.parts import Parts
from lumos.pipeline.placement import is_dtype, is_spread, pick_dtype
from lumos.pipeline.request import ARGUMENTS, Request, Resolved
from lumos.progress import progress_bar
from lumos.runtime import bars_on_terminals, each_in_plain_defaults, pick_device, plain_defaults
from lumos.video.frames import as_uint8

OnStep = Callable[[int, int, int, int], None]
"""Called after each step with (latent frame, number of latent frames, step, number of steps).

The latent frame and the step are counted from 0. Given latent frames are not counted.
"""
StepCallback = Callable[["VideoPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""`callback_on_step_end` of a call: (pipe, step, open positions, tensors) -> replacements for tensors by name, or None."""
AfterStep = Callable[[int, int, Tensor], None]
"""Called inside of `VideoPipeline.latents` with (latent frame, step, state).

It may change `state` in place.
"""


class Interrupted(Exception):
    """A callback has set `pipe._interrupt` in the middle of a latent frame."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A resolved request, encoded for the network.

    given: for each clip the latents [t, ...] of the given frames that it begins with; empty if no
    clip has such frames, and for a generator whose `latents` yields the given frames too.
    parts: where finished parts of the clips are stored, for a resolved request that can continue.
    """

    resolved: Resolved
    given: list[Tensor]
    parts: Parts | None = None

    def generators(self) -> list[torch.Generator]:
        """Return a CPU generator for each clip, so that a clip does not depend on the others in its batch."""
        return [generator_of(seed) for seed in self.resolved.seeds]


class VideoPipeline(HasAdapters, HasOffload, ABC):
    """The base class of every generator's pipeline: a network with its tokenizers.

    `settings` holds the model's default sampling options, `clip` the default shape of its clips.
    """

    generator: ClassVar[str]
    """The generator's name in the registry."""
    sampling: ClassVar[type[SamplingOptions]]
    """The generator's sampling options."""
    takes: tuple[str, ...] = ()
    """The arguments of a call that the model has beside those of all: some of last_image, given_frames, interpolate, views."""
    tensor_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that a step callback may ask for."""
    component_names: ClassVar[tuple[str, ...]] = ()
    """The parts of the pipeline: attributes that are arguments of the class too."""

    model: nn.Module
    video_tokenizer: nn.Module
    settings: SamplingOptions
    clip: ClipDefaults
    _progress_bar_config: Mapping[str, Any] = MappingProxyType({"disable": True})
    trained_on: TrainedOn | None = None
    """The record of the model's training data; None if its folder has none."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Give the `__call__` of each subclass a signature with its sampling options, for help() and editors."""
        super().__init_subclass__(**options)
        if "sampling" in vars(cls):

            def call(self: VideoPipeline, *args: Any, **arguments: Any) -> VideoPipelineOutput | tuple:
                return VideoPipeline.__call__(self, *args, **arguments)

            call.__doc__, call.__name__ = VideoPipeline.__call__.__doc__, "__call__"
            call.__signature__ = signature_with(cls.sampling)
            cls.__call__ = call

    @classmethod
    @plain_defaults()
    @bars_on_terminals()
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None, **options: Any) -> VideoPipeline:
        """Load a model folder and return the pipeline of its generator; `options` are passed on to that pipeline.

        The folder may be a repository ORG/NAME on the Hugging Face hub (see `lumos.pipeline.hub`); `revision` is then a
        branch, a tag or a commit of it; token, cache_dir, local_files_only and force_download are those of the hub. NotFound if
        there is no such folder or repository, UserError if the model type belongs to no generator.
        """
        folder = local_folder(folder, revision, **{name: options.pop(name) for name in DOWNLOAD if name in options})
        return registry.generator_of(folder).load("pipeline").from_pretrained(folder, **options)

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline into a folder that `from_pretrained` reads."""

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload model", token: str | None = None
    ) -> str:
        """Upload the whole pipeline folder, with a short card, to the repository ORG/NAME on the hub, which is created if needed.

        Returns the address of the commit. token: default the one of `hf auth login`. RunError if the hub refuses.
        """
        card = partial(model_card, generator=self.generator, trained_on=self.trained_on)
        return upload(repo_id, self.save_pretrained, card, private=private, message=commit_message, token=token)

    @abstractmethod
    def resolved(self, request: Request) -> Resolved:
        """Return a request with missing values replaced by defaults and all values checked. No network runs.

        UserError if the clips of the request cannot be made.
        """

    @abstractmethod
    def encoded(self, resolved: Resolved) -> Encoded:
        """Encode a resolved request: given frames by the video tokenizer, and prompts by the text encoder if there is one."""

    @plain_defaults()
    def resolve(self, request: Request) -> Resolved:
        """Do the same as `resolved`, and warn of what may make the clips poor: words and a size that training never had."""
        resolved = self.resolved(request)
        prompts = [*resolved.prompts, *(text for _, texts in resolved.later for text in texts)]
        words = self.trained_on and self.trained_on.note(prompts)
        for note in (words, size_note(resolved.clip, self.clip)):
            if note:
                warnings.warn(note, stacklevel=1)
        return resolved

    @plain_defaults()
    def encode(self, resolved: Resolved) -> Encoded:
        """Do the same as `encoded`, and warn if a given picture is of another kind than those of the training."""
        self.check_pictures(resolved)
        with self.stage(self.video_tokenizer, *self.text_encoders):
            return self.encoded(resolved)

    def check_pictures(self, resolved: Resolved) -> None:
        """Warn if a given picture loses more in the video tokenizer than pictures of the training do."""
        if self.trained_on and self.trained_on.picture_psnr is not None:
            note = picture_note(given_pictures(resolved), self.trained_on.picture_psnr, self.reconstruct)
            if note:
                warnings.warn(note, stacklevel=1)

    @abstractmethod
    def latents(self, encoded: Encoded, after_step: AfterStep) -> Iterator[Tensor]:
        """Yield the new latents [B, n, ...] on the CPU, part by part in order, or all in one part."""

    @abstractmethod
    def decoder(self) -> Callable[[Tensor], np.ndarray]:
        """Return a function that takes the next latents [n, ...] of a clip and returns its next frames, uint8 [T, H, W, 3].

        The function keeps state between its calls, so each clip needs a decoder of its own.
        """

    @abstractmethod
    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """Return the latents [t, ...], on the CPU, of frames uint8 [T, H, W, 3]."""

    @abstractmethod
    def prompt_tokens(self, prompt: str, clip: ClipDefaults) -> int:
        """Return how many tokens the network reads for a prompt; UserError if the prompt is empty or too long."""

    @abstractmethod
    def step_hook(
        self, callback: StepCallback, names: Sequence[str], encoded: Encoded, done: list[Tensor]
    ) -> AfterStep:
        """Return a function that calls `callback_on_step_end` with tensors taken from the state of the network.

        names: the tensors that the callback asks for. done: the latents that are made so far.
        """

    @abstractmethod
    def is_open(self, resolved: Resolved, step: int, state: Tensor) -> bool:
        """Return whether the latent frame of this state needs further steps after this one."""

    @property
    @abstractmethod
    def temporal_compression(self) -> int:
        """The frames of each latent frame after the first. num_frames is 1 + a multiple of this number."""

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """The number of pixels of which height and width must be multiples."""

    @property
    @abstractmethod
    def largest_side(self) -> int:
        """The most pixels of a clip's height or width."""

    @property
    def device(self) -> torch.device:
        """The device on which the network works."""
        return self.offload_device or self.model.device

    @property
    def components(self) -> dict[str, Any]:
        """The parts and facts of the pipeline by name; `type(pipe)(**pipe.components)` is another pipeline of the same parts."""
        facts = ("settings", "clip", "trained_on", "tokenizer_folders")
        return {name: getattr(self, name) for name in (*self.component_names, *facts)}

    def networks(self) -> list[nn.Module]:
        return [self.model, self.video_tokenizer]

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The networks, beside the video tokenizer, that run when a request is encoded."""
        return []

    def __repr__(self) -> str:
        count, clip = sum(p.numel() for p in self.model.parameters()), self.clip
        parts = "".join(f"\n  {name}: {type(getattr(self, name)).__name__}" for name in self.component_names)
        what = f"{count / 1e6:.1f} M parameters, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        usual = f"clips of {clip.num_frames} frames of {clip.width} x {clip.height} at {clip.fps} fps"
        return f"{type(self).__name__}({what}, {usual}){parts}"

    def set_progress_bar_config(self, **config: Any) -> None:
        """Show a progress bar in calls, with these arguments of tqdm; `disable=True` hides it, which is the default."""
        self._progress_bar_config = {**self._progress_bar_config, "disable": False, **config}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_timesteps(self) -> int:
        """The steps of this thread's running call, or of the last call, summed over its new latent frames."""
        return self._calls.current().num_timesteps

    @property
    def interrupt(self) -> bool:
        """True after a callback has set `pipe._interrupt`.

        The call then ends with the latent frames that are done.
        """
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._calls.current().interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        for call in self._calls.meant():
            call.interrupt = value

    @property
    def _calls(self) -> PipelineCalls:
        return self.__dict__.setdefault("_calls_of_threads", PipelineCalls())

    def to(self, *args: Any, device: str | int | torch.device | None = None, dtype: torch.dtype | str | None = None) -> Self:
        """Move the network and the video tokenizer in place, and return the pipeline.

        Examples: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", "bfloat16")`. UserError for an unknown device or dtype, and for
        a network that was loaded with a device_map and lies on several devices.
        """
        for value in args:
            if is_dtype(value):
                dtype = value
            else:
                device = value
        if is_spread(self.model):
            raise UserError("a decoder with a device_map stays where it is; load it again with another device or dtype")
        if self.offload_device is not None and device is not None:
            raise UserError("the pipeline has CPU offload, which places its parts; load it again to place it yourself")
        target = None if device is None else pick_device(device)
        dtype = None if dtype is None else pick_dtype(dtype, None, target or self.device)
        self.model.to(device=target, dtype=dtype)
        self.video_tokenizer.to(device=target, dtype=dtype)
        return self

    @plain_defaults()
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
        """Make num_videos_per_prompt clips for each prompt. The arguments and the output follow the pipelines of diffusers.

        prompt, negative_prompt, image, video, last_image and seed are single values or lists of
        equal length. An argument that is None takes the default of the model.

        Args:
            prompt: what the clip shows.
            negative_prompt: what the clip must not show.
            image: a path or picture, which becomes the first frame. Pictures and frames have any
                form that `lumos.video.frames.as_uint8` takes.
            video: a path or the frames of a clip. The new clip begins with its last
                num_given_frames frames. A list of pictures is one clip.
            last_image: a path or picture, which becomes the last frame, for models that support
                it.
            given_frames: a picture or path for each frame number, counted from 0, for generators
                that support it; or a list with such a dict for each clip.
            interpolate: the factor by which the frame rate of `video` is raised, for generators that
                support it. All frames of the video are kept, and the prompt may be empty.
            views: True makes views of the object in `image` from all sides, for generators that
                support it. The prompt is empty.
            num_given_frames: 1 + a multiple of the temporal compression; default: as many as the
                video has, at most half of num_frames.
            num_frames: frames of the clip, given frames included; 1 makes a picture.
            height, width: pixels, multiples of `size_unit`.
            fps: frames per second.
            num_videos_per_prompt: clips for each prompt.
            seed: an int gives the clips the seeds seed, seed + 1, ...; a list has a seed for each
                clip; None draws a seed.
            generator: a torch.Generator, or a list with one for each clip, from which the seed of
                each clip is drawn.
            later_prompts: pairs such as (17, "it jumps"): the prompt counts from frame 17 on.
                Frames are counted from 0, given frames included, and the first frame of a prompt is
                1 + a multiple of the temporal compression. The earlier frames remain as history
                under the new prompt, at the same distances in time. A list in place of the text has
                one text for each entry of `prompt`.
            output_type: np, pil, pt, uint8 or latent, see VideoPipelineOutput.
            return_dict: False returns the tuple (frames,).
            callback_on_step_end: a function (pipe, step, open positions, tensors), called after
                every step. `step` counts over all latent frames up to pipe.num_timesteps. The
                function may return a dict that replaces tensors. It may set pipe._interrupt, which
                ends the clip with the latent frames that are done.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            on_step: a function (frame, frames, step, steps), called after every step. `steps` is
                the most steps that this latent frame can have.
            arguments: the other arguments above, and the sampling options of the generator.

        Raises UserError for clips that cannot be made, before any work, and RunError if a callback
        interrupts the call before its first latent frame is done.
        """
        # 1. Everything is checked before any work is done.
        check_output_type(output_type)
        encoded = self.encode(self.resolve(self.request(prompt, arguments)))
        resolved = encoded.resolved

        # 2. Latents are made, and the callbacks run after each step.
        done = [torch.stack(encoded.given)] if encoded.given else []
        hook = None
        if callback_on_step_end is not None:
            names = self.tensor_inputs[:1] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
            hook = self.step_hook(callback_on_step_end, names, encoded, done)

        def after_step(frame: int, step: int, state: Tensor) -> None:
            on_step(frame, resolved.new_frames, step, resolved.sampling.steps_of(frame))
            bar.update()
            if hook is not None:
                hook(frame, step, state)
            if self._interrupt and self.is_open(resolved, step, state):
                raise Interrupted

        steps = resolved.sampling.steps_before(resolved.new_frames)
        bar = progress_bar(total=steps, **{"desc": "generating", "unit": "step", **self._progress_bar_config})
        try:
            with bar, self.stage(self.model), self._calls.running(steps):
                for part in self.latents(encoded, after_step):
                    done.append(part)
                    if self._interrupt:
                        break
        except Interrupted:
            if not done:
                raise RunError("the callback interrupted the call before its first latent frame was done") from None
        latents = torch.cat(done, dim=1)  # [B, t, ...]

        # 3. Latents are decoded to pixels, clip by clip to limit the memory of the decoder.
        kept = resolved.kept_pixels
        if output_type == "latent":
            frames = latents
        else:
            frames = as_output_type([self.decode_clip(*clip) for clip in zip(latents, kept, strict=True)], output_type)
        settings = resolved.settings_of(1 + (latents.shape[1] - 1) * self.temporal_compression)
        if not return_dict:
            return (frames,)
        return VideoPipelineOutput(frames, latents, resolved.seeds, settings, kept if any(kept) else None)

    def request(self, prompt: str | Sequence[str], arguments: Mapping[str, Any]) -> Request:
        """Return the request that the arguments of a call describe; TypeError for an unknown argument."""
        known = (*ARGUMENTS, *self.sampling.declared())
        if unknown := [name for name in arguments if name not in known]:
            near = meant(unknown[0], known)
            takes = ", ".join(("prompt", *known))
            raise TypeError(f"unexpected argument {unknown[0]!r}{near or ';'} {type(self).__name__} takes {takes}")
        return Request.of(prompt, **arguments)

    def stream(
        self, prompt: str | Sequence[str], *, on_step: OnStep = lambda *_: None, **arguments: Any
    ) -> Iterator[list[np.ndarray]]:
        """Make clips and yield, as soon as a latent frame is done, its frames of each clip: a list of uint8 [n, H, W, 3].

        n is 1 for the first latent frame of a clip and the temporal compression for the others.
        Given frames are yielded first, all at once. Joined, the parts are the frames that a call
        with the same arguments returns. Closing the iterator ends the work. A UserError is raised
        by this call itself, not by the first `next`.
        """
        try:
            request = self.request(prompt, arguments)
        except TypeError as error:
            raise UserError(f"stream: {error}") from error
        with plain_defaults():
            encoded = self.encode(self.resolve(request))
        return self.stream_encoded(encoded, on_step)

    def stream_encoded(self, encoded: Encoded, on_step: OnStep = lambda *_: None) -> Iterator[list[np.ndarray]]:
        """Do the same as `stream` for an encoded request."""
        return each_in_plain_defaults(self._stream(encoded, on_step))

    def _stream(self, encoded: Encoded, on_step: OnStep) -> Generator[list[np.ndarray], None, None]:
        resolved = encoded.resolved
        # Each clip has a decoder of its own, because a decoder keeps state.
        decoders = [with_pixels(self.decoder(), kept) for kept in resolved.kept_pixels]
        given = [torch.stack(encoded.given)] if encoded.given else []

        def after_step(frame: int, step: int, state: Tensor) -> None:
            on_step(frame, resolved.new_frames, step, resolved.sampling.steps_of(frame))

        with self.stage(self.model, self.video_tokenizer):
            for part in itertools.chain(given, self.latents(encoded, after_step)):
                yield [decode(clip) for decode, clip in zip(decoders, part, strict=True)]

    def decode(self, latents: Tensor, kept_pixels: Mapping[int, np.ndarray] | None = None) -> Iterator[np.ndarray]:
        """Decode the latents [t, ...] of a clip and yield the frames of each latent frame, uint8 [n, H, W, 3].

        kept_pixels: pictures by frame number that take the place of decoded frames.
        """
        return each_in_plain_defaults(self._decode(latents, kept_pixels or {}))

    def _decode(self, latents: Tensor, kept_pixels: Mapping[int, np.ndarray]) -> Generator[np.ndarray, None, None]:
        with self.stage(self.video_tokenizer):
            decode = with_pixels(self.decoder(), kept_pixels)
            for latent in latents.split(1):
                yield decode(latent)

    def decode_clip(self, latents: Tensor, kept_pixels: Mapping[int, np.ndarray] | None = None) -> np.ndarray:
        """Decode the latents [t, ...] of a clip as `decode` does and return all its frames, uint8 [T, H, W, 3]."""
        return np.concatenate(list(self.decode(latents, kept_pixels)))

    @plain_defaults()
    def reconstruct(self, frames: Any) -> np.ndarray:
        """Encode and decode a clip with the video tokenizer, and return the result, uint8 [T, H, W, 3]."""
        with self.stage(self.video_tokenizer):
            latents = self.encode_frames(as_uint8(frames))
        return self.decode_clip(latents)


def signature_with(sampling: type[SamplingOptions]) -> inspect.Signature:
    """Return the signature of a call with these sampling options."""
    whole = inspect.signature(VideoPipeline.__call__)
    own, last = list(whole.parameters.values())[:-1], inspect.Parameter.KEYWORD_ONLY
    request = inspect.signature(Request).parameters
    asked = [request[name].replace(kind=last) for name in ARGUMENTS]
    kinds = typing.get_type_hints(sampling)
    options = [inspect.Parameter(name, last, default=None, annotation=kinds[name] | None) for name in sampling.declared()]
    return whole.replace(parameters=[*own[:2], *asked, *options, *own[2:]])
