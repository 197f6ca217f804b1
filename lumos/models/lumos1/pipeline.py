"""Strings and pictures in, frames out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.errors import NotFinite, RunError, UserError
from lumos.files import updating_folder
from lumos.lora import fingerprints, merge_adapter
from lumos.models.lumos1.acceleration import compile_parts, has_int8_weights, use_int8_weights
from lumos.models.lumos1.cache import KeptPrefix
from lumos.models.lumos1.callback import Interrupted, StepCallback, step_callback
from lumos.models.lumos1.conversion import check_written
from lumos.models.lumos1.engine import generate_frames
from lumos.models.lumos1.modeling import MODEL_FILES, LumosForVideoGeneration
from lumos.models.lumos1.request import Prepared, Settled, check_agreement, prompt_ids, settle
from lumos.models.lumos1.sequence import build_frames
from lumos.models.lumos1.settings import GenerationSettings, read_defaults, write_defaults
from lumos.pipeline.defaults import DEFAULTS_FILE, ClipDefaults
from lumos.pipeline.output import LumosPipelineOutput, as_output_type, check_output_type
from lumos.pipeline.placement import is_spread, loading_arguments
from lumos.pipeline.request import Request
from lumos.runtime import pick_device
from lumos.video.frames import as_uint8, from_uint8, to_uint8
from tokenizer import TextTokenizer, VideoTokenizer
from tokenizer.streaming import StreamDecoder

OnStep = Callable[[int, int, int, int], None]
"""Told of each step: (latent frame, of how many, step, of how many), counted from 0 among those that are made."""


class LumosPipeline:
    """A decoder with its two tokenizers. `settings` and `clip` are the model's own defaults for sampling and shape."""

    def __init__(
        self,
        model: LumosForVideoGeneration,
        text_tokenizer: TextTokenizer,
        video_tokenizer: VideoTokenizer,
        settings: GenerationSettings | None = None,
        clip: ClipDefaults | None = None,
    ):
        check_agreement(model.config, text_tokenizer, video_tokenizer)
        self.model, self.text_tokenizer, self.video_tokenizer = model.eval(), text_tokenizer, video_tokenizer.eval()
        self.settings, self.clip = settings or GenerationSettings(), clip or ClipDefaults()
        self._kept, self._interrupt, self._num_timesteps = KeptPrefix(), False, 0

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        video_tokenizer: str | Path | None = None,
        text_tokenizer: str | Path | None = None,
        lora: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        int8: bool = False,
        compile: bool = False,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
    ) -> LumosPipeline:
        """Read a model folder with `video_tokenizer/` and `text_tokenizer/` in it, or name those folders.

        lora: an adapter folder (what a run with lora.rank exports), which is merged into the weights.
        device: default CUDA if there is one, else CPU. dtype: default bfloat16 on CUDA, float32 on CPU.
        int8, compile: see `lumos.models.lumos1.acceleration`; such a decoder cannot be saved with int8 weights.
        device_map="auto", max_memory: for decoders larger than the device, see `lumos.pipeline.placement`.
        """
        if not Path(folder).is_dir():
            raise UserError(f"there is no model folder {folder}; give the folder of a saved or released model")
        device = pick_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        placement = loading_arguments(device, device_map, max_memory)
        model = LumosForVideoGeneration.from_pretrained(folder, dtype=dtype, **placement)
        if not is_spread(model):
            model = model.to(device)
        elif lora is not None or int8 or compile:
            raise UserError("lora, int8 and compile need the whole decoder in one place; merge the adapters, or leave them out")
        try:
            text = TextTokenizer.from_pretrained(text_tokenizer or folder, limit=model.config.visual_token_start)
        except (UserError, OSError) as error:
            raise UserError(f"{error} (text_tokenizer / --text-tokenizer names another place)") from error
        try:
            video = VideoTokenizer.from_pretrained(video_tokenizer or folder, dtype=dtype, device=device)
        except (ValueError, OSError) as error:
            raise UserError(f"{error} (video_tokenizer / --video-tokenizer names another place)") from error
        settings, clip = read_defaults(Path(folder))
        if lora is not None:
            model = merge_adapter(model, lora, fingerprints(video_tokenizer or folder, text_tokenizer or folder))
        if int8:
            use_int8_weights(model)
        if compile:
            compile_parts(model)
        return cls(model, text, video, settings, clip)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder that `from_pretrained` reads whole; RunError if a tensor is not in it in the end.

        A kill leaves the older folder or the new one; other files of the folder stay.
        """
        if is_spread(self.model):
            raise UserError("a decoder with a device_map is not saved; load it without one to save it")
        if has_int8_weights(self.model):
            raise UserError("a decoder with int8 weights is not saved; load it without int8 to save it")
        with updating_folder(folder, re.compile(f"{MODEL_FILES}|{DEFAULTS_FILE}|(text|video)_tokenizer").fullmatch) as writing:
            self.model.save_pretrained(writing)
            check_written(writing, {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()})
            self.text_tokenizer.save_pretrained(writing / "text_tokenizer")
            self.video_tokenizer.save_pretrained(writing / "video_tokenizer")
            write_defaults(writing, self.settings, self.clip)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is running or was the last one, over all its new latent frames."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt`: the call then ends with the latent frames that are done."""
        return self._interrupt

    def to(self, *args: Any, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LumosPipeline:
        """Move decoder and video tokenizer, in place: `to("cuda")`, `to(torch.bfloat16)` or `to("cuda", torch.bfloat16)`."""
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
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        video: Any = None,
        num_given_frames: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        history_mask_ratio: float | None = None,
        mask_given_frames: bool | None = None,
        guidance_interval: tuple[float, float] | None = None,
        confidence_threshold: float | None = None,
        later_steps: int | None = None,
        history_frames: int | None = None,
        history_thinning: bool | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        later_prompts: Sequence[tuple[int, str | Sequence[str]]] | None = None,
        last_image: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        on_step: OnStep = lambda frame, frames, step, steps: None,
    ) -> LumosPipelineOutput | tuple:
        """Make num_videos_per_prompt clips for each prompt; arguments and output are those of a pipeline of diffusers.

        prompt, negative_prompt, image, video, seed: one, or a list of equal length.
        image: path or picture, the first frame of the clip. video: path or frames of a clip, which goes on from the last
        `num_given_frames` of them (1 + a multiple of the temporal compression; default: what the video has, at most half of
        num_frames). Pictures and frames are taken in any form that a call gives (see `frames.as_uint8`); a list of PIL pictures
        as video is one clip. num_frames counts the given frames too; 1 makes a picture. seed: one int seeds the clips seed,
        seed + 1, ...; None draws it. A list of seeds or generators has one for each clip; a generator gives each clip a seed, and
        moves on. What is left None is the model's default.
        output_type: np, pil, pt, uint8 or latent, see LumosPipelineOutput; return_dict False gives (frames,).
        callback_on_step_end(pipe, step, codes still masked, tensors) is called after every step; `step` counts on over the latent
        frames up to pipe.num_timesteps. `tensors` holds those named: codes int64 [B, h, w] of the frame that is being made (-1:
        still masked), history [B, t, h, w] of the frames before it. It may return {"codes": ...} with other values, and set
        pipe._interrupt to end the clip with the latent frames that are done.
        on_step(frame, frames, step, steps) is called at the same times; `steps` are those of this latent frame at most.
        later_prompts: [(17, "it jumps"), ...]: what the clip shows from frame 17 on, counted from 0 with given frames; a start is
        1 + a multiple of the temporal compression. The frames before it are then history under the new prompt, at the same
        distances. A list in place of a prompt has one for each of `prompt`.
        last_image is refused: no model of this kind was trained to reach one.
        With history_frames a clip may be of any length; the text and the header then tell the model of a clip as long as its
        default at most, which is what it was trained on.
        Raises UserError for what cannot be made, before any work is done.
        """
        check_output_type(output_type)
        ready = self.prepare(Request(
            prompt=prompt, negative_prompt=negative_prompt, image=image, video=video, num_given_frames=num_given_frames,
            num_frames=num_frames, height=height, width=width, fps=fps, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
            history_mask_ratio=history_mask_ratio, mask_given_frames=mask_given_frames, guidance_interval=guidance_interval,
            confidence_threshold=confidence_threshold, later_steps=later_steps, history_frames=history_frames,
            history_thinning=history_thinning, num_videos_per_prompt=num_videos_per_prompt, seed=seed, generator=generator,
            later_prompts=later_prompts, last_image=last_image,
        ))  # fmt: skip
        done = [torch.stack(ready.given)] if ready.given else []
        step_end = None
        if callback_on_step_end is not None:
            empty = torch.empty(len(ready.seeds), 0, *ready.grid, dtype=torch.int64)
            step_end = step_callback(
                self, callback_on_step_end, callback_on_step_end_tensor_inputs, grid=ready.grid, config=self.model.config,
                steps_before=ready.sampling.steps_before, history=lambda: torch.cat([empty, *done], dim=1),
            )  # fmt: skip

        def after_step(frame: int, step: int, ids: Tensor) -> None:
            on_step(frame, ready.new_frames, step, ready.sampling.steps_of(frame))
            if step_end is not None:
                step_end(frame, step, ids)
            if self._interrupt and (ids == self.model.config.mask_token_id).any():
                raise Interrupted

        try:
            for codes in self._latents(ready, after_step):
                done.append(codes)
                if self._interrupt:
                    break
        except Interrupted:
            if not done:
                raise RunError("the callback interrupted the call before its first latent frame was done") from None
        codes = torch.cat(done, dim=1)  # [B, t, h, w]

        # clip by clip to bound the decoder's memory
        frames = codes if output_type == "latent" else as_output_type([self._decode(c) for c in codes], output_type)
        settled = ready.settled(codes.shape[1], self.model.config.temporal_compression)
        return LumosPipelineOutput(frames, codes, ready.seeds, settled) if return_dict else (frames,)

    def stream(
        self, prompt: str | Sequence[str], *, on_step: OnStep = lambda *_: None, **options: Any
    ) -> Iterator[list[np.ndarray]]:
        """Make clips and yield their frames as soon as their latent frame is done: for each clip uint8 [n, H, W, 3].

        n is 1 for the first latent frame of a clip, then the temporal compression (given frames come at once, first). Joined,
        they are the frames of a call with the same arguments. `options`: those of a call that say what is made, by name; see
        `Request`. What the decoder keeps does not grow with the clip if history_frames is set and the video tokenizer has an
        attention_window. Closing the iterator ends the work. Raises UserError here, before the first frame is asked for.
        """
        try:
            request = Request(prompt, **options)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(Request))
            raise UserError(f"stream: {str(error).split('() ')[-1]}; it takes {known}") from error
        return self.stream_prepared(self.prepare(request), on_step)

    def stream_prepared(self, ready: Prepared, on_step: OnStep = lambda *_: None) -> Iterator[list[np.ndarray]]:
        """As `stream`, of what `prepare` gave."""
        decoders = [StreamDecoder(self.video_tokenizer) for _ in ready.seeds]  # clip by clip, as a call decodes
        given = [torch.stack(ready.given)] if ready.given else []
        steps_of = ready.sampling.steps_of
        latents = self._latents(ready, lambda frame, step, ids: on_step(frame, ready.new_frames, step, steps_of(frame)))
        for codes in itertools.chain(given, latents):
            yield [self._push(decoder, clip) for decoder, clip in zip(decoders, codes, strict=True)]

    def decode(self, codes: Tensor) -> Iterator[np.ndarray]:
        """Frames of a clip's codes [t, h, w], uint8 [n, H, W, 3] of one latent frame after the other."""
        decoder = StreamDecoder(self.video_tokenizer)
        for latent in codes.split(1):
            yield self._push(decoder, latent)

    def _latents(self, ready: Prepared, on_step: Callable[[int, int, Tensor], None]) -> Iterator[Tensor]:
        """Codes [B, 1, h, w] on the CPU of each new latent frame. Interrupted if a callback asks."""
        self._interrupt, self._num_timesteps = False, ready.sampling.steps_before(ready.new_frames)
        for codes in generate_frames(
            self.model, ready.conditional, ready.unconditional, grid=ready.grid, new_frames=ready.new_frames,
            settings=ready.sampling, generators=ready.generators(), on_step=on_step, kept=self._kept,
            later=ready.later,
        ):  # fmt: skip
            yield codes.cpu()[:, None]

    def settle(self, request: Request) -> Settled:
        """Check a request and fill in what it leaves open; no network runs. UserError for what cannot be made."""
        return settle(request, self.model.config, self.text_tokenizer, self.settings, self.clip)

    def prepare(self, request: Request) -> Prepared:
        """`settle` a request, encode what is given, write the prefixes."""
        return self.encode_given(self.settle(request))

    def encode_given(self, settled: Settled) -> Prepared:
        """The second half of `prepare`."""
        given = [self._encode(frames) for frames in settled.given]
        begin = [build_frames(codes, self.model.config).flatten() for codes in given]

        def behind(prefixes: list[Tensor]) -> list[Tensor]:
            return [torch.cat(parts) for parts in zip(prefixes, begin, strict=True)] if begin else prefixes

        return Prepared(
            settled.sampling, settled.clip, settled.grid, behind(settled.conditional),
            None if settled.unconditional is None else behind(settled.unconditional),
            {frame: behind(prefixes) for frame, prefixes in settled.later.items()}, given, settled.num_given_frames,
            settled.new_frames, settled.seeds,
        )  # fmt: skip

    def reconstruct(self, frames: Any) -> np.ndarray:
        """What the video tokenizer makes of a clip: uint8 [T, H, W, 3] there and back."""
        return self._decode(self._encode(as_uint8(frames)))

    def text_ids(self, prompt: str, clip: ClipDefaults) -> list[int]:
        """The prompt as the model reads it for a clip of this shape; UserError if it is empty or too long."""
        return prompt_ids(prompt, clip, self.model.config, self.text_tokenizer)

    @torch.inference_mode()
    def _encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [T, H, W, 3] -> codes [t, h, w] on the CPU."""
        video = from_uint8(frames)[None]
        parameter = next(self.video_tokenizer.parameters())
        codes = self.video_tokenizer.encode(video.to(parameter.device, parameter.dtype))[0].cpu()
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.video_tokenizer.num_codes:  # what NaN becomes
            raise NotFinite(
                "the video tokenizer's numbers are not finite where it reads frames; check its weights, or take dtype float32"
            )
        return codes

    def _decode(self, codes: Tensor) -> np.ndarray:
        """codes [t, h, w] -> uint8 [T, H, W, 3]."""
        return np.concatenate(list(self.decode(codes)))

    @torch.inference_mode()
    def _push(self, decoder: StreamDecoder, codes: Tensor) -> np.ndarray:
        """A clip's next codes [t, h, w] -> its next frames, uint8."""
        device = next(self.video_tokenizer.parameters()).device
        return to_uint8(decoder.push(codes[None].to(device))[0])
