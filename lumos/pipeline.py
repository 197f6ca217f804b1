"""Strings and pictures in, frames out."""

from __future__ import annotations

import itertools
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.adapters import fingerprints, merge_adapter
from lumos.configuration import LumosConfig
from lumos.data.buckets import bucket_for
from lumos.errors import RunError, UserError
from lumos.frames import as_uint8
from lumos.generation.acceleration import compile_parts, has_int8_weights, use_int8_weights
from lumos.generation.cache import KeptPrefix
from lumos.generation.engine import cache_tokens, generate_frames
from lumos.generation.settings import ClipDefaults, GenerationSettings, read_defaults, write_defaults
from lumos.modeling import LumosForVideoGeneration
from lumos.pipeline_call import (
    Interrupted,
    LumosPipelineOutput,
    Prepared,
    Request,
    StepCallback,
    as_output_type,
    check_output_type,
    repeat_each,
    seeds_from,
    step_callback,
)
from lumos.placement import is_spread, loading_arguments
from lumos.runtime import pick_device
from lumos.sequence import Frame, build_frames, build_prefix, clip_header, num_latent_frames, prompt_text, size_units
from lumos.video_io import count_frames, fit, from_uint8, read_image, read_video, to_uint8
from tokenizer import TextTokenizer, VideoTokenizer
from tokenizer.streaming import StreamDecoder

