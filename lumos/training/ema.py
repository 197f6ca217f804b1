"""Averaged weights: what is exported and generates better than the last step's weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Ema:
    """Exponential moving average, fp32, of this process's share of the weights.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is soon forgotten.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Take in the weights after optimizer step number `step` (the first is 1)."""
        if not self.average:  # a process of many may have no share
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [parameters[name].float() for name in self.average], weight)

    @torch.no_grad()
    def swap(self, parameters: dict[str, Tensor]) -> None:
        """Exchange averaged and current weights in place; a second call undoes it."""
        for name, average in self.average.items():
            current = parameters[name].float().clone()
            parameters[name].copy_(average)
            average.copy_(current)
