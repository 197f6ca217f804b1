"""The training task of Lumos-1: the decoder predicts masked codes (AR-DF, reference section 5).

A code is the index that the video tokenizer gives to a patch of a clip. AR-DF (autoregressive
discrete diffusion forcing) masks a random share of the codes of each latent frame. The training
loop calls the methods that `TrainingTask` declares.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, sample_generator
from lumos.data.source import TrainingClip, cut
from lumos.errors import RunError, UserError, as_text, instead, reason_of, shown
from lumos.models.lumos1 import scoring
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.conversion import check_written, read_config
from lumos.models.lumos1.flops import adapter_weights, training_flops
from lumos.models.lumos1.modeling import COMPILED, LumosForVideoGeneration, LumosOutput
from lumos.models.lumos1.patterns import check_long_enough, trained_patterns
from lumos.models.lumos1.pipeline import LumosPipeline
from lumos.models.lumos1.request import check_text_tokenizer, prompt_ids
from lumos.models.lumos1.rows import ClipSize, SequenceRow, UnencodedSequences, drawn_row, in_sequence, stored_codes
from lumos.models.lumos1.scoring import RATIO_BINS, ratio_bins
from lumos.models.lumos1.sequence import (
    Frame,
    code_mask,
    last_token,
    num_latent_frames,
    pad_sequences,
    parse_layout,
    prompt_text,
)
from lumos.models.lumos1.settings import GenerationSettings
from lumos.models.lumos1.training_settings import LumosDropoutSettings, LumosTrainingSettings
from lumos.pipeline.acceleration import compile_parts
from lumos.pipeline.defaults import ClipDefaults, write_defaults
from lumos.runtime import check_memory, no_progress_bar
from lumos.settings import to_plain
from lumos.training.export import Tokenizers
from lumos.training.sections import DataSettings, ModelSettings
from lumos.training.settings import world_size
from lumos.training.task import IGNORED, Batch, Forward
from lumos.training.video_task import VideoTask, model_with
from lumos.video.frames import from_uint8
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer

SHAPE = (
    "vocab_size", "visual_token_start", "visual_token_count", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Fields of LumosConfig that a model folder and model.preset must have in common."""
ID_TENSORS = 4
"""The least number of int64 tensors with one value per token in a batch: ids, codes, targets, places."""
NOT_OF_WEIGHTS = {
    "attention", "loss_chunk_size", "keys_to_ignore_at_inference", "max_position_embeddings", "max_prompt_tokens",
    "initializer_range", "eos_token_id", "patterns",
}  # fmt: skip
"""Fields of LumosConfig in which two models may differ and still be mixed."""


