"""What the training loop asks of a task, and the batches that a task makes.

The loop (`lumos.training.loop`) knows no model: it asks a `TrainingTask` for a network, for batches and for losses. A new kind of
training is a new task; the loop is never subclassed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, full_like, nn

from lumos.data.curriculum import StepShape
from lumos.data.seeding import POSITIONS_PER_STEP
from lumos.data.source import StepSource
from lumos.training.muon import layer_matrices
from lumos.training.samples import Sampler

IGNORED = -100
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class Batch:
    """One process's part of a training step: B clips.

    step, kind    the step's number, and "image" or "video"
    tensors       by name, each [B, ...]
    names         of the clips, which find them again
    lengths       tokens of each clip
    flops         of forward and backward of the whole batch
    supervised    number of losses
    rows          by name, a list of B objects that the network takes beside the tensors
    padded        tensors [B, L, ...] that are right-padded to the longest of `lengths`; None: all
    idle          by name, the value of a tensor that leaves no loss: of a micro-batch that only keeps processes in step
    pad_to        padded rows are a multiple of this length
    """

    step: int
    kind: str
    tensors: dict[str, Tensor]
    names: list[str]
    lengths: list[int]
    flops: float
    supervised: int
    rows: dict[str, list] = field(default_factory=dict)
    padded: tuple[str, ...] | None = None
    idle: Mapping[str, float] = field(default_factory=lambda: {"targets": IGNORED})
    pad_to: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all clips, without padding."""
        return sum(self.lengths)

    @property
    def whole(self) -> dict[str, Any]:
        """The batch as one micro-batch."""
        return self.tensors | self.rows

    def micro_batches(self, size: int | None, share: int | None = None) -> list[dict[str, Any]]:
        """Parts of up to `size` clips, each as long as its longest clip.

        The number of parts is that of a process with `share` clips, because ZeRO needs it to be equal in all processes: a
        process with a clip less may have to add a part without losses.
        """
        count = len(self.names)
        size = min(size or POSITIONS_PER_STEP, max(share or 0, count))
        parts = [self._part(i, min(i + size, count)) for i in range(0, count, size)]
        for _ in range(len(parts), math.ceil((share or count) / size)):
            last = self._part(count - 1, count)  # the shortest
            parts.append(last | {name: full_like(last[name], value) for name, value in self.idle.items()})
        return parts

    def _part(self, start: int, stop: int) -> dict[str, Any]:
        longest = math.ceil(max(self.lengths[start:stop]) / self.pad_to) * self.pad_to
        padded = self.tensors if self.padded is None else self.padded
        parts = {
            name: tensor[start:stop, :longest] if name in padded else tensor[start:stop] for name, tensor in self.tensors.items()
        }
        return parts | {name: values[start:stop] for name, values in self.rows.items()}


@dataclass(frozen=True)
class Measured:
    """What a network does on clips that it is not trained on: numbers for the log, and pictures uint8 [T, H, W, 3] by name."""

    values: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Output(NamedTuple):
    """A part of the output of a network for one clip, of T latent frames.

    values  float32 [T, n]; a column is the same place and channel in all frames. Only sums of squares and products count.
    frames  int64 [T], the number of each frame in its clip
    levels  int64 [T], the place of each frame in the score group "level"
    """

    values: Tensor
    frames: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Forward:
    """What a network makes of a micro-batch, for compression.

    losses   those of `TrainingTask.losses`, [N]
    places   {group of `TrainingTask.score_groups`: place of each loss, int64 [N]}
    outputs  yields the output part by part, in the same order for every network
    """

    losses: Tensor
    places: dict[str, Tensor]
    outputs: Callable[[], Iterator[Output]]


