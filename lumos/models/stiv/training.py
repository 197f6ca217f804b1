"""The training task of STIV: the network learns the velocity from noise to latents (flow matching, reference sections 4 to 6).

For each clip a pattern says which frames are given. They enter the network as they are and have no loss; the others are
mixed with noise. Text and given frames are left out at random, for guidance. All draws of a clip come from the
clip's own generators, so losses do not depend on micro-batches or on the number of processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lumos.data.curriculum import Curriculum, StepShape
from lumos.data.shards.remote import is_url
from lumos.data.source import TrainingClip
from lumos.errors import RunError, UserError
from lumos.models.stiv import scoring
from lumos.models.stiv.attention import SAVED, StivRMSNorm
from lumos.models.stiv.block import StivMLP
from lumos.models.stiv.configuration import PATTERNS, StivConfig
from lumos.models.stiv.draws import drawn_clip
from lumos.models.stiv.flops import clip_flops
from lumos.models.stiv.initialization import initialized
from lumos.models.stiv.latents import AUTOENCODER, LatentSpace, load_autoencoder, load_network, measure_statistics
from lumos.models.stiv.loading import check_keys, read_config, read_shapes, weight_files
from lumos.models.stiv.losses import TIME_BINS, alike, inputs_by_size, places_of, weighted_losses
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.pipeline import TEXT_ENCODER, StivPipeline
from lumos.models.stiv.planned_config import check_clips, grid_of, model_config, trained_patterns, with_clips
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.stored_text import StoredTextStates
from lumos.models.stiv.text_encoder import FrozenTextEncoder, TextIds, text_ids
from lumos.models.stiv.training_settings import StivTrainingSettings
from lumos.pipeline.acceleration import compile_parts
from lumos.pipeline.defaults import ClipDefaults
from lumos.runtime import check_memory, no_progress_bar
from lumos.settings import to_plain
from lumos.training import checkpoint
from lumos.training.export import Tokenizers
from lumos.training.settings import world_size
from lumos.training.task import Batch, Forward
from lumos.training.video_task import VideoTask, model_with
from lumos.video.frames import crop_offset
from tokenizer.fingerprint import network_fingerprint
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer

DRAWS = ("flow", "patterns", "strides", "dropout", "given_noise", "mask_ratio", "masked_loss_weight")
"""Settings that decide the losses, beside the config, the data and the optimization."""
NOT_OF_WEIGHTS = ("patterns", "max_prompt_tokens", "micro_stride")
"""Fields of StivConfig in which two models may differ and still be mixed."""


@dataclass(frozen=True)
class UnencodedClips:
    """A batch whose clips and prompts are not encoded yet. Any process can make it.

    clips   for each clip uint8 frames [T, H, W, 3]; or int64 codes [T, h, w], if the source holds codes
    text    ids of the prompts
    batch   the batch, whose rows still lack the latents
    """

    clips: list[Tensor]
    text: TextIds
    batch: Batch


class StivTask(VideoTask):
    """Training of `StivForVideoGeneration` by flow matching. Clips are encoded on `device`."""

    settings: StivTrainingSettings
    score_groups = scoring.GROUPS
    model_class, config_class, not_of_weights = StivForVideoGeneration, StivConfig, NOT_OF_WEIGHTS
    refused_untrained = PATTERNS
    read_config = staticmethod(read_config)

    def __init__(self, settings: StivTrainingSettings, device: torch.device):
        self.config = model_config(settings)
        check_clips(self.config, settings)
        self.per_frame_codes = not self.config.latents_are_causal
        super().__init__(settings, device)
        self.space = LatentSpace(self.video_tokenizer, self.config.latents)
        self._check_network()
        self.text = self._read_text()
        self._check_memory(settings.data.num_frames, settings.data.height, settings.data.width)
        self.source = self.make_source()
        shape = self.sample_shape
        self.config = with_clips(self.config, settings, shape.num_frames, shape.height, shape.width)
        self.config = StivConfig(**self.config.to_dict() | self._statistics())
        self.space = self.space.normalised(self.config.latent_mean, self.config.latent_std)
        self.states = self._text_states()
        self.origin: dict[str, Any] | None = None
        self.kept_latents: dict[tuple[str, int], Tensor] = {}
        self.pattern_names = [name for name in PATTERNS if name in trained_patterns(settings)]
        self.loss_groups = {"time": TIME_BINS, "pattern": len(self.pattern_names)}
        self._text_ids(settings.samples.prompts)

    @property
    def size_unit(self) -> int:
        return self.config.spatial_compression * self.config.patch_size

    @property
    def compression(self) -> tuple[int, int]:
        return self.space.temporal_compression if self.space.is_causal else 1, self.space.spatial_compression

    @property
    def base_folders(self) -> list[str]:
        init = self.settings.init
        return [folder for folder in (self.settings.model.from_, init.image, init.temporal) if folder is not None]

    @staticmethod
    def part_of(folder: str, kind: str) -> Path:
        names = ("autoencoder", "video_tokenizer") if kind == "video" else (TEXT_ENCODER, "text_tokenizer")
        places = [Path(folder) / name for name in names]
        return next((place for place in places if place.is_dir()), VideoTask.part_of(folder, kind))

    @staticmethod
    def fingerprint_of(folder: str, kind: str) -> str:
        if kind == "video":
            return network_fingerprint(load_network(folder))
        place = StivTask.part_of(folder, kind)  # of a whole model folder
        place = place if place.is_dir() else Path(folder)
        if (place / "config.json").is_file():  # a frozen encoder, with its tokenizer
            return network_fingerprint(FrozenTextEncoder.from_pretrained(place).model)
        return VideoTask.fingerprint_of(str(place), kind)

    @staticmethod
    def score_settings(config: StivConfig) -> dict[str, Any]:
        return {"patterns": {"none" if "none" in config.patterns else config.patterns[0]: 1.0}}

    def read_network(self, folder: str) -> nn.Module:
        return load_autoencoder(Path(folder)) if self.config.latents == AUTOENCODER else VideoTokenizer.from_pretrained(folder)

    def build_model(self) -> nn.Module:
        """Return the model in float32, with weights of model.from or init.image, or random ones drawn with training.seed.

        With lora.rank the weights of the folder are frozen, and the adapters are drawn with training.seed. The model
        is on the CPU, or on the device of the training with training.compile.
        """
        settings, config = self.settings, self.config
        self.warn_of_lost_patterns()
        torch.manual_seed(settings.training.seed)
        if settings.init.image is not None:
            model, self.origin = initialized(config, settings.init.image, settings.init.temporal)
        elif settings.model.from_ is not None:
            model = StivForVideoGeneration.from_pretrained(settings.model.from_, config=config, dtype=torch.float32)
        else:
            model = StivForVideoGeneration(config)
        self.with_adapters(model)
        if settings.training.activation_checkpointing:
            model.gradient_checkpointing_enable({"context_fn": SAVED[settings.saved_outputs]})
        if settings.training.compile:
            compile_parts(model.to(self.device), (StivMLP, StivRMSNorm))
        return model.train()

    def muon_matrices(self, model: nn.Module) -> dict[str, float]:
        """Return the matrices of attention and MLPs in the blocks of transformer and text encoder."""
        linear = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return {name: 1.0 for name, weight in linear.items() if "blocks." in name and weight.requires_grad}

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> UnencodedClips:
        """Return the clips at `positions` of a step with all that is drawn for them, but without their latents.

        `dropout` False keeps the text and the given frames of every clip, and all places.
        """
        clips = [shortened(clip, shape.first_frames, self.config) for clip in self.source.clips(step, shape, positions)]
        drawn = [drawn_clip(self.settings, self.config, step, position, self._latent_size(clip), dropout)
                 for position, clip in zip(positions, clips, strict=True)]  # fmt: skip
        text = self._text_ids(["" if draws.no_text else self._caption(clip) for draws, clip in zip(drawn, clips, strict=True)])
        sizes, supervised = [draws.noise.shape for draws in drawn], [int((~draws.given).sum()) for draws in drawn]
        tokens = [int(n) for n in text.mask.sum(1)]
        tensors = {
            "times": torch.tensor([draws.time for draws in drawn]),
            "levels": torch.tensor([draws.level for draws in drawn]),
            "patterns": torch.tensor([self.pattern_names.index(draws.pattern) for draws in drawn]),
            "counts": torch.ones(len(drawn), dtype=torch.bool),
            **self._micro(sizes, clips, [draws.stride for draws in drawn]),
        }
        rows = {"noise": [draws.noise for draws in drawn], "given": [draws.given for draws in drawn],
                "keep": [draws.keep for draws in drawn]}  # fmt: skip
        ratio = self.settings.mask_ratio if dropout else 0.0
        batch = Batch(
            step, shape.kind, tensors, [clip.name for clip in clips],
            lengths=[self._places(size) * size[0] // self.config.temporal_patch_size + m
                     for size, m in zip(sizes, tokens, strict=True)],
            # The backward pass counts twice.
            flops=3.0 * sum(clip_flops(self.config, size, m, ratio) for size, m in zip(sizes, tokens, strict=True)),
            supervised=sum(supervised), rows=rows, padded=(), idle={"counts": False},
        )  # fmt: skip
        return UnencodedClips([pixels_or_codes(clip) for clip in clips], text, batch)

    def encode(self, prepared: UnencodedClips) -> Batch:
        """Return the batch with its latents, and with the states of a frozen text encoder, on the device of the training."""
        batch, device = prepared.batch, self.device
        latents: list[Tensor] = [torch.empty(0)] * len(prepared.clips)
        for at in alike([(clip.shape, clip.dtype) for clip in prepared.clips]):
            clips, names = [prepared.clips[i] for i in at], [batch.names[i] for i in at]
            encoded = self._of_pixels(clips, names) if clips[0].dtype == torch.uint8 else self._of_codes(clips, names)
            for i, clip in zip(at, encoded, strict=True):
                latents[i] = clip
        rows = {name: [x if x is None else x.to(device, non_blocking=True) for x in of_clips]
                for name, of_clips in batch.rows.items()}  # fmt: skip
        ids, mask = prepared.text.ids.to(device), prepared.text.mask.to(device)
        if self.states is not None:
            states = self.states.encode(ids, mask)
            text = {"text_states": states.states.float(), "text_mask": mask, "pooled": states.pooled.float()}
        else:
            text = {"text_ids": ids, "text_mask": mask}
        return replace(batch, tensors={name: x.to(device) for name, x in batch.tensors.items()} | text,
                       rows=rows | {"latents": latents})  # fmt: skip

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses [N] of the supervised latent frames, with gradient, and their places [N] by group.

        The place in the group time is the tenth of the clip's time, in pattern the clip's pattern of given frames in the
        order of `pattern_names`. Clips of different sizes go through the network one size after the other.
        """
        losses, places = [], defaultdict(list)
        for inputs in inputs_by_size(micro):
            found = weighted_losses(inputs.velocity(model), inputs, self.config, self.settings)
            losses.append(found[inputs.supervised])
            for group, place in places_of(inputs, micro).items():
                places[group].append(place)
        return torch.cat(losses), {group: torch.cat(parts) for group, parts in places.items()}

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward:
        return scoring.forward(self.config, self.settings, model, micro)

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor:
        return torch.arange(stream.shape[1], device=stream.device)[:, None].expand(stream.shape[:-1])

    def _latent_size(self, clip: TrainingClip) -> tuple[int, int, int]:
        """Return the latent frames, rows and columns of a clip."""
        if clip.codes is not None:
            return tuple(clip.codes.shape)
        frames, height, width = clip.frames.shape[:3]
        unit = self.config.spatial_compression
        return self.config.latent_frames(frames), height // unit, width // unit

    def _micro(self, sizes: list[torch.Size], clips: list[TrainingClip], strides: list[int]) -> dict[str, Tensor]:
        """Return the micro conditions of clips, the fields of `Micro`, for their latents' sizes and their drawn strides.

        A clip whose source does not tell its original size and stride has those of a generated clip.
        """
        config, unit = self.config, self.config.spatial_compression
        frames = [config.pixel_frames(size[0]) for size in sizes]
        shapes = [(h * unit, w * unit) for *_, h, w in sizes]
        originals = [clip.original_size or shape for clip, shape in zip(clips, shapes, strict=True)]
        own = [config.micro_stride if clip.stride is None else clip.stride for clip in clips]
        return {
            "original_size": torch.tensor(originals, dtype=torch.float32),
            "crop": torch.tensor([crop_offset(*sizes) for sizes in zip(originals, shapes, strict=True)], dtype=torch.float32),
            "stride": torch.tensor([float(of * s if n > 1 else 1) for n, of, s in zip(frames, own, strides, strict=True)]),
            "num_frames": torch.tensor(frames, dtype=torch.float32),
        }

    def _places(self, size: torch.Size) -> int:
        return size[-2] * size[-1] // self.config.patch_size**2

    def _of_pixels(self, clips: list[Tensor], names: list[str]) -> list[Tensor] | Tensor:
        """Return the latents of clips of one size, some of them from earlier steps with latents.kept_clips.

        Clips to be kept are encoded one by one: the last bit can depend on the clips beside, which differ after a resume.
        """
        limit, kept = self.settings.latents.kept_clips, self.kept_latents
        if not limit:
            return self.space.encode(torch.stack(clips).to(self.device, non_blocking=True))
        latents = []
        for clip, name in zip(clips, names, strict=True):
            key = (name, len(clip))
            found = kept[key] if key in kept else self.space.encode(clip[None].to(self.device, non_blocking=True))[0]
            if len(kept) < limit:
                kept[key] = found
            latents.append(found)
        return latents

    def _of_codes(self, clips: list[Tensor], names: list[str]) -> Tensor:
        codes = torch.stack(clips).to(self.device, non_blocking=True)
        highest = codes.flatten(1).max(1).values
        for name, code in zip(names, highest.tolist(), strict=True):
            if code >= self.video_tokenizer.num_codes:
                raise RunError(
                    f"{name} has the code {code}; allowed: 0 to {self.video_tokenizer.num_codes - 1}; ingest it again with this "
                    "tokenizer"
                )
        return self.space.from_codes(codes)

    def _caption(self, clip: TrainingClip) -> str:
        """Return the caption of a clip, or the beginning of it that the text encoder reads."""
        return self._fitted(clip.caption, clip.name)

    def _fitted(self, caption: str, name: str) -> str:
        if isinstance(self.text, FrozenTextEncoder):
            count, limit = lambda text: len(self.text.tokenizer(text)["input_ids"]), self.text.max_tokens
            return self.fitting(caption, name, count, limit)
        limit = self.config.max_prompt_tokens - 1  # the last one is the end mark
        return self.fitting(caption, name, lambda text: len(self.text.encode(text)), limit)

    def _text_ids(self, prompts: list[str]) -> TextIds:
        if isinstance(self.text, FrozenTextEncoder):
            return self.text.text_ids(prompts)
        return text_ids(self.text, prompts, self.config)

    def export_metadata(self) -> dict[str, Any]:
        return super().export_metadata() | {"init": self.origin}

    def pipeline_of(self, model: nn.Module, settings: StivOptions) -> StivPipeline:
        return StivPipeline(model, self.text, self.space, settings, self.sample_shape)

    def resume_fingerprint(self) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        for name in DRAWS:
            value = to_plain(getattr(self.settings, name))
            drawn |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        return self.config_fields() | drawn | self.lora_fingerprint() | self.data_fingerprint()

    @staticmethod
    def write_folder(
        folder: Path, weights: dict[str, Tensor], metadata: Mapping[str, Any], tokenizers: Tokenizers, dtype: torch.dtype
    ) -> None:
        config = StivConfig(**metadata["config"])
        if config.text_encoder == "small":
            text: TextTokenizer | FrozenTextEncoder = TextTokenizer.from_pretrained(tokenizers.text)
        else:
            text = frozen_text_encoder(tokenizers.text, config).to(dtype)
        space = LatentSpace.from_config(tokenizers.video, config, dtype)
        options, clip = StivOptions(**metadata["generation"]), ClipDefaults(**metadata["clip"], target_size=None)
        model = model_with(StivForVideoGeneration, weights, config, dtype)
        with no_progress_bar():
            StivPipeline(model, text, space, options, clip).save_pretrained(folder)
        check_keys(str(folder), {name: tuple(value.shape) for name, value in weights.items()}, read_shapes(weight_files(folder)))

    def _read_text(self) -> TextTokenizer | FrozenTextEncoder:
        config, folder = self.config, self.places.text
        if config.text_encoder == "small":
            return TextTokenizer.from_pretrained(folder, limit=config.text_vocab_size)
        return frozen_text_encoder(folder, config).to(self.device)

    def _text_states(self) -> FrozenTextEncoder | StoredTextStates | None:
        """Return what encodes texts for the network; None: the network does it."""
        data, encoder = self.settings.data, self.text if isinstance(self.text, FrozenTextEncoder) else None
        if not self.settings.store_text_states:
            return encoder
        if encoder is None or data.source != "shards" or is_url(data.path):
            raise UserError("store_text_states needs text_encoder folder and data.source shards in a local folder; leave it out")
        return StoredTextStates(
            Path(data.path), encoder, lambda caption: encoder.text_ids([self._fitted(caption, "a clip")]).ids[0].tolist()
        )

    def _check_network(self) -> None:
        """Raise UserError if the network of the latents has other sizes than the model."""
        compression = {"temporal_compression": self.space.temporal_compression} if self.space.is_causal else {}
        found = {"latent_channels": self.space.channels, "spatial_compression": self.space.spatial_compression, **compression}
        for name, value in found.items():
            if value != getattr(self.config, name):
                raise UserError(
                    f"tokenizer.video {self.places.video} has {name} {value}, the model {getattr(self.config, name)}; set "
                    f"model.overrides.{name}={value}, or take another tokenizer"
                )

    def _statistics(self) -> dict[str, list[float]]:
        """Return the mean and the standard deviation of each channel of the latents, as fields of the config.

        They are those of the settings, of the model that the weights come from, or of the run's newest checkpoint. Otherwise
        they are measured on the first clips of the run, in each process alike.
        """
        config, root = self.config, self.settings.output_dir / "checkpoints"
        if config.latent_mean is not None or self.base_folders:
            return {"latent_mean": config.latent_mean, "latent_std": config.latent_std}
        for folder in reversed(checkpoint.list_checkpoints(root)):
            with suppress(UserError, RunError, OSError, KeyError, TypeError):
                stored = checkpoint.read_state(folder)["task"]["config"]
                StivConfig(**self.config.to_dict() | (found := {name: stored[name] for name in ("latent_mean", "latent_std")}))
                return found
        mean, std = measure_statistics(self._first_latents(self.settings.latents.statistics_clips))
        return {"latent_mean": [round(x, 4) for x in mean], "latent_std": [max(round(x, 4), 1e-4) for x in std]}

    def _first_latents(self, count: int) -> Any:
        """Yield the latents [1, T, C, h, w], not normalised, of the first clips of the run."""
        training = self.settings.training
        curriculum, step = Curriculum(self.settings.data.stages, training.batch_size, training.tokens_per_batch), 0
        while count > 0:
            shape = curriculum(step)
            clips = self.source.clips(step, shape, range(min(count, self.source.clips_in(shape))))
            for clip in clips:
                made = pixels_or_codes(clip)[None].to(self.device)
                yield self.space.encode(made) if made.dtype == torch.uint8 else self._of_codes([made[0]], [clip.name])
            count, step = count - len(clips), step + 1

    def _check_memory(self, num_frames: int, height: int, width: int) -> None:
        """Raise UserError for a batch or model that this machine certainly cannot hold, before either is made."""
        settings, config = self.settings, self.config
        check_memory(4 * config.num_parameters, f"a model of {config.num_parameters:,} weights in float32")
        if settings.data.source != "worlds":
            return
        grid_of(config, num_frames, height, width)
        latent = 8 * config.latent_channels * height * width // config.spatial_compression**2  # noise and latents of a frame
        clips = max([settings.training.batch_size or 0, *(stage.batch_size or 0 for stage in settings.data.stages)])
        pictures = max([stage.image_batch_size or 0 for stage in settings.data.stages], default=0)
        largest = max(clips * num_frames, pictures) * (3 * height * width + latent)
        check_memory(largest // world_size(), "a process's share of the clips of a step")


def shortened(clip: TrainingClip, first_frames: int | None, config: StivConfig) -> TrainingClip:
    """Return a clip of the first frames alone; None: the whole clip. It is a clip of its own: its text says nothing of the rest."""
    if first_frames is None:
        return clip
    if clip.codes is None:
        return replace(clip, frames=clip.frames[:first_frames])
    return replace(clip, codes=clip.codes[: config.latent_frames(first_frames)])


def pixels_or_codes(clip: TrainingClip) -> Tensor:
    """Return the frames of a clip, uint8 [T, H, W, 3], or its codes, int64 [t, h, w]."""
    return torch.from_numpy(clip.frames if clip.codes is None else clip.codes.astype(np.int64))


def frozen_text_encoder(folder: str | Path, config: StivConfig) -> FrozenTextEncoder:
    return FrozenTextEncoder.from_pretrained(folder, width=config.text_width, max_tokens=config.max_prompt_tokens)
