"""Validation loss on fixed clips with fixed masks, so that two runs, or two moments of one, can be compared.

Neither the clips nor their masks depend on training.seed, on the number of processes or on the size of micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.training.engine import Engine
from lumos.training.logging import Meter
from lumos.training.loss_sums import LossSums
from lumos.training.settings import TrainingSettings
from lumos.training.task import Batch, TrainingTask


class Validation:
    """The fixed set, `data.validation_clips` clips of each kind; made when it is first asked for, then kept."""

    def __init__(self, task: TrainingTask, kinds: list[str], settings: TrainingSettings):
        self.task, self.kinds = task, kinds
        self.clips = settings.data.validation_clips
        self.size = min(settings.training.micro_batch_size or 16, self.clips)
        self.batches: dict[str, list[tuple[Batch, bool]]] = {}

    @torch.no_grad()
    def losses(
        self, engine: Engine, losses: Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]
    ) -> dict[str, Any]:
        """{val_loss_<kind>: mean over all supervised positions, val_<group>_loss_<kind>: [places]}, without text dropout."""
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
        """One process's batches. All have equally many, as ZeRO-3 needs; surplus ones are marked not to count."""
        starts = list(range(0, self.clips, self.size))
        rounds = math.ceil(len(starts) / world)
        shape = StepShape(kind, self.clips)
        share = []
        for i in range(rank * rounds, (rank + 1) * rounds):
            start = starts[i] if i < len(starts) else 0
            positions = range(start, min(start + self.size, self.clips))
            share.append((self.task.batch(VALIDATION_STEP, shape, positions, dropout=False), i < len(starts)))
        return share
