"""The pipeline of Lumos-1.

It encodes prompts and given frames as ids, samples the codes of one latent frame after the other, and
turns codes into pixels. Given frames are the frames of an image or a video that the clip begins with, and
the last frame for a model that was trained with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.data.trained_on import TRAINED_ON_FILE, TrainedOn, trained_on_of, write_trained_on
from lumos.errors import NotFinite, UserError
from lumos.files import updating_folder
from lumos.lora import check_no_adapter, fingerprints, merge_adapter
from lumos.models.lumos1.cache import PrefixCache
from lumos.models.lumos1.callback import TENSOR_INPUTS, step_callback
from lumos.models.lumos1.conversion import check_written
from lumos.models.lumos1.modeling import COMPILED, MODEL_FILES, LumosForVideoGeneration
from lumos.models.lumos1.request import (
    LumosEncoded,
    LumosResolved,
    check_agreement,
    largest_side,
    prompt_ids,
    resolve,
    takes_of,
)
from lumos.models.lumos1.sampling import generate_frames
from lumos.models.lumos1.sequence import build_frames, build_last, num_latent_frames
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.acceleration import compile_parts, has_int8_weights, use_int8_weights
from lumos.pipeline.base import AfterStep, StepCallback, VideoPipeline
from lumos.pipeline.defaults import DEFAULTS_FILE, ClipDefaults, read_defaults, write_defaults
from lumos.pipeline.hub import local_folder, model_folder
from lumos.pipeline.placement import is_spread, loading_arguments, pick_dtype
from lumos.pipeline.request import Request
from lumos.runtime import bars_on_terminals, pick_device, plain_defaults
from lumos.video.frames import from_uint8, to_uint8
from tokenizer import TextTokenizer, VideoTokenizer
from tokenizer.streaming import StreamDecoder
from tokenizer.text import PLACES

PARTS_OF_FOLDER = f"{MODEL_FILES}|{DEFAULTS_FILE}|{TRAINED_ON_FILE}|{PLACES}|video_tokenizer(\\.json)?"


class LumosPipeline(VideoPipeline):
    """The pipeline of Lumos-1: the decoder with its text tokenizer and its video tokenizer.

    Raises UserError if a tokenizer does not fit the model.
    """

    generator = "lumos1"
    sampling = GenerationSettings
    tensor_inputs = TENSOR_INPUTS
    component_names = ("model", "text_tokenizer", "video_tokenizer")

    def __init__(
        self,
        model: LumosForVideoGeneration,
        text_tokenizer: TextTokenizer,
        video_tokenizer: VideoTokenizer,
        settings: GenerationSettings | None = None,
        clip: ClipDefaults | None = None,
        trained_on: TrainedOn | None = None,
        tokenizer_folders: tuple[str | Path, str | Path] | None = None,
    ):
        check_agreement(model.config, text_tokenizer, video_tokenizer)
        self.model, self.text_tokenizer, self.video_tokenizer = model.eval(), text_tokenizer, video_tokenizer.eval()
        self.settings, self.clip = settings or GenerationSettings(), clip or ClipDefaults()
        self.trained_on, self.tokenizer_folders = trained_on, tokenizer_folders
        self._prefix_cache = PrefixCache()
        self.takes = takes_of(model.config)

    @classmethod
    @plain_defaults()
    @bars_on_terminals()
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        video_tokenizer: str | Path | None = None,
        text_tokenizer: str | Path | None = None,
        lora: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        int8: bool = False,
        compile: bool = False,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        **download: Any,
    ) -> LumosPipeline:
        """Load a pipeline from a model folder.

        Args:
            folder: a saved or released model folder, or a repository ORG/NAME on the Hugging Face hub.
            revision: a branch, a tag or a commit of that repository.
            download: token, cache_dir, local_files_only and force_download, see `lumos.pipeline.hub.local_folder`.
            video_tokenizer, text_tokenizer: other folders of the tokenizers. By default they are
                `video_tokenizer/` and `text_tokenizer/` in `folder`.
            lora: an adapter folder, which a run with lora.rank exports, or its repository. It is merged into the weights.
            dtype, torch_dtype: a torch dtype or its name; default bfloat16 on CUDA, float32 on a CPU.
            device: default CUDA if there is a GPU, else the CPU.
            int8: quantize the decoder layers to int8 weights, see `lumos.pipeline.acceleration`. The
                pipeline can then not be saved.
            compile: compile norms and MLPs, see `lumos.pipeline.acceleration`.
            device_map, max_memory: for decoders that do not fit on the device, see
                `lumos.pipeline.placement`.

        Raises UserError for folders that are missing, incomplete or do not belong together, and for
        options that cannot be combined.
        """
        folder = model_folder(cls, folder, revision, download, cls.generator)
        if not Path(folder).is_dir():
            raise UserError(f"there is no model folder {folder}; give the folder of a saved or released model")
        device = pick_device(device)
        dtype = pick_dtype(dtype, torch_dtype, device)
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
        settings, clip = read_defaults(Path(folder), GenerationSettings)
        if lora is not None:
            lora = local_folder(lora)
            model = merge_adapter(model, lora, fingerprints(video_tokenizer or folder, text_tokenizer or folder))
        if int8:
            use_int8_weights(model.model.layers)
        if compile:
            compile_parts(model, COMPILED)
        tokenizers = (video_tokenizer or folder, text_tokenizer or folder)
        return cls(model, text, video, settings, clip, trained_on_of(folder, lora), tokenizers)

    @bars_on_terminals()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the decoder, both tokenizers and the defaults into one folder, which `from_pretrained` reads.

        If the process is killed, the folder holds the old pipeline or the new one, never a part. Other
        files of the folder are kept.
        Raises UserError for a decoder with a device_map or int8 weights, and RunError if a tensor is
        missing from the written files.
        """
        if is_spread(self.model):
            raise UserError("a decoder with a device_map is not saved; load it without one to save it")
        if has_int8_weights(self.model.model.layers):
            raise UserError("a decoder with int8 weights is not saved; load it without int8 to save it")
        check_no_adapter(folder)
        with updating_folder(folder, re.compile(PARTS_OF_FOLDER).fullmatch) as writing:
            self.model.save_pretrained(writing)
            check_written(writing, {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()})
            self.text_tokenizer.save_pretrained(writing / "text_tokenizer")
            self.video_tokenizer.save_pretrained(writing / "video_tokenizer")
            write_defaults(writing, self.settings, self.clip)
            write_trained_on(writing, self.trained_on)

    @property
    def temporal_compression(self) -> int:
        return self.model.config.temporal_compression

    @property
    def size_unit(self) -> int:
        return self.model.config.pixels_per_size_unit

    @property
    def largest_side(self) -> int:
        return largest_side(self.model.config)

    def resolved(self, request: Request) -> LumosResolved:
        return resolve(request, self.model.config, self.text_tokenizer, self.settings, self.clip)

    def encoded(self, resolved: LumosResolved) -> LumosEncoded:
        """Encode the given frames and append their codes to each prefix; a given last frame is encoded as a picture.

        image_guidance_scale compares with prefixes whose given frames are masked. If it equals guidance_scale, the frames
        between cancel out and only two branches are left.
        """
        pictures = [list(frames.values()) for frames in resolved.given if frames]
        ends = [self.encode_frames(frames[-1][None]) for frames in pictures if resolved.has_last]
        given = [self.encode_frames(np.stack(frames[: len(frames) - resolved.has_last])) for frames in pictures]
        last_time = num_latent_frames(resolved.clip.num_frames, self.temporal_compression) - 1
        sampling, text_free = resolved.sampling, resolved.unconditional
        is_joint = sampling.image_guidance_scale not in (None, 1) and sampling.image_guidance_scale == sampling.guidance_scale

        def behind(prefixes: list[Tensor], *, masked: bool = False) -> list[Tensor]:
            if not given:
                return prefixes
            shown, shown_ends = ([torch.full_like(x, -1) if masked else x for x in codes] for codes in (given, ends))
            parts = [prefixes, [build_frames(codes, self.model.config).flatten() for codes in shown]]
            if ends:
                parts.append([build_last(codes[0], last_time, self.model.config) for codes in shown_ends])
            return [torch.cat(row) for row in zip(*parts, strict=True)]

        return LumosEncoded(
            resolved=resolved,
            given=given,
            conditional=behind(resolved.conditional),
            unconditional=None if text_free is None else behind(text_free, masked=is_joint),
            without_given=behind(text_free, masked=True) if sampling.has_three_branches else None,
            later={frame: behind(prefixes) for frame, prefixes in resolved.later_prefixes.items()},
        )

    def latents(self, encoded: LumosEncoded, after_step: AfterStep) -> Iterator[Tensor]:
        """Yield the codes, int64 [B, 1, h, w], of each new latent frame."""
        resolved = encoded.resolved
        for codes in generate_frames(
            self.model, encoded.conditional, encoded.unconditional, without_given=encoded.without_given, grid=resolved.grid,
            new_frames=resolved.new_frames, settings=resolved.sampling, generators=encoded.generators(), on_step=after_step,
            prefix_cache=self._prefix_cache, later=encoded.later,
        ):  # fmt: skip
            yield codes.cpu()[:, None]

    def decoder(self) -> Callable[[Tensor], np.ndarray]:
        decoder, device = StreamDecoder(self.video_tokenizer), next(self.video_tokenizer.parameters()).device

        @torch.inference_mode()
        def push(codes: Tensor) -> np.ndarray:
            return to_uint8(decoder.push(codes[None].to(device))[0])

        return push

    @torch.inference_mode()
    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """Encode frames, uint8 [T, H, W, 3] -> codes int64 [t, h, w] on the CPU.

        Raises NotFinite if the video tokenizer's numbers are NaN.
        """
        video = from_uint8(frames)[None]
        parameter = next(self.video_tokenizer.parameters())
        codes = self.video_tokenizer.encode(video.to(parameter.device, parameter.dtype))[0].cpu()
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.video_tokenizer.num_codes:  # NaN becomes a code out of range
            raise NotFinite(
                "the video tokenizer's numbers are not finite where it reads frames; check its weights, or take dtype float32"
            )
        return codes

    def prompt_tokens(self, prompt: str, clip: ClipDefaults) -> int:
        return len(prompt_ids(prompt, clip, self.model.config, self.text_tokenizer))

    def step_hook(
        self, callback: StepCallback, names: Sequence[str], encoded: LumosEncoded, done: list[Tensor]
    ) -> AfterStep:
        """Return the function that the decoding loop calls after each step, see `step_callback`.

        It offers two tensors to the callback: "codes" int64 [B, h, w] of the current latent frame, with -1
        where a code is still masked, which the callback may change; and "history" [B, t, h, w], the codes of
        the frames before.
        """
        resolved = encoded.resolved
        empty = torch.empty(len(resolved.seeds), 0, *resolved.grid, dtype=torch.int64)
        return step_callback(
            self, callback, names, grid=resolved.grid, config=self.model.config, steps_before=resolved.sampling.steps_before,
            history=lambda: torch.cat([empty, *done], dim=1),
        )  # fmt: skip

    def is_open(self, resolved: LumosResolved, step: int, state: Tensor) -> bool:
        return bool((state == self.model.config.mask_token_id).any())
