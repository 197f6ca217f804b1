"""The training of a network of diffusers on a folder of latents and text states, on the loop of every training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lumos.compression.diffusers_calls import NetworkCalls
from lumos.compression.diffusers_folder import check_diffusers, on_meta, read_config
from lumos.compression.diffusers_models import SUPPORTED, load, model_class_of
from lumos.compression.distillable import in_order
from lumos.compression.features import tapped_first
from lumos.compression.latent_folder import CONDITION, INPUT, LATENTS, TEXT, LatentClip, LatentFolder, groups_of
from lumos.compression.latent_settings import LatentDistillationSettings
from lumos.compression.noising import OF_CLASS, SCHEDULED, NoiseLevel, Objective, read_schedule, with_noise
from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, sample_generator
from lumos.files import replacing_folder, write_json
from lumos.training import checkpoint
from lumos.training.export import DTYPES
from lumos.training.task import Batch, TrainingTask

CLIPS, NOISE, LEVELS, COUNTS = "clips", "noise", "levels", "counts"
"""Entries of a micro-batch: tensors of clips, noise [C, T, h, w], the `NoiseLevel` of each [B, 3], and which clips count."""


class Unencoded(NamedTuple):
    """The clips of a step with their noise and levels, on the CPU."""

    step: int
    names: list[str]
    clips: list[LatentClip]
    noise: list[Tensor]
    levels: list[NoiseLevel]


@dataclass(frozen=True)
class ClipGroup:
    """Clips of a micro-batch whose tensors have equal shapes, as a network reads them.

    at            their indices in the micro-batch
    clean, noise  [B, C, T, h, w]
    noisy         their mixture at `level`
    """

    at: list[int]
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    level: NoiseLevel
    tensors: LatentClip
    inputs: dict[str, Tensor | float]

    def predicted(self, model: nn.Module, calls: NetworkCalls, noisy: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Return what a network predicts from the noisy clips, or from others, [B, C, T, h, w]."""
        noisy, time = (self.noisy, self.level.time) if noisy is None else (noisy, time)
        dtype = next(model.parameters()).dtype
        x = torch.cat([noisy, self.tensors[CONDITION]], dim=1) if CONDITION in self.tensors else noisy
        arguments = calls.arguments(x.to(dtype), time, self.tensors[TEXT].to(dtype), self.inputs)
        return calls.as_clips(model(**arguments, return_dict=False)[0], noisy.shape)


