"""The interface between recovery by distillation and a generator.

A student is trained with what its teacher computes from the same input. The training loop asks a task for losses;
recovery asks for more: features of blocks, the distance of two predictions, and what a network that judges motion sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lumos.compression.critic import critic_taps
from lumos.compression.networks import weights_sha256
from lumos.compression.record import kept_blocks
from lumos.compression.teacher import check_teacher
from lumos.errors import UserError
from lumos.runtime import no_progress_bar
from lumos.training.video_task import VideoTask

LEVEL = "critic_level"
"""Name of the tensor [B] of a batch that says how much is left of a re-noised clip: a time, or a mask ratio."""


class Features(NamedTuple):
    """Features of the clips of one size.

    at      indices of the B' clips in the micro-batch
    blocks  for each block that was asked for, in that order: [B', T, h, w, C]
    """

    at: list[int]
    blocks: list[Tensor]


@dataclass(frozen=True)
class ForwardPass:
    """The results of a network for a micro-batch of B clips with N losses.

    clips       int64 [N], the clip of each loss
    places      {loss group of the task: the place of each loss, [N]}
    features    the features of all clips
    prediction  what the losses and the one-step result are computed from; each generator has a form of its own
    """

    clips: Tensor
    places: dict[str, Tensor]
    features: list[Features]
    prediction: Any


class Losses(NamedTuple):
    """Losses [N]: the weighted sum with gradient; its parts without, None for a part that was not computed."""

    total: Tensor
    task: Tensor
    kd: Tensor | None


@dataclass(frozen=True)
class Judged:
    """The input of a critic for B clips: features of the frozen teacher [B', T, h, w, C], and pooled prompts [B, E]."""

    features: list[Features]
    pooled: Tensor


@dataclass(frozen=True)
class Draws:
    """Random draws of clips for re-noising, each a pure function of the seed, the step and the clip's position in it.

    The fields are those of `lumos.training.task.Batch`. One of the tensors is LEVEL.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    padded: tuple[str, ...] = ()


class Distillable(ABC):
    """The functions of a generator that recovery needs, for the training task of the student.

    The constructor raises UserError for settings of the task with which a student cannot be compared with a teacher.

    same  fields of the config that student and teacher must have in common
    """

    same: ClassVar[Collection[str]]

    def __init__(self, task: VideoTask):
        self.task = task

    def check_teacher(self, folder: Path) -> None:
        """Raise UserError unless the model in a folder can teach the student."""
        check_teacher(folder, self.task, self.same)

    def sha256(self, folder: Path) -> str:
        """Return the hash of the config and the weights in a folder."""
        return weights_sha256(folder)

    def kept(self, teacher: nn.Module, stated: Sequence[int], sha256: str) -> list[int]:
        """Return the teacher's block for each block of the student.

        stated: the setting distill.kept. sha256: the hash of the teacher's config and weights.
        """
        config, theirs = self.task.config, teacher.config
        if config.hidden_size != theirs.hidden_size:
            raise UserError(
                f"the student has hidden_size {config.hidden_size}, the teacher {theirs.hidden_size}, so their features "
                "cannot be compared; set distill.icd=0, and distill.mca=0 or distill.motion=adversarial"
            )
        return kept_blocks(self.task.settings.model.from_, stated, config.num_hidden_layers, theirs.num_hidden_layers, sha256)

    def critic_taps(self, teacher: nn.Module, count: int) -> list[int]:
        """Return the numbers, ascending, of the teacher's blocks behind which heads of a critic stand: about `count`."""
        return critic_taps(len(self.blocks(teacher)), count)

    def critic_channels(self, teacher: nn.Module, taps: Sequence[int]) -> list[int]:
        """Return the channels behind each of these blocks."""
        return [teacher.config.hidden_size] * len(taps)

    def read_teacher(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Return the network of a model folder, frozen and in evaluation mode, on the device of the training."""
        with no_progress_bar():
            model = self.task.model_class.from_pretrained(folder, dtype=dtype)
        return model.to(self.task.device).eval().requires_grad_(False)

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the blocks of a network in the order of execution; `model` may be wrapped by an engine."""

    @abstractmethod
    def pooled_width(self, teacher: nn.Module) -> int:
        """Return the channels of pooled prompts, see `Judged`."""

    @abstractmethod
    def draws(self, step: int, positions: range, prepared: Any) -> Draws:
        """Return the draws for the clips at `positions` of a step. `prepared` is what the task's `prepare` returned."""

    @abstractmethod
    def teacher_flops(self, teacher: nn.Module, prepared: Any, blocks: int | None = None) -> float:
        """Return the FLOPs of a forward pass of the teacher on what the task's `prepare` returned.

        blocks: the number of its first blocks that run, counted as by `critic_taps`; None: the whole network runs.
        """

    @abstractmethod
    def forward(self, model: nn.Module, micro: dict[str, Any], taps: Sequence[int]) -> ForwardPass:
        """Run a network on a micro-batch. taps: the numbers, ascending, of the blocks whose features are returned."""

    @abstractmethod
    def losses(self, student: ForwardPass, teacher: ForwardPass | None, task: float, kd: float) -> Losses:
        """Return `task` times the task's own losses plus `kd` times the distances of two predictions.

        Memory beyond the predictions is bounded. Without a teacher there are no distances.
        """

    @abstractmethod
    def judged(self, teacher: nn.Module, passed: ForwardPass, micro: dict[str, Any], taps: Sequence[int]) -> Judged:
        """Return the teacher's features of a network's one-step result after re-noising.

        The one-step result is the clean clip that follows from one prediction. Gradients reach the prediction.
        """


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrapper of an engine, or the network itself."""
    return getattr(model, "module", model)


def in_order(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Return the values [B] of all clips from those of groups of clips, (indices of the clips, values)."""
    order = [i for at, _ in parts for i in at]
    values = torch.cat([values for _, values in parts])
    place = sorted(range(len(order)), key=order.__getitem__)
    return values if place == order else values[place]
