"""The pipeline of STIV.

It encodes prompts, encodes given frames as latents, integrates the learned velocity from noise to latents, and turns
latents into pixels. A clip that is longer than those of the training is made in several passes, see
`lumos.models.stiv.passes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lumos.data.seeding import sample_generator
from lumos.data.trained_on import TRAINED_ON_FILE, TrainedOn, trained_on_of, write_trained_on
from lumos.errors import NotFinite, NotFound, UserError, shown
from lumos.files import updating_folder
from lumos.lora import check_no_adapter, fingerprints, merge_adapter
from lumos.models.stiv.attention import StivRMSNorm
from lumos.models.stiv.block import StivMLP
from lumos.models.stiv.block_reuse import BlockReuse
from lumos.models.stiv.flow import drawn_noise, time_grid
from lumos.models.stiv.guidance import Guidance, GuidanceBranch, over_branches, sample
from lumos.models.stiv.latents import AUTOENCODER, LatentSpace
from lumos.models.stiv.modeling import MODEL_FILES, Micro, StivForVideoGeneration
from lumos.models.stiv.passes import InOrder, SamplingPass
from lumos.models.stiv.request import LARGEST_SIDE, TAKES, StivResolved, resolve
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.text_encoder import FrozenTextEncoder, TextIds, TextStates, text_ids
from lumos.pipeline.acceleration import compile_parts, has_int8_weights, use_int8_weights
from lumos.pipeline.base import AfterStep, Encoded, StepCallback, VideoPipeline
from lumos.pipeline.calls import check_answer
from lumos.pipeline.defaults import DEFAULTS_FILE, ClipDefaults, read_defaults, write_defaults
from lumos.pipeline.hub import local_folder, model_folder
from lumos.pipeline.inputs import check_prompt
from lumos.pipeline.placement import is_spread, loading_arguments, pick_dtype
from lumos.pipeline.request import Request
from lumos.runtime import bars_on_terminals, pick_device, plain_defaults
from tokenizer import TextTokenizer
from tokenizer.text import PLACES

USUAL_CLIP = ClipDefaults(num_frames=20, height=256, width=256, fps=8, target_size=None)
"""The shape of a clip of a model folder without pipeline.json."""
TEXT_ENCODER = "text_encoder"
"""The folder of a frozen text encoder in a model folder."""
PARTS_OF_FOLDER = (
    f"{MODEL_FILES}|{DEFAULTS_FILE}|{TRAINED_ON_FILE}|{TEXT_ENCODER}|{PLACES}|video_tokenizer(\\.json)?|{AUTOENCODER}"
)


@dataclass(frozen=True, kw_only=True)
class StivEncoded(Encoded):
    """A resolved request, encoded for the network.

    known   the latents [B, C, h, w] of given frames by their number
    text    the states of the prompts of all clips, and of the texts that guidance subtracts
    """

    resolved: StivResolved
    known: dict[int, Tensor]
    text: tuple[TextStates, TextStates]


class StivPipeline(VideoPipeline):
    """The pipeline of STIV: the transformer with its text encoder and the network of its latents.

    text: the text tokenizer of a model with a small text encoder, else the frozen text encoder.
    Raises UserError if the parts do not belong together.
    """

    generator = "stiv"
    sampling = StivOptions
    takes = TAKES
    tensor_inputs = ("latents",)
    component_names = ("model", "text", "space")

    def __init__(
        self,
        model: StivForVideoGeneration,
        text: TextTokenizer | FrozenTextEncoder,
        space: LatentSpace,
        settings: StivOptions | None = None,
        clip: ClipDefaults | None = None,
        trained_on: TrainedOn | None = None,
        tokenizer_folders: tuple[str | Path, str | Path] | None = None,
    ):
        check_agreement(model, text, space)
        self.model, self.text, self.space = model.eval(), text, space
        self.settings, self.clip = settings or StivOptions(), clip or USUAL_CLIP
        self.trained_on, self.tokenizer_folders = trained_on, tokenizer_folders

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
    ) -> StivPipeline:
        """Load a pipeline from a model folder.

        Args:
            folder: a saved model folder, or a repository ORG/NAME on the Hugging Face hub.
            revision: a branch, a tag or a commit of that repository.
            download: token, cache_dir, local_files_only and force_download, see `lumos.pipeline.hub.local_folder`.
            video_tokenizer: another folder of the network of the latents, a video tokenizer or an image autoencoder. By
                default it is `video_tokenizer/` or `autoencoder/` in `folder`.
            text_tokenizer: another folder of the text tokenizer, or of the frozen text encoder with its tokenizer. By
                default it is `text_tokenizer/` or `text_encoder/` in `folder`.
            lora: an adapter folder, which a run with lora.rank exports, or its repository. It is merged into the weights.
            dtype, torch_dtype: a torch dtype or its name; default bfloat16 on CUDA, float32 on a CPU.
            device: default CUDA if there is a GPU, else the CPU.
            int8: quantize the blocks to int8 weights. The pipeline can then not be saved.
            compile: compile norms and MLPs.
            device_map, max_memory: for models that do not fit on the device, see `lumos.pipeline.placement`.

        Raises UserError for folders that are missing, incomplete or do not belong together, and for options that cannot be
        combined.
        """
        folder = model_folder(cls, folder, revision, download, cls.generator)
        if not folder.is_dir():
            raise NotFound(f"there is no model folder {folder}; give the folder of a saved model")
        device = pick_device(device)
        dtype = pick_dtype(dtype, torch_dtype, device)
        placement = loading_arguments(device, device_map, max_memory)
        model = StivForVideoGeneration.from_pretrained(folder, dtype=dtype, **placement)
        if not is_spread(model):
            model = model.to(device)
        elif lora is not None or int8 or compile:
            raise UserError("lora, int8 and compile need the whole model in one place; merge the adapters, or leave them out")
        config = model.config
        try:
            if config.text_encoder == "small":
                text = TextTokenizer.from_pretrained(text_tokenizer or folder, limit=config.text_vocab_size)
            else:
                text = FrozenTextEncoder.from_pretrained(
                    text_tokenizer or folder / TEXT_ENCODER, width=config.text_width, max_tokens=config.max_prompt_tokens
                ).to(device, dtype)
        except (UserError, OSError) as error:
            raise UserError(f"{error} (text_tokenizer / --text-tokenizer names another place)") from error
        try:
            space = LatentSpace.from_config(video_tokenizer or folder, config, dtype, device)
        except (ValueError, OSError) as error:
            raise UserError(f"{error} (video_tokenizer / --video-tokenizer names another place)") from error
        settings, clip = read_defaults(folder, StivOptions, USUAL_CLIP)
        if lora is not None:
            lora = local_folder(lora)
            model = merge_adapter(model, lora, fingerprints(video_tokenizer or folder, text_tokenizer or folder))
        if int8:
            use_int8_weights(model.blocks)
        if compile:
            compile_parts(model, (StivMLP, StivRMSNorm))
        tokenizers = (video_tokenizer or folder, text_tokenizer or folder)
        return cls(model, text, space, settings, clip, trained_on_of(folder, lora), tokenizers)

    @bars_on_terminals()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its text encoder, the network of its latents and the defaults into one folder.

        If the process is killed, the folder holds the old pipeline or the new one, never a part. Other files of the folder are
        kept. Raises UserError for a model with a device_map or int8 weights.
        """
        if is_spread(self.model):
            raise UserError("a model with a device_map is not saved; load it without one to save it")
        if has_int8_weights(self.model.blocks):
            raise UserError("a model with int8 weights is not saved; load it without int8 to save it")
        check_no_adapter(folder)
        with updating_folder(folder, re.compile(PARTS_OF_FOLDER).fullmatch) as writing:
            self.model.save_pretrained(writing)
            if isinstance(self.text, FrozenTextEncoder):
                self.text.model.save_pretrained(writing / TEXT_ENCODER)
                self.text.tokenizer.save_pretrained(writing / TEXT_ENCODER)
            else:
                self.text.save_pretrained(writing / "text_tokenizer")
            self.space.save_pretrained(writing)
            write_defaults(writing, self.settings, self.clip)
            write_trained_on(writing, self.trained_on)

    @property
    def video_tokenizer(self) -> torch.nn.Module:
        """The network of the latents."""
        return self.space.network

    def networks(self) -> list[torch.nn.Module]:
        return [*super().networks(), *self.text_encoders[:1 if isinstance(self.text, FrozenTextEncoder) else 0]]

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        return [self.text.model if isinstance(self.text, FrozenTextEncoder) else self.model.text_encoder]

    @property
    def temporal_compression(self) -> int:
        return self.space.temporal_compression

    @property
    def size_unit(self) -> int:
        return self.model.config.spatial_compression * self.model.config.patch_size

    @property
    def largest_side(self) -> int:
        return LARGEST_SIDE

    def to(self, *args: Any, device: str | int | torch.device | None = None, dtype: torch.dtype | str | None = None) -> Self:
        super().to(*args, device=device, dtype=dtype)
        if isinstance(self.text, FrozenTextEncoder):
            self.text.to(self.model.device, self.dtype)  # with offload, this is host memory
        return self

    def resolved(self, request: Request) -> StivResolved:
        return resolve(request, self.model.config, self.settings, self.clip, self._text_ids)

    def _text_ids(self, texts: Sequence[str]) -> TextIds:
        if isinstance(self.text, FrozenTextEncoder):
            return self.text.text_ids(texts)
        return text_ids(self.text, texts, self.model.config)

    @torch.inference_mode()
    def encoded(self, resolved: StivResolved) -> StivEncoded:
        """Encode the prompts and the given frames. Raises NotFinite if the numbers of a network are NaN or infinite."""
        ids, mask = (part.to(self.device) for part in resolved.ids)
        encoder = self.text if isinstance(self.text, FrozenTextEncoder) else self.model.text_encoder
        states, clips = encoder.encode(ids, mask), len(resolved.seeds)
        if not torch.isfinite(states.states).all():
            raise NotFinite("the text encoder's numbers are not finite; check its weights, or take dtype float32", range(clips))
        known = {}
        if resolved.given_latents:
            of_clips = torch.stack([self.encode_frames(np.stack(list(frames.values()))) for frames in resolved.given])
            known = dict(zip(sorted(resolved.given_latents), of_clips.unbind(1), strict=True))
        text = states.rows(range(clips)), states.rows(range(clips, 2 * clips))
        return StivEncoded(resolved=resolved, given=[], known=known, text=text)

    @torch.inference_mode()
    def latents(self, encoded: StivEncoded, after_step: AfterStep) -> Iterator[Tensor]:
        """Yield the latents float32 [B, n, C, h, w] of all frames, given ones included, after each pass that completes some."""
        resolved, store = encoded.resolved, encoded.parts
        order = InOrder(resolved.latent_frames, encoded.known)
        for number in range(len(resolved.passes)):
            made = None if store is None else store.get(number)
            if made is None:
                made = self._made(encoded, number, order.known, after_step)
                if store is not None:
                    store.put(number, made)
            if ready := order.take(made):
                yield torch.stack(ready, dim=1)

    def _made(
        self, encoded: StivEncoded, number: int, known: Mapping[int, Tensor], after_step: AfterStep
    ) -> dict[int, Tensor]:
        """Run a pass and return the latents [B, C, h, w] of its new frames, on the CPU, by the number of the frame.

        Raises NotFinite if the latents of a clip are NaN or infinite after a step.
        """
        resolved, part = encoded.resolved, encoded.resolved.passes[number]
        sampling, clips, frames = resolved.sampling, len(resolved.seeds), part.frames
        generators = encoded.generators() if number == 0 else [
            sample_generator(seed, 0, number, "pass of a clip") for seed in resolved.seeds
        ]  # fmt: skip
        noise = drawn_noise(generators, len(frames), self.model.config.latent_channels, *resolved.grid).to(self.device)
        given = values = None
        if part.given:
            given = torch.tensor([frame in part.given for frame in frames], device=self.device).expand(clips, -1)
            values = torch.stack([known[n].to(noise) if n in part.given else torch.zeros_like(noise[:, 0]) for n in frames], dim=1)
        steps = sampling.num_inference_steps

        def watched(step: int, state: Tensor) -> None:
            check_finite(state)
            after_step(number, step, state)

        made = sample(
            self._velocity(encoded, part, noise.shape, given), noise, time_grid(steps, sampling.shift), sampling.solver,
            guidance_of(sampling, bool(part.given), self.model.config), values, given, watched,
        ).cpu()  # fmt: skip
        return {frame: made[:, frames.index(frame)] for frame in part.made}

    def _velocity(
        self, encoded: StivEncoded, part: SamplingPass, shape: torch.Size, given: Tensor | None
    ) -> Callable[[Tensor, float, Sequence[GuidanceBranch]], Tensor]:
        """Return the velocity of `lumos.models.stiv.guidance` for a pass whose latents have this shape."""
        resolved, (clips, frames, _, *grid) = encoded.resolved, shape
        config, sampling, (full, null) = self.model.config, resolved.sampling, encoded.text
        micro = Micro.default(config, clips, frames, *grid, device=self.device)
        micro = replace(micro, stride=torch.full_like(micro.stride, resolved.stride * part.pace))
        reuse = BlockReuse(sampling.block_reuse) if sampling.block_reuse > 1 else None
        nothing = None if given is None else torch.zeros_like(given)

        def velocity(x: Tensor, t: float, branches: Sequence[GuidanceBranch]) -> Tensor:
            text = TextStates(*(over_branches(branches, a, b) for a, b in zip(full, null, strict=True)))
            return self.model(
                x, torch.full((len(x),), t, device=x.device), *text,
                given=None if given is None else over_branches(branches, given, nothing, "image"),
                given_time=1 - sampling.given_noise, micro=micro.repeated(len(branches)), reuse=reuse,
            ).sample  # fmt: skip

        return velocity

    def decoder(self) -> Callable[[Tensor], np.ndarray]:
        return self.space.decoder()

    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """Encode frames, uint8 [T, H, W, 3] -> latents float32 [t, C, h, w] on the CPU."""
        return self.space.encode(frames[None])[0].cpu()

    def prompt_tokens(self, prompt: str, clip: ClipDefaults) -> int:
        return self._text_ids([check_prompt(prompt, needs_words=False)]).ids.shape[1]

    def step_hook(
        self, callback: StepCallback, names: Sequence[str], encoded: StivEncoded, done: list[Tensor]
    ) -> AfterStep:
        """Return the function that calls the callback with "latents" [B, T, C, h, w], the state of the running pass.

        The callback may return {"latents": ...} of the same shape. The third argument of the callback is the number of
        frames that the pass makes, 0 after its last step. Given frames stay as they are.
        """
        if not callable(callback):
            raise UserError(f"callback_on_step_end is {shown(callback)}; give a function of (pipe, step, open frames, tensors)")
        if isinstance(names, str):
            said = shown(names)
            raise UserError(f"callback_on_step_end_tensor_inputs is the text {said}; give a list of names, as [{said}]")
        if unknown := [name for name in names if name not in self.tensor_inputs]:
            allowed = ", ".join(self.tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs {shown(unknown)} are not offered; allowed: {allowed}")
        resolved = encoded.resolved

        def hook(number: int, step: int, state: Tensor) -> None:
            part = resolved.passes[number]
            count = len(part.made) if self.is_open(resolved, step, state) else 0
            tensors = {name: state.clone() for name in names}
            result = callback(self, resolved.sampling.steps_before(number) + step, count, tensors)
            if "latents" in (result := check_answer(result, self.tensor_inputs)):
                state.copy_(check_latents(result["latents"], state))

        return hook

    def is_open(self, resolved: StivResolved, step: int, state: Tensor) -> bool:
        return step + 1 < resolved.sampling.num_inference_steps


def guidance_of(sampling: StivOptions, has_given: bool, config: Any) -> Guidance:
    """Return the guidance of a pass. Without given frames the scale of the image has no effect."""
    return Guidance(
        scale=sampling.guidance_scale, image_scale=sampling.image_guidance_scale if has_given else None,
        renorm=sampling.guidance_renorm, null_image=sampling.null_image, interval=sampling.guidance_interval,
        given_noise=sampling.given_noise, patch=(config.temporal_patch_size, config.patch_size, config.patch_size),
    )  # fmt: skip


def check_finite(state: Tensor) -> None:
    """Raise NotFinite, with the indices of the clips, if latents [B, ...] are NaN or infinite."""
    broken = ~torch.isfinite(state).flatten(1).all(dim=1)
    if broken.any():
        raise NotFinite(
            "the model's numbers are not finite (NaN or infinity) after a step; check the weights and the adapter, or, with dtype "
            "float16, whose largest number is 65504, take bfloat16 or float32",
            broken.nonzero().flatten().tolist(),
        )


def check_latents(changed: Any, state: Tensor) -> Tensor:
    """Return the latents that a callback has changed. Raises UserError unless they are finite and have the shape of `state`."""
    if not isinstance(changed, Tensor) or changed.shape != state.shape or not changed.is_floating_point():
        said = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"the callback gave latents {said}; give floats {list(state.shape)}")
    if not torch.isfinite(changed).all():
        raise UserError("the callback gave latents that are not finite; give numbers")
    return changed.to(state)