MAX_SEED = 2**63 - 1


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
        int8, compile: see `lumos.generation.acceleration`; such a decoder cannot be saved with int8 weights.
        device_map="auto", max_memory: for decoders larger than the device, see `lumos.placement`.
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
        """Write one folder that `from_pretrained` reads whole."""
        if is_spread(self.model):
            raise UserError("a decoder with a device_map is not saved; load it without one to save it")
        if has_int8_weights(self.model):
            raise UserError("a decoder with int8 weights is not saved; load it without int8 to save it")
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        self.video_tokenizer.save_pretrained(folder / "video_tokenizer")
        write_defaults(folder, self.settings, self.clip)

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
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        on_step: Callable[[int, int, int, int], None] = lambda frame, frames, step, steps: None,
    ) -> LumosPipelineOutput | tuple:
        """Make num_videos_per_prompt clips for each prompt; arguments and output are those of a pipeline of diffusers.

        prompt, negative_prompt, image, video, seed: one, or a list of equal length.
        image: path or uint8 [H, W, 3], the first frame of the clip. video: path or uint8 [T, H, W, 3]; the clip continues its
        last `num_given_frames` frames (1 + a multiple of the temporal compression; default: what the video has, at most half
        of num_frames). num_frames counts the given frames too; 1 makes a picture. seed: one int seeds the clips seed,
        seed + 1, ...; None draws it. A list of seeds or generators has one for each clip; a generator gives each clip a seed, and
        moves on. What is left None is the model's default.
        image and video may also be floats in [0, 1]. output_type: np, pil, pt, uint8 or latent, see LumosPipelineOutput;
        return_dict False gives (frames,).
        callback_on_step_end(pipe, step, codes still masked, tensors) is called after every step; `step` counts on over the latent
        frames up to pipe.num_timesteps. `tensors` holds those named: codes int64 [B, h, w] of the frame that is being made (-1:
        still masked), history [B, t, h, w] of the frames before it. It may return {"codes": ...} with other values, and set
        pipe._interrupt to end the clip with the latent frames that are done.
        on_step(frame, frames, step, steps) is the same without tensors; `steps` are those of this latent frame at most.
        With history_frames a clip may be of any length; the text and the header then tell the model of a clip as long as its
        default at most, which is what it was trained on.
        Raises UserError for what cannot be made, before any work is done.
        """
        check_output_type(output_type)
        request = Request(
            prompt, negative_prompt, image, video, num_given_frames, num_frames, height, width, fps, num_inference_steps,
            guidance_scale, temperature, top_k, top_p, history_mask_ratio, mask_given_frames, guidance_interval,
            confidence_threshold, later_steps, history_frames, num_videos_per_prompt, seed, generator,
        )  # fmt: skip
        ready = self.prepare(request)
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

        try:
            for codes in self._latents(ready, after_step):
                done.append(codes)
        except Interrupted:
            if not done:
                raise RunError("the callback interrupted the call before its first latent frame was done") from None
        codes = torch.cat(done, dim=1)  # [B, t, h, w]

        # clip by clip to bound the decoder's memory
        frames = codes if output_type == "latent" else as_output_type([self._decode(c) for c in codes], output_type)
        settled = ready.settled(codes.shape[1], self.model.config.temporal_compression)
        return LumosPipelineOutput(frames, codes, ready.seeds, settled) if return_dict else (frames,)

    def stream(
        self, prompt: str | Sequence[str], *, on_step: Callable[[int, int, int, int], None] = lambda *_: None, **options: Any
    ) -> Iterator[list[np.ndarray]]:
        """Make clips and yield their frames as soon as their latent frame is done: for each clip uint8 [n, H, W, 3].

        n is 1 for the first latent frame of a clip, then the temporal compression (given frames come at once, first). Joined,
        they are the frames of a call with the same arguments, to rounding. `options`: those of a call that say what is made, by
        name; see `Request`. What the decoder keeps does not grow with the clip if history_frames is set and the video tokenizer
        has an attention_window. Closing the iterator ends the work. Raises UserError here, before the first frame is asked for.
        """
        try:
            request = Request(prompt, **options)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(Request))
            raise UserError(f"stream: {str(error).split('() ')[-1]}; it takes {known}") from error
        ready = self.prepare(request)
        steps_of = ready.sampling.steps_of
        return self._frames(ready, lambda frame, step, ids: on_step(frame, ready.new_frames, step, steps_of(frame)))

    def _frames(self, ready: Prepared, on_step: Callable[[int, int, Tensor], None]) -> Iterator[list[np.ndarray]]:
        decoder = StreamDecoder(self.video_tokenizer)
        device = next(self.video_tokenizer.parameters()).device
        given = [torch.stack(ready.given)] if ready.given else []
        for codes in itertools.chain(given, self._latents(ready, on_step)):
            with torch.inference_mode():
                frames = [to_uint8(clip) for clip in decoder.push(codes.to(device))]
            yield frames

    def _latents(self, ready: Prepared, on_step: Callable[[int, int, Tensor], None]) -> Iterator[Tensor]:
        """Codes [B, 1, h, w] on the CPU of each new latent frame. Interrupted if a callback asks."""
        self._interrupt, self._num_timesteps = False, ready.sampling.steps_before(ready.new_frames)
        for codes in generate_frames(
            self.model, ready.conditional, ready.unconditional, grid=ready.grid, new_frames=ready.new_frames,
            settings=ready.sampling, generators=ready.generators(), on_step=on_step, kept=self._kept,
        ):  # fmt: skip
            yield codes.cpu()[:, None]

    def prepare(self, request: Request) -> Prepared:
        """Settle and check a request, encode what is given, write the prefixes. UserError for what cannot be made."""
        config = self.model.config
        if request.generator is not None and request.seed is not None:
            raise UserError("both seed and generator are given; give one of them")
        sampling = override(self.settings, **{f.name: getattr(request, f.name) for f in fields(GenerationSettings)})
        lists = align(
            *repeat_each(request.num_videos_per_prompt, request.prompt, request.negative_prompt, request.image, request.video),
            request.seed,
        )
        if request.generator is not None:
            lists["seed"] = seeds_from(request.generator, len(lists["prompt"]))
        prompts, negatives, images, videos, seeds = lists.values()
        clip = override(self.clip, **{f.name: getattr(request, f.name, None) for f in fields(ClipDefaults)})
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
        pictures = [load_image(i) for i in images] if images[0] is not None else None
        if pictures and clip.target_size and request.height is None and request.width is None:
            sizes = {bucket_for(*p.shape[:2], clip.target_size, config.pixels_per_size_unit) for p in pictures}
            if len(sizes) > 1:
                raise UserError(f"the pictures ask for different sizes {sorted(sizes)}; give height and width, or make them apart")
            ((h, w),) = sizes
            clip = override(clip, height=h, width=w)
        rows, cols = (
            size_units(pixels, name, config) * config.pixels_per_size_unit // config.spatial_compression
            for name, pixels in (("height", clip.height), ("width", clip.width))
        )
        if pictures:
            given = [fit(p[None], clip.height, clip.width) for p in pictures]
        elif videos[0] is not None:
            given = self._load_videos(videos, clip, request.num_given_frames)
        else:
            given = []
        if given and len(given[0]) >= clip.num_frames:
            raise UserError(f"num_frames {clip.num_frames} leaves nothing to generate after {len(given[0])} given frames")
        given_codes = [self._encode(g) for g in given]

        # 2. prefixes of both branches
        told = clip if sampling.history_frames is None else override(clip, num_frames=min(clip.num_frames, self.clip.num_frames))
        begin_with = given_codes or [None] * len(prompts)
        conditional = [self._prefix(text, told, codes) for text, codes in zip(prompts, begin_with, strict=True)]
        unconditional = None
        if sampling.guidance_scale != 1:
            unconditional = [self._prefix(text, told, codes) for text, codes in zip(negatives, begin_with, strict=True)]
        elif negatives[0] is not None:
            raise UserError("negative_prompt has no effect with guidance_scale 1; raise guidance_scale or leave it out")

        # 3. frames
        given_latents = len(given_codes[0]) if given_codes else 0
        new_frames = num_latent_frames(clip.num_frames, config.temporal_compression) - given_latents
        if new_frames == 1:
            without_effect("a single new latent frame", later_steps=request.later_steps)
        if given_latents + new_frames <= 2 + (sampling.history_frames or 0):
            without_effect(f"a clip of {given_latents + new_frames} latent frames", history_frames=request.history_frames)
        span = Frame(0, rows, cols).end
        check_length(max(map(len, conditional)) - given_latents * span, span, given_latents + new_frames, sampling, config)
        return Prepared(
            sampling, clip, (rows, cols), conditional, unconditional, given_codes, len(given[0]) if given else 0, new_frames, seeds
        )

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """What the video tokenizer makes of a clip: uint8 [T, H, W, 3] there and back."""
        return self._decode(self._encode(as_uint8(frames)))

    def text_ids(self, prompt: str, clip: ClipDefaults) -> list[int]:
        """The prompt as the model reads it for a clip of this shape; UserError if it is empty or too long."""
        return prompt_ids(prompt, clip, self.model.config, self.text_tokenizer)

    def _prefix(self, prompt: str | None, clip: ClipDefaults, given: Tensor | None) -> Tensor:
        """Ids before the first new frame; prompt None: without text."""
        config = self.model.config
        text = None if prompt is None else self.text_ids(prompt, clip)
        duration, fps = clip_header(clip.num_frames, clip.fps)
        prefix = torch.tensor(build_prefix(text, fps=fps, duration=duration, config=config))
        return prefix if given is None else torch.cat([prefix, build_frames(given, config).flatten()])

    def _load_videos(self, videos: Sequence[Any], clip: ClipDefaults, count: int | None) -> list[np.ndarray]:
        stride = self.model.config.temporal_compression
        if count is None:
            wanted = 1 + (clip.num_frames // 2) // stride * stride
            counts = {min(wanted, 1 + (clip_length(v, clip.fps) - 1) // stride * stride) for v in videos}
            if len(counts) > 1:
                raise UserError(f"the videos would give {sorted(counts)} frames each; set num_given_frames, or make them apart")
            (count,) = counts
        check_num_frames(count, stride, "num_given_frames")
        return [load_video(v, clip, count) for v in videos]

    @torch.inference_mode()
    def _encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [T, H, W, 3] -> codes [t, h, w] on the CPU."""
        video = from_uint8(frames)[None]
        parameter = next(self.video_tokenizer.parameters())
        return self.video_tokenizer.encode(video.to(parameter.device, parameter.dtype))[0].cpu()

    @torch.inference_mode()
    def _decode(self, codes: Tensor) -> np.ndarray:
        """codes [t, h, w] -> uint8 [T, H, W, 3]."""
        device = next(self.video_tokenizer.parameters()).device
        return to_uint8(self.video_tokenizer.decode(codes[None].to(device))[0])


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
        raise UserError(f"the prompt is {prompt!r}; give a string")
    if not prompt.strip():
        raise UserError(f"the prompt is empty ({prompt!r}); say in words what the clip shows")
    return prompt


def check_num_frames(num_frames: int, stride: int, name: str = "num_frames") -> None:
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
        warnings.warn(
            f"the clip's positions go up to {last}, this model was made for {limit}: how far away text and first frame are is "
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
    for name, length in lengths.items():
        if length != count or length == 0:
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
        raise UserError(f"seed {seed!r} is not allowed; give a whole number from 0 to {MAX_SEED}")
    return value


def without_effect(where: str, **options: Any) -> None:
    """Say which of these were given although they change nothing."""
    if given := [f"{name}={value}" for name, value in options.items() if value is not None]:
        warnings.warn(f"{', '.join(given)} has no effect on {where}", stacklevel=3)


def load_image(image: Any) -> np.ndarray:
    """A path, a PIL picture or an array -> uint8 [H, W, 3]."""
    if isinstance(image, str | Path):
        return read_image(image)
    array = as_uint8(np.array(image.convert("RGB") if hasattr(image, "convert") else image))
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(f"image is an array {array.dtype} {list(array.shape)}; give uint8 [H, W, 3], floats in [0, 1], or a path")
    return array


def clip_length(video: Any, fps: int) -> int:
    """Frames that a clip has at this rate."""
    return count_frames(video, fps) if isinstance(video, str | Path) else len(check_frames(video))


def check_frames(video: Any) -> np.ndarray:
    video = as_uint8(video) if isinstance(video, np.ndarray) else video
    if not isinstance(video, np.ndarray) or video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not len(video):
        what = f"an array {video.dtype} {list(video.shape)}" if isinstance(video, np.ndarray) else f"of type {type(video).__name__}"
        raise UserError(f"video is {what}; give a path, uint8 [T, H, W, 3] or floats in [0, 1]")
    return video


def load_video(video: Any, clip: ClipDefaults, count: int) -> np.ndarray:
    """The last `count` frames of a path's clip at clip.fps, or of an array [T, H, W, 3], fitted to the clip's size."""
    size = (clip.height, clip.width)
    if isinstance(video, str | Path):
        return read_video(video, fps=clip.fps, num_frames=count, from_end=True, size=size)[0]
    video = check_frames(video)
    if len(video) < count:
        raise UserError(f"video has {len(video)} frames, {count} are needed; lower num_given_frames")
    return fit(video[-count:], *size)
