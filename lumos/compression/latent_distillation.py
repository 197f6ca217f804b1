"""Recovery of a pruned model of diffusers on a folder of latents: what distillation asks of networks of diffusers.

The one-step result is the clean clip that follows from a prediction. To judge it, it is mixed with new noise, and the frozen
teacher reads the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumos.compression.critic import critic_taps, time_of_noise
from lumos.compression.diffusers_calls import NetworkCalls
from lumos.compression.diffusers_folder import CONFIG, read_config, weight_files
from lumos.compression.diffusers_models import SUPPORTED, load
from lumos.compression.distillable import LEVEL, Distillable, Draws, Features, ForwardPass, Judged, Losses, bare, in_order
from lumos.compression.distillation import DistillationTask
from lumos.compression.features import tapped, tapped_first
from lumos.compression.latent_folder import TEXT
from lumos.compression.latent_settings import LatentDistillationSettings
from lumos.compression.latent_task import COUNTS, NOISE, ClipGroup, LatentTask, Unencoded, squared
from lumos.compression.noising import MEAN, STD, with_noise
from lumos.compression.record import read_record
from lumos.compression.recovery import taps as taps_of
from lumos.data.seeding import sample_generator
from lumos.errors import UserError, shown
from lumos.files import folder_sha256
from lumos.runtime import parameter_count
from lumos.training.loop import train

NEW_NOISE = "critic_noise"
"""Name of the rows of a batch with new noise [C, T, h, w] for the critic."""


def distill_latents(settings: LatentDistillationSettings) -> dict[str, Any]:
    """Train a pruned model of diffusers with its teacher; returns the summary of `lumos.training.loop.train`."""
    return train(settings, make_latent_task)


def make_latent_task(settings: LatentDistillationSettings, device: torch.device) -> DistillationTask:
    """Return the task of a run."""
    inner = LatentTask(settings, device)
    asked = settings.distill
    raw = inner.calls.is_unet if asked.icd_raw is None else asked.icd_raw
    return DistillationTask(inner, DistillableLatents(inner), replace(asked, icd_raw=raw))


class LatentPrediction(NamedTuple):
    """The input of a network for clips of one size, and its prediction [B, C, T, h, w]."""

    group: ClipGroup
    values: Tensor


class DistillableLatents(Distillable):
    """Distillation of networks of diffusers. Their blocks are the modules that the student's compression.json pairs."""

    same = ()
    task: LatentTask

    def __init__(self, task: LatentTask):
        super().__init__(task)
        self.teacher: nn.Module | None = None
        self.teacher_calls: NetworkCalls | None = None
        self.pairs: list[tuple[str, str]] = []

    def check_teacher(self, folder: Path) -> None:
        config, own = read_config(folder, SUPPORTED), self.task.config
        calls = NetworkCalls.of(config)
        if folder.resolve() == self.task.folder.resolve():
            raise UserError(f"distill.teacher {folder} is the student itself (model.from); name the model that it was pruned from")
        if calls.name != self.task.calls.name:
            raise UserError(f"distill.teacher {folder} is a {calls.name}, the student a {self.task.calls.name}; name its parent")
        for name in ("in_channels", "out_channels", "cross_attention_dim", "patch_size", "patch_size_t", "attention_head_dim"):
            if not calls.is_unet and config.get(name) != own.get(name):
                raise UserError(f"distill.teacher {folder} has another {name} than the student; name the student's parent")

    def sha256(self, folder: Path) -> str:
        return folder_sha256(folder, [folder / CONFIG, *weight_files(folder).values()])

    def read_teacher(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        self.teacher = load(folder, torch_dtype=dtype).to(self.task.device).eval().requires_grad_(False)
        self.teacher_calls = NetworkCalls.of(read_config(folder, SUPPORTED))
        return self.teacher

    def kept(self, teacher: nn.Module, stated: Sequence[int], sha256: str) -> list[int]:
        self.pairs, before = taps_of(self.task.folder), read_record(self.task.folder).get("parameters", {}).get("before")
        if (count := parameter_count(teacher)) != before:
            raise UserError(
                f"distill.teacher {self.task.settings.distill.teacher} has {count} parameters, and the model that the student was "
                f"pruned from has {shown(before)}, so their blocks cannot be compared; name that model, or set distill.icd=0"
            )
        return list(range(len(self.pairs)))

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the modules that are compared."""
        model = bare(model)
        return [model.get_submodule(pair[model is self.teacher]) for pair in self.pairs]

    def critic_taps(self, teacher: nn.Module, count: int) -> list[int]:
        """Return numbers of `NetworkCalls.blocks`: all down blocks of a U-Net, some of the first half of a transformer."""
        blocks = self.teacher_calls.blocks()
        return list(range(len(blocks))) if self.teacher_calls.is_unet else critic_taps(len(blocks), count)

    def critic_channels(self, teacher: nn.Module, taps: Sequence[int]) -> list[int]:
        blocks = self.teacher_calls.blocks()
        return [self.teacher_calls.channels(blocks[tap]) for tap in taps]

    def pooled_width(self, teacher: nn.Module) -> int:
        return self.task.source.shapes[TEXT][1]

    def teacher_flops(self, teacher: nn.Module, prepared: Unencoded, blocks: int | None = None) -> float:
        names = () if blocks is None else self.teacher_calls.blocks()[:blocks]
        return sum(self.task.flops(self.teacher_calls.config, clip, names) for clip in prepared.clips)

    def draws(self, step: int, positions: range, prepared: Unencoded) -> Draws:
        seed, levels, noise = self.task.settings.training.seed, [], []
        for position, of_clip in zip(positions, prepared.noise, strict=True):
            level, new = (sample_generator(seed, step, position, f"critic {what}") for what in ("level", "noise"))
            levels.append(time_of_noise(torch.exp(MEAN + STD * torch.randn((), generator=level))))
            noise.append(torch.randn(of_clip.shape, generator=new))
        return Draws({LEVEL: torch.stack(levels)}, {NEW_NOISE: noise})

    def forward(self, model: nn.Module, micro: dict[str, Any], taps: Sequence[int]) -> ForwardPass:
        features, predictions, calls = [], [], self.task.calls
        modules = self.blocks(model) if taps else []
        for group in self.task.groups(micro):
            shape = group.clean.shape
            with tapped({tap: modules[tap] for tap in taps}, lambda output, shape=shape: calls.features(output, shape)) as found:
                predictions.append(LatentPrediction(group, group.predicted(model, calls)))
            features.append(Features(group.at, [found[tap] for tap in taps]))
        clips = torch.arange(len(micro[NOISE]), device=micro[COUNTS].device)
        return ForwardPass(clips, {}, features, predictions)

    def losses(self, student: ForwardPass, teacher: ForwardPass | None, task: float, kd: float) -> Losses:
        found = in_order([(group.at, self.task.errors(values, group)) for group, values in student.prediction])
        if teacher is None or kd == 0:
            return Losses(task * found, found.detach(), None)
        apart = in_order([
            (group.at, squared(values, theirs.values.detach()))
            for (group, values), theirs in zip(student.prediction, teacher.prediction, strict=True)
        ])
        return Losses(task * found + kd * apart, found.detach(), apart.detach())

    def judged(self, teacher: nn.Module, passed: ForwardPass, micro: dict[str, Any], taps: Sequence[int]) -> Judged:
        calls, features, pooled = self.teacher_calls, [], []
        names = calls.blocks()
        for group, values in passed.prediction:
            level = self.task.objective.near(micro[LEVEL][group.at])
            noise = torch.stack([micro[NEW_NOISE][i] for i in group.at])
            clean = self.task.objective.clean(group.noisy, values.float(), group.level)
            shape = clean.shape
            modules = {tap: teacher.get_submodule(names[tap]) for tap in taps}
            with tapped_first(modules, lambda output, shape=shape: calls.features(output, shape)) as found:
                group.predicted(teacher, calls, with_noise(clean, noise, level), level.time)
            features.append(Features(group.at, [found[tap] for tap in taps]))
            pooled.append((group.at, group.tensors[TEXT].mean(1)))
        return Judged(features, in_order(pooled))