def check_agreement(model: StivForVideoGeneration, text: TextTokenizer | FrozenTextEncoder, space: LatentSpace) -> None:
    """Raise UserError unless the parts of a pipeline belong together."""
    config = model.config
    is_frozen = isinstance(text, FrozenTextEncoder)
    if is_frozen != (config.text_encoder == "folder"):
        wanted = "a text tokenizer" if is_frozen else "a frozen text encoder"
        raise UserError(f"the model's text encoder is {config.text_encoder!r}; give {wanted} with it")
    if is_frozen and text.width != config.text_width:
        raise UserError(f"the text encoder has width {text.width}; the model needs text_width {config.text_width}")
    if not is_frozen and text.max_text_id >= config.text_vocab_size:
        raise UserError(
            f"the text tokenizer has ids up to {text.max_text_id}, the model's text encoder {config.text_vocab_size} ids: they "
            "do not belong together"
        )
    facts = {"latents": space.latents, "latent_channels": space.channels, "spatial_compression": space.spatial_compression}
    if space.is_causal:
        facts["temporal_compression"] = space.temporal_compression
    for name, theirs in facts.items():
        if (ours := getattr(config, name)) != theirs:
            raise UserError(f"the model expects {name} {ours}, the latents' network has {theirs}: they do not belong together")