class LatentTask(TrainingTask):
    """Train a network of diffusers on the mean squared error of its prediction; a loss a clip."""

    def __init__(self, settings: LatentDistillationSettings, device: torch.device):
        check_diffusers()
        self.settings, self.device, self.loss_groups = settings, device, {}
        self.folder = Path(settings.model.from_)
        self.config = read_config(self.folder, SUPPORTED)
        self.calls = NetworkCalls.of(self.config)
        self.source = LatentFolder(settings.data.path, settings.training.seed)
        self.held_out = LatentFolder(settings.data.validation_path, VALIDATION_SEED) if settings.data.validation_path else None
        self.model_class = model_class_of(self.config)
        for source in filter(None, (self.source, self.held_out)):
            shapes = source.shapes
            channels = shapes[LATENTS][0] + (shapes[CONDITION][0] if CONDITION in shapes else 0)
            given = [name.removeprefix(INPUT) for name in shapes if name.startswith(INPUT)]
            self.calls.check(self.model_class, shapes[LATENTS][0], channels, [*given, *source.inputs])
        self.objective = self._objective()
        self.counted: dict[tuple, float] = {}  # FLOPs

    def _objective(self) -> Objective:
        noise = self.settings.noise
        kind = noise.objective or OF_CLASS[self.calls.name]
        if kind in SCHEDULED:
            return Objective(kind, kept=read_schedule(noise.scheduler or Path(self.settings.distill.teacher).parent / "scheduler"))
        usual = (0.7, 1.6) if kind == "edm" else (0.0, 1.0)
        mean, std = (own if found is None else found for found, own in zip((noise.mean, noise.std), usual, strict=True))
        return Objective(kind, noise.shift, mean, std)

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.training.seed)
        model = load(self.folder, torch_dtype=torch.float32)
        if self.settings.training.activation_checkpointing:
            model.enable_gradient_checkpointing()
        return model.train()

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Unencoded:
        validation = step == VALIDATION_STEP
        source = self.held_out if validation else self.source
        seed = VALIDATION_SEED if validation else self.settings.training.seed
        names, clips, noise, levels = [], [], [], []
        for position in positions:
            index = position % len(source.names) if validation else source.at(step * shape.batch_size + position)
            clip = source.read(index)
            names.append(source.names[index])
            clips.append(clip)
            draws = [sample_generator(seed, step, position, f"latents {what}") for what in ("noise", "level")]
            noise.append(torch.randn(clip[LATENTS].shape, generator=draws[0]))
            levels.append(self.objective.drawn(draws[1]))
        return Unencoded(step, names, clips, noise, levels)

    def encode(self, prepared: Unencoded) -> Batch:
        count = len(prepared.names)
        levels = torch.stack([torch.stack([part.float() for part in level]) for level in prepared.levels])
        clips = [{name: tensor.to(self.device) for name, tensor in clip.items()} for clip in prepared.clips]
        return Batch(
            prepared.step, "video",
            {LEVELS: levels.to(self.device), COUNTS: torch.ones(count, dtype=torch.bool, device=self.device)},
            prepared.names, [clip[LATENTS][0].numel() for clip in clips],
            3.0 * sum(self.flops(self.config, clip) for clip in prepared.clips), count,
            rows={CLIPS: clips, NOISE: [noise.to(self.device) for noise in prepared.noise]}, padded=(), idle={COUNTS: False},
        )  # fmt: skip

    def flops(self, config: Mapping[str, Any], clip: LatentClip, blocks: Sequence[str] = ()) -> float:
        """Return the FLOPs of the forward pass of a clip, counted on a network without values.

        config: that of the student or of its teacher. blocks: names of modules; the pass ends behind the last one.
        """
        key = (tuple(clip[LATENTS].shape), config is self.config, len(blocks))
        if key not in self.counted:
            meta = torch.device("meta")
            group = self._group([0], [clip], [clip[LATENTS]], torch.zeros(1, 3))
            model = on_meta(model_class_of(config), config).to(meta)
            modules = {name: model.get_submodule(name) for name in blocks}
            moved = ClipGroup(
                [0], group.clean.to(meta), group.noise.to(meta), group.noisy.to(meta),
                NoiseLevel(*(x.to(meta) for x in group.level)),
                {name: tensor.to(meta) for name, tensor in group.tensors.items()},
                {name: x.to(meta) if isinstance(x, Tensor) else x for name, x in group.inputs.items()},
            )  # fmt: skip
            ending = tapped_first(modules) if modules else nullcontext()
            with FlopCounterMode(display=False) as counted, torch.no_grad(), meta, ending:
                moved.predicted(model, NetworkCalls.of(config))
            self.counted[key] = float(counted.get_total_flops())
        return self.counted[key]

    def groups(self, micro: dict[str, Any]) -> list[ClipGroup]:
        """Return the clips of a micro-batch in groups of equal shapes."""
        return [
            self._group(at, [micro[CLIPS][i] for i in at], [micro[NOISE][i] for i in at], micro[LEVELS][at])
            for at in groups_of(micro[CLIPS])
        ]

    def _group(self, at: list[int], clips: list[LatentClip], noise: list[Tensor], levels: Tensor) -> ClipGroup:
        tensors = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
        tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
        level, noise = NoiseLevel(*levels.unbind(1)), torch.stack(noise).float()
        inputs = {name.removeprefix(INPUT): x for name, x in tensors.items() if name.startswith(INPUT)}
        clean = tensors[LATENTS]
        return ClipGroup(at, clean, noise, with_noise(clean, noise, level), level, tensors, {**self.source.inputs, **inputs})

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = [(group.at, self.errors(group.predicted(model, self.calls), group)) for group in self.groups(micro)]
        return in_order(parts)[micro[COUNTS]], {}

    def errors(self, prediction: Tensor, group: ClipGroup) -> Tensor:
        """Return the mean squared error of the prediction of each clip, float32 [B]."""
        return squared(prediction, self.objective.target(group.clean, group.noise, group.level))

    def resume_fingerprint(self) -> dict[str, Any]:
        settings = self.settings.to_dict()
        wanted = ("batch_size", "seed", "lr", "min_lr", "warmup_steps", "schedule", "decay_steps", "weight_decay",
                  "betas", "eps", "clip_grad", "ema_decay", "precision", "optimizer", "decay_parameters")  # fmt: skip
        found = {f"training.{key}": settings["training"][key] for key in wanted}
        found |= {f"noise.{key}": value for key, value in settings["noise"].items() if key != "scheduler"}
        return {**found, "model.config": dict(self.config), "data (sha256)": self.source.sha256()}

    def export_metadata(self) -> dict[str, Any]:
        return {"folder": str(self.folder)}

    def export(self, folder: Path, target: Path) -> None:
        """Write a folder that `from_pretrained` of the student's class loads, with the records of the checkpoint."""
        state, stored = checkpoint.read_state(folder), checkpoint.Stored(folder)
        model = load(self.folder, torch_dtype=DTYPES[self.settings.training.export_dtype])
        kind = checkpoint.AVERAGE if state["averaged"] else checkpoint.WEIGHT
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.read(kind, name, 0, parameter.numel()).view_as(parameter))
        with replacing_folder(target) as writing:
            model.save_pretrained(writing)
            for name, record in state["task"].get("records", {}).items():
                write_json(writing / name, record)


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each clip [B, ...], float32 [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)

