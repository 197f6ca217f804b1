"""Recovery of a pruned model: a student learns from the data and from its teacher, on the loop of every training.

The loss of position i of clip b is

    task x own loss_i + kd x distance_i + icd(step) x content_b + mca(step) x motion_b

where the distance compares the outputs of student and teacher, the content loss their features, and the motion loss is what
a critic says of the student's one-step result (arXiv 2411.18375). Each part is a sum over positions or clips, so that the
loss depends neither on micro-batches nor on processes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumos import registry
from lumos.compression.critic import Critic, with_penalty
from lumos.compression.distillable import LEVEL, Distillable, Draws, ForwardPass, in_order
from lumos.compression.losses import icd_by_clip, motion_by_clip
from lumos.compression.record import RECORD, read_record
from lumos.compression.settings import DistillSettings
from lumos.compression.teacher import refuse_same_weights
from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.errors import UserError
from lumos.settings import to_plain
from lumos.training.adversarial import critic_losses, generator_losses
from lumos.training.engine import pick_precision
from lumos.training.loop import train
from lumos.training.samples import Sampler
from lumos.training.settings import TrainingSettings
from lumos.training.task import Batch, Measured, TrainingTask

WEIGHTS, COUNTS, KEPT = "distill_weights", "distill_counts", "distill_kept"
"""Entries of a micro-batch: weights of the losses, which clips count, and what the critic saw of the clips."""
VALUES = ("task_loss", "kd_loss", "icd_loss", "mca_loss", "critic_real", "critic_fake")
"""Names in the log of the parts of the loss, and of D of real and of fake clips."""
LOST_BELOW, LOST_STEPS = -5.0, 500
"""The critic has won if its D of the student's clips is below this number for so many steps."""


def distill(settings: TrainingSettings) -> dict[str, Any]:
    """Train a student with the settings of `lumos.compression.settings`; returns the summary of `lumos.training.loop.train`."""
    return train(settings, make_task)


def make_task(settings: TrainingSettings, device: torch.device) -> DistillationTask:
    """Return the task of the generator that the settings name, inside a DistillationTask."""
    generator = registry.generator(settings.generator)
    if not generator.distillation:
        raise UserError(f"models of the generator {generator.name} cannot be distilled")
    inner = generator.load("task")(settings, device)
    return DistillationTask(inner, generator.load("distillation")(inner), settings.distill)


class Weights(NamedTuple):
    """The weights of a step's losses that depend on the step."""

    icd: float
    mca: float
    gamma: float


@dataclass(frozen=True)
class Prepared:
    """A prepared batch of the inner task, with the draws and the weights of the step, which are None in validation."""

    inner: Any
    draws: Draws
    weights: Weights | None


