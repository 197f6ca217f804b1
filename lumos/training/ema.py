"""Averaged weights, which are exported because they generate better than those of the last step."""

from __future__ import annotations

import torch
from torch import Tensor


class Ema:
    """Exponential moving average (EMA), in fp32, of this process's part of the weights.

    After n updates the decay is min(decay, (1 + n) / (10 + n)). It starts low, so that the random
    weights of the start soon lose their influence.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Update the average with the weights after optimizer step `step`; the first step is 1."""
        if not self.average:  # with many processes, one may hold no weights
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [parameters[name].float() for name in self.average], weight)

    @torch.no_grad()
    def swap(self, parameters: dict[str, Tensor]) -> None:
        """Exchange the averaged and the current weights in place; a second call undoes the exchange."""
        for name, average in self.average.items():
            current = parameters[name].float().clone()
            parameters[name].copy_(average)
            average.copy_(current)
