"""Exact totals of losses.

Micro-batches, processes and steps pass on sums and numbers of positions, never means. A mean of
means would give the positions of a small micro-batch too much weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lumos.training.engine import TrainingEngine


class LossSums:
    """Sum of losses and number of supervised positions, in total and for each place of each group.

    A group divides the positions into places, for example by latent frame or by mask ratio.
    `groups` holds the number of places of each group. `table` [2, 1 + all places] has the sums in
    its first row and the numbers of positions in its second; column 0 is the total.
    """

    def __init__(self, groups: Mapping[str, int]):
        self.groups = groups
        self.table = torch.zeros(2, 1 + sum(groups.values()), dtype=torch.float64)

    def add(self, losses: Tensor, places: Mapping[str, Tensor]) -> None:
        """Add losses [N] of positions, where places {group: [N]} holds the place of each position.

        A group that `places` leaves out stays unchanged.
        """
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

    def over_processes(self, engine: TrainingEngine) -> LossSums:
        """Return the totals over all processes."""
        whole = LossSums(self.groups)
        whole.table = engine.all_sum(self.table)
        return whole

    @property
    def mean(self) -> float:
        """The mean loss of all positions; nan if there is no position."""
        return float(self.table[0, 0] / self.table[1, 0])

    def parts(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the log, table) for the total and for each group, of batches of a kind.

        A table is [2] for the total and [2, places] for a group: sums and numbers of positions.
        """
        yield f"loss_{kind}", self.table[:, 0]
        tables = self.table[:, 1:].split(list(self.groups.values()), dim=1)
        for group, table in zip(self.groups, tables, strict=True):
            yield f"{group}_loss_{kind}", table


def of_all_processes(engine: TrainingEngine, *values: float) -> list[list[float]]:
    """Return, for each value, the list of its values on all processes, in the order of ranks."""
    table = torch.zeros(len(values), engine.world, dtype=torch.float64)
    table[:, engine.rank] = torch.tensor(values, dtype=torch.float64)
    return engine.all_sum(table).tolist()