class DistillationTask(TrainingTask):
    """A training task whose network, the student, also learns from a teacher.

    Clips, encoding, export and all else are those of the task inside. Validation uses its losses alone.

    inner    the student's training task
    kind     what distillation asks of the generator
    """

    def __init__(self, inner: TrainingTask, kind: Distillable, settings: DistillSettings):
        self.inner, self.kind, self.settings = inner, kind, settings
        self.loss_groups, self.source, self.causal, self.export_folder = (
            inner.loss_groups, inner.source, inner.causal, inner.export_folder,
        )  # fmt: skip
        self.device, training = inner.device, inner.settings.training
        self.precision = pick_precision(settings.teacher_precision or training.precision, inner.device)
        self.critic: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self.teacher_sha256: str | None = None
        self.kept: list[int] = []
        self.low_steps = 0
        self.last: dict[str, float] = {}  # means of the last step
        self.sums: dict[str, Tensor] = {}
        if settings.needs_teacher:
            folder = Path(settings.teacher)
            kind.check_teacher(folder)
            self.teacher_sha256 = kind.sha256(folder)
            self.teacher = kind.read_teacher(folder, self.precision)
        if settings.compares_features:
            self.kept = kind.kept(self.teacher, settings.kept, self.teacher_sha256)
        self.taps = kind.critic_taps(self.teacher, settings.critic_taps) if settings.adversarial else []

    # ---- networks

    def build_model(self) -> nn.Module:
        model = self.inner.build_model()
        if self.teacher is not None:
            refuse_same_weights(model, self.teacher, self.settings.teacher)
        return model

    def first_weights(self, stop: Any) -> dict[str, Tensor] | None:
        return self.inner.first_weights(stop)

    def muon_matrices(self, model: nn.Module) -> dict[str, float]:
        return self.inner.muon_matrices(model)

    def build_auxiliary(self) -> nn.Module | None:
        if self.settings.adversarial:
            torch.manual_seed(self.inner.settings.training.seed + 1)
            channels = self.kind.critic_channels(self.teacher, self.taps)
            self.critic = Critic(channels, self.kind.pooled_width(self.teacher), self.settings.critic_width).train()
        return self.critic

    def auxiliary_optimization(self) -> dict[str, Any]:
        training = self.inner.settings.training
        lr = 10 * training.lr if self.settings.critic_lr is None else self.settings.critic_lr
        least = lr * training.min_lr / training.lr if training.lr else 0.0
        return {"optimizer": "adamw", "lr": lr, "min_lr": least, "betas": (0.0, 0.99), "weight_decay": 0.0}

    # ---- batches

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Prepared:
        prepared = self.inner.prepare(step, shape, positions, dropout=dropout)
        if step == VALIDATION_STEP:
            return Prepared(prepared, Draws(), None)
        draws = self.kind.draws(step, positions, prepared) if self.settings.adversarial else Draws()
        return Prepared(prepared, draws, self.weights(step))

    def weights(self, step: int) -> Weights:
        """Return the weights of the losses in a step: icd falls to 0 over the run, mca is 0 while the critic warms up.

        That of the gradient penalty is 0 but in every distill.gamma_interval-th step (arXiv 1912.04958, appendix B).
        """
        settings, steps = self.settings, self.inner.settings.training.max_steps
        icd = settings.icd * (max(0.0, 1 - step / steps) if settings.icd_decay else 1.0)
        waits = settings.adversarial and step < settings.critic_warmup
        every = settings.gamma_interval
        return Weights(icd, 0.0 if waits else settings.mca, 0.0 if step % every else settings.gamma * every)

    def encode(self, prepared: Prepared) -> Batch:
        batch, draws = self.inner.encode(prepared.inner), prepared.draws
        if prepared.weights is None:
            return batch
        clips = len(batch.names)
        tensors = {**draws.tensors, COUNTS: torch.ones(clips, dtype=torch.bool)}
        return replace(
            batch,
            flops=batch.flops + self._teacher_flops(prepared),
            tensors=batch.tensors | {name: tensor.to(self.device) for name, tensor in tensors.items()},
            rows=batch.rows | {name: [x.to(self.device) for x in values] for name, values in draws.rows.items()}
            | {WEIGHTS: [prepared.weights] * clips},
            padded=(*(batch.tensors if batch.padded is None else batch.padded), *draws.padded),
            idle={**batch.idle, COUNTS: False},
        )  # fmt: skip

    def _asks_teacher(self, weights: Weights) -> bool:
        """Return whether a step runs the teacher on the input of the student."""
        return bool(self.settings.kd or weights.icd or weights.mca or self.settings.adversarial)

    def _teacher_flops(self, prepared: Prepared) -> float:
        """Return the FLOPs that the losses of the teacher add to a step, without the heads of the critic.

        The critic's part of the teacher reads both one-step results, and has a backward pass to that of the student.
        """
        if not self._asks_teacher(prepared.weights):
            return 0.0
        flops = self.kind.teacher_flops(self.teacher, prepared.inner)
        if self.settings.adversarial:
            passes = 3 if prepared.weights.mca else 2
            flops += passes * self.kind.teacher_flops(self.teacher, prepared.inner, self.taps[-1] + 1)
        return flops

    # ---- losses

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        if WEIGHTS not in micro or not micro[COUNTS].any():  # of the validation, or idle
            return self.inner.losses(model, micro)
        settings, weights = self.settings, micro[WEIGHTS][0]
        motion = weights.mca if settings.motion == "difference" else 0.0
        student_taps = settings.layers(len(self.kept)) if weights.icd or motion else []
        teacher = None
        if self._asks_teacher(weights):
            with torch.no_grad(), self._teacher_precision():
                teacher = self.kind.forward(self.teacher, micro, [self.kept[i] for i in student_taps])
        student = self.kind.forward(model, micro, student_taps)
        found = self.kind.losses(student, teacher, settings.task, settings.kd)
        self._add(task_loss=found.task, kd_loss=found.kd)
        total = found.total
        if weights.icd:
            icd = compared(student, teacher, lambda s, h: icd_by_clip(s, h, settings.k, settings.icd_raw))
            total = total + weights.icd * icd[student.clips]
            self._add(icd_loss=icd)
        mca = None
        if motion:
            mca = compared(student, teacher, lambda s, h: motion_by_clip(s, h, settings.k))
        elif settings.adversarial:
            mca = self._judge(student, teacher, micro, weights.mca > 0)
        if mca is not None and weights.mca:
            total = total + weights.mca * mca[student.clips]
            self._add(mca_loss=mca)
        return total, student.places

    def _judge(self, student: ForwardPass, teacher: ForwardPass, micro: dict[str, Any], counts: bool) -> Tensor:
        """Return the student's adversarial loss of each clip, [B], and keep what the critic sees for its own losses."""
        judged = []
        for passed, graded in ((teacher, False), (student, counts)):
            with nullcontext() if graded else torch.no_grad(), self._teacher_precision():
                judged.append(self.kind.judged(self.teacher, passed, micro, self.taps))
        real, fake = judged
        micro[KEPT] = [
            (theirs.blocks, [x.detach() for x in ours.blocks], micro[LEVEL][ours.at], real.pooled[ours.at])
            for theirs, ours in zip(real.features, fake.features, strict=True)
        ]
        if not counts:
            return torch.empty(0)
        scores = in_order([
            (ours.at, self.critic(ours.blocks, micro[LEVEL][ours.at], fake.pooled[ours.at])) for ours in fake.features
        ])  # fmt: skip
        return generator_losses(scores, self.settings.generator)

    def auxiliary_losses(self, model: nn.Module, auxiliary: nn.Module, micro: dict[str, Any]) -> Tensor:
        losses = []
        for theirs, ours, level, pooled in micro.pop(KEPT, ()):
            real, penalty = with_penalty(auxiliary, theirs, level, pooled, micro[WEIGHTS][0].gamma)
            fake = auxiliary(ours, level, pooled)
            self._add(critic_real=real, critic_fake=fake)
            losses.append(critic_losses(real, fake) + penalty)
        if losses:
            return torch.cat(losses)
        return sum(p.sum() for p in auxiliary.parameters()).float().expand(0)  # of an idle micro-batch, in step with the others

    def _teacher_precision(self) -> Any:
        """Run the teacher in its precision, whatever the engine does with the student."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    # ---- the log, and faults

    def _add(self, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is not None:
                value = value.detach().double()
                self.sums[name] = self.sums.get(name, 0) + torch.stack([value.sum(), value.new_tensor(value.numel())])

    def step_values(self) -> dict[str, tuple[float, float]]:
        sums, self.sums = self.sums, {}
        return {name: tuple(sums[name].tolist()) if name in sums else (0.0, 0.0) for name in VALUES}

    def fault_after(self, means: dict[str, float]) -> str | None:
        """Count the steps in which the critic tells the student's clips from the teacher's with ease."""
        self.last = {name: round(mean, 6) for name, mean in means.items()}
        self.low_steps = self.low_steps + 1 if means.get("critic_fake", 0.0) < LOST_BELOW else 0
        if self.low_steps < LOST_STEPS:
            return None
        return (
            f"the critic has won: D of the student's clips was below {LOST_BELOW:g} for {self.low_steps} steps, and teaches it "
            "nothing more; begin again with a lower distill.critic_lr, with distill.gamma=1, or with distill.motion=difference"
        )

    def state(self) -> dict[str, Any]:
        return {**self.inner.state(), "low_steps": self.low_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.inner.load_state(state)
        self.low_steps = state.get("low_steps", 0)

    # ---- the run

    def resume_fingerprint(self) -> dict[str, Any]:
        decisive = {f"distill.{key}": value for key, value in to_plain(self.settings).items() if key != "teacher"}
        decisive |= {"distill.kept": self.kept, "distill.teacher (sha256)": self.teacher_sha256}
        return {**self.inner.resume_fingerprint(), **decisive}

    def fingerprint_defaults(self) -> dict[str, Any]:
        return {"distill.teacher_precision": None, "distill.gamma_interval": 1, **self.inner.fingerprint_defaults()}

    def export_metadata(self) -> dict[str, Any]:
        metadata, folder = self.inner.export_metadata(), self.inner.settings.model.from_
        recovery = {"distill": to_plain(self.settings), "teacher_sha256": self.teacher_sha256}
        record = {**(read_record(folder) if folder else {}), "recovery": recovery, "losses": self.last}
        return {**metadata, "records": {**metadata.get("records", {}), RECORD: record}}

    def export(self, folder: Path, target: Path) -> Measured | None:
        return self.inner.export(folder, target)

    def preview(self, weights: dict[str, Tensor]) -> Sampler | None:
        return self.inner.preview(weights)


def compared(student: ForwardPass, teacher: ForwardPass, loss: Any) -> Tensor:
    """Return loss(features of the student, of the teacher) of each clip, [B], for features [B', T, n, C] of one layer each."""
    return in_order([
        (ours.at, loss(*([x.flatten(2, 3) for x in side.blocks] for side in (ours, theirs))))
        for ours, theirs in zip(student.features, teacher.features, strict=True)
    ])  # fmt: skip
