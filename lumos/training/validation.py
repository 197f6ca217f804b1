"""Validation loss on fixed clips with fixed masks, so that two runs, or two moments of one, can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lumos.data.loader import VALIDATION_STEP, Batch, StepShape
from lumos.training.engine import Engine
from lumos.training.settings import TrainingSettings

if TYPE_CHECKING:
    from lumos.training.loop import Task


class Validation:
    """The fixed set, `data.validation_clips` clips of each kind; made when it is first asked for, then kept."""

    def __init__(self, task: Task, kinds: list[str], settings: TrainingSettings):
        self.task, self.kinds = task, kinds
        self.clips = settings.data.validation_clips
        self.size = min(settings.training.micro_batch_size or 16, self.clips)
        self.batches: dict[str, list[tuple[Batch, bool]]] = {}

    @torch.no_grad()
    def losses(self, engine: Engine, losses: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]) -> dict[str, float]:
        """{val_loss_<kind>: mean over all supervised positions}, without text dropout."""
        engine.module.eval()
        results = {}
        for kind in self.kinds:
            if kind not in self.batches:
                self.batches[kind] = self._share(kind, engine.rank, engine.world)
            sums = torch.zeros(2, self.task.num_frames, dtype=torch.float64)
            for batch, counts in self.batches[kind]:
                sums += sums_by_frame(*losses(batch.tensors), self.task.num_frames) * counts
            sums = engine.all_sum(sums)
            results[f"val_loss_{kind}"] = float(sums[0].sum() / sums[1].sum())
        engine.module.train()
        return results

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


def sums_by_frame(losses: Tensor, frames: Tensor, num_frames: int) -> Tensor:
    """losses [N], frames [N] -> float64 [2, t] on the CPU: sum of losses and number of positions of each latent frame."""
    sums = torch.zeros(2, num_frames, dtype=torch.float64)
    frames = frames.cpu()
    sums[0].index_add_(0, frames, losses.detach().double().cpu())
    sums[1] = torch.bincount(frames, minlength=num_frames)
    return sums
