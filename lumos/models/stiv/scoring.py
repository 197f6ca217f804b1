"""The losses and outputs of the transformer that compression compares, sorted by frames and times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumos.training.task import Forward, Output

TIME_BINS = 10
"""Number of equal ranges of times by which losses are sorted."""
GROUPS = {
    "frames": ("first frame", "later frames"),
    "level": tuple(f"time {k / TIME_BINS:.1f} to {(k + 1) / TIME_BINS:.1f}" for k in range(TIME_BINS)),
}


def time_bins(times: Tensor) -> Tensor:
    """Return the tenth, 0 to 9, of each time in [0, 1]."""
    return (times * TIME_BINS).long().clamp(max=TIME_BINS - 1)


def alike(keys: list[Any]) -> list[list[int]]:
    """Return the indices of equal keys, group by group, in the order of their first places."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def forward(frame_losses: Callable[[list[int]], tuple[Tensor, Tensor]], micro: dict[str, Any]) -> Forward:
    """Return the losses and outputs of a micro-batch. An output is the velocity of the frames of a clip that are not given.

    frame_losses: a function that takes the numbers of clips of one size and returns the losses of their frames [B, T] and
    their velocity [B, T, C, h, w].
    """
    losses, found = [], []
    for at in alike([latents.shape for latents in micro["latents"]]):
        of_frames, velocity = frame_losses(at)
        for row, clip in enumerate(at):
            frames = (~micro["given"][clip] & micro["counts"][clip]).nonzero().squeeze(1)
            losses.append(of_frames[row, frames])
            found.append(Output(velocity[row, frames].flatten(1), frames, time_bins(micro["times"][clip]).expand(len(frames))))
    groups = {"frames": torch.cat([part.frames.clamp(max=1) for part in found]), "level": torch.cat([p.levels for p in found])}
    return Forward(torch.cat(losses), groups, lambda: iter(found))
