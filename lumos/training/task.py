"""The interface of a training task, which the training loop uses, and the batches that a task makes.

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
    names         names of the clips, by which they can be found in the data
    lengths       tokens of each clip
    flops         FLOPs of the forward and backward pass of the whole batch
    supervised    number of losses
    rows          by name, a list of B objects that the network takes beside the tensors
    padded        tensors [B, L, ...] that are right-padded to the longest of `lengths`; None: all
    idle          by name, the value of a tensor with which a micro-batch has no losses; such a micro-batch only keeps
                  processes in step
    pad_to        the length of padded rows is a multiple of this number
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
        """The number of tokens of all clips, without padding."""
        return sum(self.lengths)

    @property
    def whole(self) -> dict[str, Any]:
        """The batch as one micro-batch."""
        return self.tensors | self.rows

    def micro_batches(self, size: int | None, share: int | None = None) -> list[dict[str, Any]]:
        """Return parts of up to `size` clips, each as long as its longest clip.

        A process with `share` clips, the most of any process, decides the number of parts, because ZeRO needs the same
        number in all processes. A process with fewer clips may have to add a part without losses.
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
    """Measurements of a network on held-out clips: numbers for the log, and pictures uint8 [T, H, W, 3] by name."""

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
    """The results of a forward pass on a micro-batch, for compression.

    losses   those of `TrainingTask.losses`, [N]
    places   {group of `TrainingTask.score_groups`: place of each loss, int64 [N]}
    outputs  yields the output part by part, in the same order for every network
    """

    losses: Tensor
    places: dict[str, Tensor]
    outputs: Callable[[], Iterator[Output]]


class TrainingTask(ABC):
    """The part of a training that depends on the model: its network, its batches and its losses.

    loss_groups     {name: number of places}: how the log groups losses, for example by latent frame
    source          the source of the clips
    causal          whether a latent frame of the network sees no later one
    export_folder   name of the folder in the run's folder that `export` writes
    measures        whether the validation calls `measure` instead of computing losses on held-out clips
    score_groups    {group: names of its places}: how compression groups losses: "frames" and "level" (of noise or masks)
    """

    loss_groups: dict[str, int]
    source: StepSource
    causal: ClassVar[bool] = False
    export_folder: ClassVar[str] = "export"
    measures: ClassVar[bool] = False
    score_groups: ClassVar[dict[str, tuple[str, ...]]] = {}

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the network in float32 and in training mode. With one seed, it is the same in all processes."""

    @abstractmethod
    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Any:
        """Return the clips at `positions` of a step, without the parts that need a network.

        The result is picklable and on the CPU, and does not depend on the process that makes it.
        """

    @abstractmethod
    def encode(self, prepared: Any) -> Batch:
        """Return the batch, on the device of the training, from a result of `prepare`."""

    @abstractmethod
    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses [N] of a micro-batch with gradient, and {group of `loss_groups`: the place of each loss, [N]}.

        The method may add entries to `micro` for `auxiliary_losses` of the same micro-batch.
        """

    @abstractmethod
    def resume_fingerprint(self) -> dict[str, Any]:
        """Return all values that decide the losses. A run resumes a checkpoint only if they are equal."""

    @abstractmethod
    def export_metadata(self) -> dict[str, Any]:
        """Return the values that `export` needs beside the weights, as JSON. The loop calls this after `build_model`."""

    @abstractmethod
    def export(self, folder: Path, target: Path) -> Measured | None:
        """Write the checkpoint in `folder` as a folder that users load. Return measurements of it, or None."""

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return values of entries of `resume_fingerprint` that older checkpoints lack, as they were for those checkpoints."""
        return {}

    def first_weights(self, stop: Callable[[], bool]) -> dict[str, Tensor] | None:
        """Return whole weights, by name, with which a new run begins instead of those of `build_model`.

        They are computed once, before the first step, and are equal in all processes. The result is None if `stop()`
        became true meanwhile; the run then ends without a checkpoint.
        """
        return {}

    def muon_matrices(self, model: nn.Module) -> dict[str, float]:
        """Return the weights that training.optimizer=muon updates as matrices, by name, with the factor of training.lr for each."""
        return dict.fromkeys(layer_matrices(model), 1.0)

    def measure(self, model: nn.Module) -> Measured:
        """Measure the network, which has the averaged weights if the run has them.

        The loop calls this in all processes if `measures` is set.
        """
        raise TypeError(f"{type(self).__name__} measures nothing")

    def preview(self, weights: dict[str, Tensor]) -> Sampler | None:
        """Return a function that generates sample clips with these whole weights, or None if the task has no samples."""
        return None

    def build_auxiliary(self) -> nn.Module | None:
        """Return a second network that is trained beside the model with an optimizer of its own, or None.

        The network is float32 and in training mode. With one seed, it is the same in all processes. The loop updates it
        after the model, on the same micro-batches, and saves and resumes it, also under ZeRO 0 to 2. If `losses` needs this
        network, the task keeps a reference to it. In `losses` it has no gradient, and the weights after the previous step.
        """
        return None

    def auxiliary_optimization(self) -> dict[str, Any]:
        """Return settings of the section `training`, such as lr and betas, that differ for the auxiliary network."""
        return {}

    def auxiliary_losses(self, model: nn.Module, auxiliary: nn.Module, micro: dict[str, Any]) -> Tensor:
        """Return losses [N] of the auxiliary network on a micro-batch of N clips; an idle micro-batch has no losses.

        The model is already updated, and has no gradient here.
        """
        raise TypeError(f"{type(self).__name__} has an auxiliary network, but no losses for it")

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward:
        """Return losses and outputs of the network for a micro-batch, for compression."""
        raise TypeError(f"{type(self).__name__} has no scores for compression")

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor:
        """Return the latent frame of each token of a stream [..., C] of the network: int64 [...], -1 for text, -2 for padding."""
        raise TypeError(f"{type(self).__name__} has no scores for compression")

    def step_values(self) -> dict[str, tuple[float, float]]:
        """Return further values of the last step, as {name: (sum, number of values)}; the log shows their means.

        The sums are those of this process, and start again at 0. All processes have the same names, in the same order.
        """
        return {}

    def fault_after(self, means: dict[str, float]) -> str | None:
        """Return the reason why the run cannot go on, or None. With a reason, the run saves and ends with this line.

        means: the means of `step_values` over all processes. The loop calls this after each step, in all processes.
        """
        return None

    def state(self) -> dict[str, Any]:
        """Return the state of the task that a checkpoint stores beside the networks, as JSON; `load_state` restores it.

        Values that follow from the number of the step need not be stored.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027, a task without a state does nothing
        """Restore a result of `state`; it is {} in checkpoints of earlier versions."""

    def batch(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Batch:
        """Return the batch at `positions` of a step: `prepare`, then `encode`."""
        return self.encode(self.prepare(step, shape, positions, dropout=dropout))
