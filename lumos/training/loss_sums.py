"""Losses added up exactly: over micro-batches, processes and steps go sums and numbers of positions, never means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lumos.training.engine import Engine


class LossSums:
    """Sum of the losses and number of supervised positions: of all, and of each place of each group.

    A group sorts positions by something, such as latent frames or ratios of masking; `groups` says how many places each has.
    """

    def __init__(self, groups: Mapping[str, int]):
        self.groups = groups
        self.table = torch.zeros(2, 1 + sum(groups.values()), dtype=torch.float64)

    def add(self, losses: Tensor, places: Mapping[str, Tensor]) -> None:
        """losses [N]; places {group: [N], the place of each position}. A group that is left out gets nothing."""
        losses = losses.detach().double()
        table = torch.zeros(self.table.shape, dtype=torch.float64, device=losses.device)
        table[:, 0] = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        start = 1
        for group, size in self.groups.items():
            if group in places:
                table[0].index_add_(0, start + places[group], losses)
                table[1].index_add_(0, start + places[group], torch.ones_like(losses))
            start += size
        self.table += table.cpu()

    def over_processes(self, engine: Engine) -> LossSums:
        """The sums of all processes together."""
        whole = LossSums(self.groups)
        whole.table = engine.all_sum(self.table)
        return whole

    @property
    def mean(self) -> float:
        """Mean loss of all positions; nan without any."""
        return float(self.table[0, 0] / self.table[1, 0])

    def parts(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the log, [2] or [2, places]: sums and numbers) of each group, for batches of a kind."""
        yield f"loss_{kind}", self.table[:, 0]
        tables = self.table[:, 1:].split(list(self.groups.values()), dim=1)
        for group, table in zip(self.groups, tables, strict=True):
            yield f"{group}_loss_{kind}", table


def of_all_processes(engine: Engine, *values: float) -> list[list[float]]:
    """Each value as it is on every process, in the order of their ranks."""
    table = torch.zeros(len(values), engine.world, dtype=torch.float64)
    table[:, engine.rank] = torch.tensor(values, dtype=torch.float64)
    return engine.all_sum(table).tolist()
