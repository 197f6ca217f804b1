"""What the training loop asks of a task, and the batches that a task gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumos.data.seeding import POSITIONS_PER_STEP
from lumos.models.lumos1.sequence import Layout

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One process's part of a step. Every tensor is [B, ...], right-padded to the longest of `lengths`; `targets` [B, L] is IGNORED
    where nothing is asked, which is not so in `supervised` places. `flops` of its forward and backward. `layouts` [B] is what the
    model would read off the ids."""

    step: int
    kind: str
    tensors: dict[str, Tensor]
    names: list[str]
    lengths: list[int]
    flops: float
    supervised: int
    layouts: list[Layout]
    pad_to: int = 1  # the rows' length is a multiple of it

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def micro_batches(self, size: int | None, share: int | None = None) -> list[dict[str, Any]]:
        """Parts of up to `size` clips, each as long as its longest.

        Their number is that of a process with `share` clips, because ZeRO needs it to be equal on all: a process with a clip
        less may have to add one that asks for nothing.
        """
        count = len(self.names)
        size = min(size or POSITIONS_PER_STEP, max(share or 0, count))
        parts = [self._part(i, min(i + size, count)) for i in range(0, count, size)]
        for _ in range(len(parts), math.ceil((share or count) / size)):
            idle = self._part(count - 1, count)  # the shortest
            parts.append(idle | {"targets": torch.full_like(idle["targets"], IGNORED)})
        return parts

    def _part(self, start: int, stop: int) -> dict[str, Any]:
        longest = math.ceil(max(self.lengths[start:stop]) / self.pad_to) * self.pad_to
        parts = {name: tensor[start:stop, :longest] for name, tensor in self.tensors.items()}
        return parts | {"layouts": self.layouts[start:stop]}
