"""Solvers of dx/dt = field(x, t) on a grid of times. They know no network.

    euler       order 1, one call of the field a step
    midpoint    order 2, two calls
    heun        order 2, two calls
    ab2         Adams-Bashforth, order 2, one call; the first step is Heun's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from lumos.errors import shown
from lumos.models.stiv.settings import SOLVERS

Field = Callable[[Tensor, float], Tensor]
"""A function (x, t) -> dx/dt of the shape of x."""


def call_times(solver: str, grid: Sequence[float]) -> list[float]:
    """Return the times at which a solver calls the field on a grid, in order. Raises ValueError for an unknown solver."""
    _check(solver)
    if solver == "euler":
        return list(grid[:-1])
    if solver == "ab2":
        return [*grid[:2], *grid[1:-1]]
    return [time for t, end in pairwise(grid) for time in (t, end if solver == "heun" else (t + end) / 2)]


def solve(
    field: Field, x: Tensor, grid: Sequence[float], solver: str = "euler", after_step: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Return x at the last time of `grid`, from x at the first.

    grid: ascending times, `lumos.models.stiv.flow.time_grid`.
    after_step: called with the number of each step, from 0, and the x after it.
    Raises ValueError for an unknown solver.
    """
    _check(solver)
    before: tuple[float, Tensor] | None = None  # size and slope of the step before, for ab2
    for step, (t, end) in enumerate(pairwise(grid)):
        h, slope = end - t, field(x, t)
        if solver == "euler":
            x = x + h * slope
        elif solver == "midpoint":
            x = x + h * field(x + h / 2 * slope, t + h / 2)
        elif solver == "heun" or before is None:
            x = x + h / 2 * (slope + field(x + h * slope, end))
        else:
            weight = h / (2 * before[0])  # 1/2 on a uniform grid
            x = x + h * ((1 + weight) * slope - weight * before[1])
        if solver == "ab2":
            before = h, slope
        if after_step is not None:
            after_step(step, x)
    return x


def _check(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver {shown(solver)} is unknown; allowed: {', '.join(SOLVERS)}")
