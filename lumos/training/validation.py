"""Validation loss on fixed clips with fixed masks.

The clips and their masks depend neither on training.seed nor on the number of processes nor on the
size of micro-batches. Losses of different runs, and of different steps of one run, can therefore be
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.training.engine import TrainingEngine
from lumos.training.logging import Meter
from lumos.training.loss_sums import LossSums
from lumos.training.settings import TrainingSettings
from lumos.training.task import Batch, TrainingTask


class Validation:
    """The validation set: `data.validation_clips` clips of each kind ("image", "video").

    The batches are made by the first call of `losses` and reused by later calls.
    """

    def __init__(self, task: TrainingTask, kinds: list[str], settings: TrainingSettings):
        self.task, self.kinds = task, kinds
        self.clips = settings.data.validation_clips
        self.size = min(settings.training.micro_batch_size or 16, self.clips)
        self.batches: dict[str, list[tuple[Batch, bool]]] = {}

    @torch.no_grad()
    def losses(
        self, engine: TrainingEngine, losses: Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]
    ) -> dict[str, Any]:
        """Return the validation losses of all processes together, without text dropout.

        The keys are val_loss_<kind>, the mean over all supervised positions, and
        val_<group>_loss_<kind>, a list with the mean of each place of a group (see `LossSums`).
        """
        engine.module.eval()
        meter = Meter()
        for kind in self.kinds:
            if kind not in self.batches:
                self.batches[kind] = self._share(kind, engine.rank, engine.world)
            sums = LossSums(self.task.loss_groups)
            for batch, counts in self.batches[kind]:
                found = losses(batch.whole)
                if counts:
                    sums.add(*found)
            meter.add_parts(sums.over_processes(engine).parts(kind))
        engine.module.train()
        return {f"val_{name}": value for name, value in meter.means().items()}

    def _share(self, kind: str, rank: int, world: int) -> list[tuple[Batch, bool]]:
        """Return the batches of one process, each with a flag that says whether it counts.

        All processes have the same number of batches, because every process must take part in each
        forward pass of ZeRO-3. Batches that only fill up this number do not count.
        """
        starts = list(range(0, self.clips, self.size))
        rounds = math.ceil(len(starts) / world)
        shape = StepShape(kind, self.clips)
        share = []
        for i in range(rank * rounds, (rank + 1) * rounds):
            start = starts[i] if i < len(starts) else 0
            positions = range(start, min(start + self.size, self.clips))
            share.append((self.task.batch(VALIDATION_STEP, shape, positions, dropout=False), i < len(starts)))
        return share