class ArdfTask(VideoTask):
    """Training of `LumosForVideoGeneration` on masked codes (AR-DF). Clips are encoded on `device`."""

    causal = True
    score_groups = scoring.GROUPS
    refused_untrained = ("ends",)
    model_class, config_class, not_of_weights = LumosForVideoGeneration, LumosConfig, NOT_OF_WEIGHTS
    read_config = staticmethod(read_config)

    def __init__(self, settings: LumosTrainingSettings, device: torch.device):
        self.config = model_config(settings.model)
        if settings.lora.rank is None:  # an adapter leaves the config of its model as it is
            self.config.patterns = trained_patterns(settings.patterns)
        self.needs_last_frame = settings.patterns.get("ends", 0) > 0
        if (settings.training.attention or self.config.attention) == "flex" and device.type != "cuda":
            raise UserError(f"attention flex trains on CUDA only, not on {device.type}; set training.attention=segmented")
        super().__init__(settings, device)
        self.text_tokenizer = TextTokenizer.from_pretrained(self.places.text, limit=self.config.visual_token_start)
        check_text_tokenizer(self.config, self.text_tokenizer)
        self._check_sizes(self.places.video)
        latents = num_latent_frames(settings.data.num_frames, self.config.temporal_compression)
        check_long_enough(settings.patterns, latents, settings.data.num_frames)
        self.loss_groups = {
            "frame": latents,
            "mask_ratio": RATIO_BINS,
        }
        self.source = self.make_source()
        self._check_length()
        self._check_memory()
        for prompt in settings.samples.prompts:
            prompt_ids(prompt, self.sample_shape, self.config, self.text_tokenizer)

    @property
    def size_unit(self) -> int:
        return self.config.pixels_per_size_unit

    @property
    def attention(self) -> str:
        """The attention implementation of the run; the exported model keeps that of its config."""
        return self.settings.training.attention or self.config.attention

    def build_model(self) -> nn.Module:
        """Return the model in float32, with weights of model.from or random weights.

        The seed of random weights is training.seed. With lora.rank the weights of the folder are
        frozen, and the adapters are drawn with training.seed. The model is on the CPU, or on the
        device of the training with training.compile.
        """
        folder, overrides = self.settings.model.from_, self.settings.model.overrides
        config = copy.deepcopy(self.config)
        config.attention = self.attention
        self.warn_of_lost_patterns()
        if folder is not None:
            try:
                model = LumosForVideoGeneration.from_pretrained(folder, config=config, dtype=torch.float32)
            except UserError as error:
                if not overrides:
                    raise
                raise UserError(f"model.overrides {overrides} do not fit the weights of model.from: {error}") from error
        torch.manual_seed(self.settings.training.seed)
        if folder is None:
            model = LumosForVideoGeneration(config)
        self.with_adapters(model)
        if self.settings.training.activation_checkpointing:
            model.model.gradient_checkpointing = True
        if self.settings.training.compile:
            compile_parts(model.to(self.device), COMPILED)
        return model.train()

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> UnencodedSequences:
        """Return the masked sequences of the clips at `positions` of a step, without their codes.

        `dropout` False keeps the text and the given frames of every clip. Raises RunError if a clip of the source has a
        code that the model does not know.
        """
        config, clips = self.config, self.source.clips(step, shape, positions)
        if shape.first_frames is not None:
            clips = [cut(clip, shape.first_frames, config.temporal_compression) for clip in clips]
        rows = [self._row(step, position, clip, dropout) for position, clip in zip(positions, clips, strict=True)]
        ids, supervised_at, ratios, given = zip(*rows, strict=True)
        with_last, last = tuple(number for number, frames in enumerate(given) if frames.has_last), None
        pad_to = self.settings.data.pad_to
        input_ids = pad_sequences(list(ids), config.pad_token_id, pad_to)
        layouts = parse_layout(input_ids, config)
        supervised = [int(row.sum()) for row in supervised_at]
        lora = self.settings.lora
        adapters = adapter_weights(config, lora.rank, lora.targets) if lora.rank else None
        batch = Batch(
            step, shape.kind, {"mask_ratios": pad_sequences(list(ratios), 0)}, [clip.name for clip in clips],
            lengths=[len(row) for row in ids],
            flops=sum(training_flops(config, *row, adapters) for row in zip(layouts, supervised, strict=True)),
            supervised=sum(supervised), rows={"layouts": layouts}, pad_to=pad_to,
        )  # fmt: skip
        if clips[0].codes is None:
            made = torch.from_numpy(np.stack([clip.frames for clip in clips]))
            pictures = [clips[number].frames[-1] if clips[number].last is None else clips[number].last for number in with_last]
            last = torch.from_numpy(np.stack(pictures)[:, None]) if pictures else None
        else:
            codes = [stored_codes(clip, number in with_last) for number, clip in enumerate(clips)]
            made = torch.cat(codes)
            if int(made.max()) >= config.visual_token_count:
                name = next(clip.name for clip, of in zip(clips, codes, strict=True) if of.max() >= config.visual_token_count)
                raise RunError(
                    f"{name} has the code {int(made.max())}; allowed: 0 to {config.visual_token_count - 1}; ingest it again with "
                    "this tokenizer"
                )
        codes_at = code_mask(layouts, input_ids.shape[1])
        supervised_at = pad_sequences(list(supervised_at), False, pad_to)
        return UnencodedSequences(made, input_ids, codes_at, supervised_at, batch, last, with_last)

    def encode(self, prepared: UnencodedSequences) -> Batch:
        """Return the batch with its codes, on the device where clips are encoded."""
        inputs = (prepared.clips, prepared.ids, prepared.codes_at, prepared.supervised_at)
        clips, ids, codes_at, supervised_at = (x.to(self.device, non_blocking=True) for x in inputs)
        codes = self._encode(clips) if clips.dtype == torch.uint8 else clips
        if prepared.last is not None:
            pictures = self._encode(prepared.last.to(self.device, non_blocking=True))[:, 0]
            codes = in_sequence(codes, pictures, prepared.with_last)
        code = torch.zeros_like(ids).masked_scatter(codes_at, codes.flatten())
        tensors = {
            "input_ids": torch.where(codes_at & (ids != self.config.mask_token_id), ids + code, ids),
            "targets": torch.where(supervised_at, code, IGNORED),
            "mask_ratios": prepared.batch.tensors["mask_ratios"].to(self.device),
        }
        return replace(prepared.batch, tensors=tensors)

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses [N] of the supervised positions, with gradient, and their places [N] by group.

        The place in the group frame is the latent frame of a position; clips with one latent frame
        leave the group out. The place in mask_ratio is the bin of the mask ratio of that frame, see
        `ratio_bins`.
        """
        out = model(input_ids=micro["input_ids"], targets=micro["targets"], layouts=micro.get("layouts"))
        return out.position_loss, places_of(out, micro)

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward:
        return scoring.forward(self.config, model, micro)

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor:
        return scoring.stream_frames(self.config, micro, stream)

    def with_and_without_history(self, micro: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return scoring.with_and_without_history(self.config, micro)

    def export_metadata(self) -> dict[str, Any]:
        return super().export_metadata() | {"clip": self.source.usual_shape}

    def pipeline_of(self, model: nn.Module, settings: GenerationSettings) -> LumosPipeline:
        return LumosPipeline(model, self.text_tokenizer, self.video_tokenizer, settings, self.sample_shape)

    def resume_fingerprint(self) -> dict[str, Any]:
        settings, drawn = self.settings, {}
        for name, values in (("masking", settings.masking), ("patterns", settings.patterns), ("dropout", settings.dropout)):
            drawn |= {f"{name}.{key}": value for key, value in to_plain(values).items()}
        return self.config_fields() | self.lora_fingerprint() | drawn | self.data_fingerprint()

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return what runs had before given frames were a choice."""
        usual = {"patterns": ["none"], "patterns.none": 1.0, "dropout.image": LumosDropoutSettings().image}
        return super().fingerprint_defaults() | usual

    @staticmethod
    def write_folder(
        folder: Path, weights: dict[str, Tensor], metadata: Mapping[str, Any], tokenizers: Tokenizers, dtype: torch.dtype
    ) -> None:
        with no_progress_bar():
            model_with(LumosForVideoGeneration, weights, LumosConfig(**metadata["config"]), dtype).save_pretrained(folder)
        check_written(folder, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        VideoTokenizer.from_pretrained(tokenizers.video).to(dtype).save_pretrained(folder / "video_tokenizer")
        TextTokenizer.from_pretrained(tokenizers.text).save_pretrained(folder / "text_tokenizer")
        write_defaults(folder, GenerationSettings(**metadata["generation"]), ClipDefaults(**metadata["clip"], target_size=None))

    def _check_sizes(self, video: str) -> None:
        config = self.config
        if self.video_tokenizer.num_codes != config.visual_token_count:
            raise UserError(
                f"tokenizer.video {video} has {self.video_tokenizer.num_codes} codes, but the model has visual_token_count "
                f"{config.visual_token_count}; set model.overrides.visual_token_count or take another tokenizer"
            )
        for name in ("temporal_compression", "spatial_compression"):
            of_tokenizer, of_model = getattr(self.video_tokenizer, name), getattr(config, name)
            if of_tokenizer != of_model:
                raise UserError(
                    f"tokenizer.video {video} has {name} {of_tokenizer}, the model {of_model}; set model.overrides.{name}"
                )
        check_clip_shape(config, self.settings.data)

    def _check_length(self) -> None:
        """Raise UserError if a usual clip, or the largest of all, is longer than max_position_embeddings.

        The model could train on such a clip, but would refuse to generate one. Raises it too if a given last frame is so late
        that its time has no token.
        """
        shape, config = self.source.usual_shape, self.config
        grid = (shape[side] // config.spatial_compression for side in ("height", "width"))
        latents = num_latent_frames(shape["num_frames"], config.temporal_compression)
        if self.needs_last_frame:
            last_token(latents - 1, config)
        tokens = (latents + self.needs_last_frame) * Frame(0, *grid).end
        if tokens > config.max_position_embeddings:
            size = f"{shape['num_frames']} frames of {shape['width']}x{shape['height']} pixels"
            raise UserError(
                f"clips of {size} need {tokens} tokens beside their text, but the model has max_position_embeddings "
                f"{config.max_position_embeddings}; take smaller or shorter clips, or raise model.overrides.max_position_embeddings"
            )
        if (codes := max(self.source.most_codes.values())) > config.max_position_embeddings:
            raise UserError(
                f"the largest clip has {codes:,} codes, but the model has max_position_embeddings "
                f"{config.max_position_embeddings}; leave out the large clips, "
                "lower data.num_frames, or raise model.overrides.max_position_embeddings"
            )

    def _check_memory(self) -> None:
        """Raise UserError for a batch or model that this machine certainly cannot hold, before either is made."""
        training, shape, config = self.settings.training, self.source.usual_shape, self.config
        drawn = 3 * shape["height"] * shape["width"] if self.settings.data.source == "worlds" else 0  # bytes of a frame
        codes = shape["height"] * shape["width"] // config.spatial_compression**2
        latents = num_latent_frames(shape["num_frames"], config.temporal_compression) + self.needs_last_frame
        clip, picture = (
            frames * drawn + ID_TENSORS * 8 * max(t * codes, self.settings.data.pad_to)
            for frames, t in ((shape["num_frames"], latents), (1, 1))
        )
        stages = self.settings.data.stages
        clips = max([training.batch_size or 0, *(stage.batch_size or 0 for stage in stages)])
        pictures = max([stage.image_batch_size or 0 for stage in stages], default=0)
        largest = max(clips * clip, pictures * picture, ID_TENSORS * 8 * (training.tokens_per_batch or 0))
        check_memory(largest // world_size(), "a process's share of the clips of a step")
        lora = self.settings.lora
        weights = config.num_parameters + (adapter_weights(config, lora.rank, lora.targets) if lora.rank else 0)
        check_memory(4 * weights, f"a model of {weights:,} weights in float32")

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """Return the codes [B, t, h, w] of frames uint8 [B, T, H, W, 3]."""
        return self.video_tokenizer.encode(from_uint8(frames))

    def _row(self, step: int, position: int, clip: TrainingClip, dropout: bool) -> SequenceRow:
        """Return the masked sequence of a clip, see `drawn_row`."""
        config, size = self.config, ClipSize.of(clip, self.config)
        seed = VALIDATION_SEED if step == VALIDATION_STEP else self.settings.training.seed
        drop = torch.rand((), generator=sample_generator(seed, step, position, "text")) < self.settings.masking.text_dropout
        text_ids = None
        if not (dropout and drop):
            shape = {"height": size.rows * config.spatial_compression, "width": size.cols * config.spatial_compression}

            def ids_of(caption: str) -> list[int]:
                return self.text_tokenizer.encode(
                    prompt_text(config, caption, num_frames=size.num_frames, fps=clip.fps, **shape)
                )

            text_ids = ids_of(
                self.fitting(clip.caption, clip.name, lambda caption: len(ids_of(caption)), config.max_prompt_tokens)
            )
        return drawn_row(self.settings, config, step, position, size, clip.fps, text_ids, dropout)


def places_of(out: LumosOutput, micro: dict[str, Any]) -> dict[str, Tensor]:
    """Return the places [N] by group of the losses of an output, see `ArdfTask.losses`."""
    ratios = micro["mask_ratios"]
    places = {"mask_ratio": ratio_bins(ratios[out.row_index, out.frame_index])}
    return places | ({"frame": out.frame_index} if ratios.shape[1] > 1 else {})


def model_config(model: ModelSettings) -> LumosConfig:
    """Return the config of the model that the settings name.

    Raises UserError if the settings are not valid, or if the model folder and the preset differ in
    shape.
    """
    _reject_unknown(model.overrides)
    try:
        preset = model.preset and LumosConfig.preset(model.preset, **model.overrides)
        if model.from_ is None:
            return preset
        if not (Path(model.from_) / "config.json").is_file():
            raise UserError(f"model.from: {model.from_} is no model folder: it has no config.json")
        stored = read_config(Path(model.from_))
        config = LumosConfig.from_pretrained(model.from_, **model.overrides)
        LumosConfig(**config.to_dict())  # from_pretrained applies overrides without this check
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    except Exception as error:  # transformers raises many types of error for a bad value
        raise UserError(f"model.overrides: {shown(model.overrides)} cannot be used ({reason_of(error)})") from error
    for name in SHAPE if preset else ():
        found, wanted = getattr(stored, name), getattr(preset, name)
        if found != wanted:
            raise UserError(
                f"model.from: {model.from_} has {name} {found}, but model.preset {model.preset} has {wanted}; name a folder of "
                "that shape, or leave model.preset out (model.preset=null)"
            )
    return config


def check_clip_shape(config: LumosConfig, data: DataSettings) -> None:
    """Raise UserError for frame numbers or sizes of clips that the model does not support."""
    if (data.num_frames - 1) % config.temporal_compression:
        raise UserError(f"data.num_frames is {data.num_frames}; it must be 1 + a multiple of {config.temporal_compression}")
    for i, stage in enumerate(data.stages):
        if stage.first_frames is not None and (stage.first_frames - 1) % config.temporal_compression:
            raise UserError(
                f"data.stages[{i}].first_frames is {stage.first_frames}; it must be 1 + a multiple of {config.temporal_compression}"
            )
    for name in ("height", "width"):
        if data.source == "worlds" and getattr(data, name) % config.pixels_per_size_unit:
            raise UserError(f"data.{name} is {getattr(data, name)}; it must be a multiple of {config.pixels_per_size_unit}")


def _reject_unknown(overrides: dict[str, Any]) -> None:
    """Raise UserError for an unknown field.

    The configs of transformers accept any keyword, so a misspelled field would have no effect.
    """
    if "patterns" in overrides:
        raise UserError("model.overrides.patterns has no effect; leave it out: the setting patterns says what is trained")
    known = set(LumosConfig().to_dict())
    for key in overrides:
        if key not in known:
            raise UserError(f"model.overrides.{as_text(key)} is unknown{instead(key, sorted(known))}")