class TrainingTask(ABC):
    """What is trained, on what, with which losses.

    loss_groups     {name: places}: by what the losses are sorted in the log, such as latent frames
    source          where the clips come from
    causal          whether a latent frame of the network sees no later one
    export_folder   name of the folder in the run's folder that `export` writes
    measures        whether `measure` takes the place of losses on held-out clips in the validation
    score_groups    {group: names of its places}: by what compression sorts losses, "frames" and "level" (of noise or masks)
    """

    loss_groups: dict[str, int]
    source: StepSource
    causal: ClassVar[bool] = False
    export_folder: ClassVar[str] = "export"
    measures: ClassVar[bool] = False
    score_groups: ClassVar[dict[str, tuple[str, ...]]] = {}

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The network in float32, in training mode, the same for a seed in all processes."""

    @abstractmethod
    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Any:
        """The clips at `positions` of a step, without what needs a network: picklable, on the CPU, made in any process."""

    @abstractmethod
    def encode(self, prepared: Any) -> Batch:
        """The batch of what `prepare` returned, on the device of the training."""

    @abstractmethod
    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [N] of a micro-batch with gradient, and {group of `loss_groups`: the place of each loss, [N]}.

        It may add entries to `micro` for `auxiliary_losses` of the same micro-batch.
        """

    @abstractmethod
    def resume_fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed: all that decides the losses."""

    @abstractmethod
    def export_metadata(self) -> dict[str, Any]:
        """What `export` needs beside the weights, as JSON. Called after `build_model`."""

    @abstractmethod
    def export(self, folder: Path, target: Path) -> Measured | None:
        """Write the checkpoint in `folder` as a folder that users load. Returns what was measured of it, if anything."""

    def fingerprint_defaults(self) -> dict[str, Any]:
        """For entries of `resume_fingerprint` that older checkpoints lack: what they were when those were written."""
        return {}

    def first_weights(self, stop: Callable[[], bool]) -> dict[str, Tensor] | None:
        """Whole weights, by name, that a new run begins with in place of those of `build_model`.

        They are computed once, before the first step, and are equal in all processes. None if `stop()` became true meanwhile:
        the run then ends without a checkpoint.
        """
        return {}

    def muon_matrices(self, model: nn.Module) -> dict[str, float]:
        """Weights that training.optimizer=muon updates as matrices, by name, and by how much training.lr is multiplied for each."""
        return dict.fromkeys(layer_matrices(model), 1.0)

    def measure(self, model: nn.Module) -> Measured:
        """Measure the network, which has the averaged weights if the run has any. Called in all processes if `measures` is set."""
        raise TypeError(f"{type(self).__name__} measures nothing")

    def preview(self, weights: dict[str, Tensor]) -> Sampler | None:
        """Draws sample clips with these whole weights; None: the task draws none."""
        return None

    def build_auxiliary(self) -> nn.Module | None:
        """A second network, with an optimizer of its own, that is trained beside the model; None: there is none.

        It is float32, in training mode, and the same for a seed in all processes. The loop steps it after the model, on the
        same micro-batches, and saves and resumes it, under ZeRO 0 to 2 too. A task whose `losses` need this network keeps it:
        there it has no gradient, and is as it was after the step before.
        """
        return None

    def auxiliary_optimization(self) -> dict[str, Any]:
        """Keys of the section `training`, such as lr and betas, that the auxiliary network has otherwise than the model."""
        return {}

    def auxiliary_losses(self, model: nn.Module, auxiliary: nn.Module, micro: dict[str, Any]) -> Tensor:
        """Losses [N] of the auxiliary network on a micro-batch of N clips; none for a micro-batch that is idle.

        The model has already made its step, and has no gradient here.
        """
        raise TypeError(f"{type(self).__name__} has an auxiliary network, but no losses for it")

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward:
        """Return what the network makes of a micro-batch, for compression."""
        raise TypeError(f"{type(self).__name__} has no scores for compression")

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor:
        """Return the latent frame of each token of a stream [..., C] of the network: int64 [...], -1 for text, -2 for padding."""
        raise TypeError(f"{type(self).__name__} has no scores for compression")

    def step_values(self) -> dict[str, tuple[float, float]]:
        """Further values of the step that is done, as {name: (sum, number of values)}, which the log shows as means.

        They are those of this process, and are forgotten. All processes have the same names, in the same order.
        """
        return {}

    def fault_after(self, means: dict[str, float]) -> str | None:
        """Say why the run cannot go on, which then saves and ends with this line; None: it can.

        means: those of `step_values` of the step over all processes. Called after each step, in all processes.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task beside the networks, as JSON, for `load_state`: no function of the step."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027, a task without a state does nothing
        """Take over what `state` returned; {} in checkpoints of earlier versions."""

    def batch(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Batch:
        """`prepare` and `encode` in one."""
        return self.encode(self.prepare(step, shape, positions, dropout=dropout))
