"""The gain from history: how much lower the loss of a clip's last frame is because the network reads the frames before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lumos.compression.importance import WHOLE
from lumos.compression.prunable import Prunable
from lumos.compression.trace import Trace
from lumos.training.loss_sums import LossSums
from lumos.training.task import Forward


class HistoryProbe(Protocol):
    """The functions of a training task that the gain from history needs."""

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward: ...

    def with_and_without_history(self, micro: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]: ...


@torch.no_grad()
def history_gains(
    probe: HistoryProbe, model: Prunable, batches: Iterable[Mapping[str, Any]], units: Sequence[str],
    on_pass: Callable[[], object] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Return CE(no history) - CE(history) of the last frame: {WHOLE: of the network, name: of that without the unit}.

    CE is the mean cross-entropy of the codes that are masked in the last frame. Without history, all codes of the frames
    before it are masked.

    Args:
        batches: micro-batches of the probe.
        on_pass: called after each forward pass; there are two for each batch and name.
    """
    names = [WHOLE, *units]
    sums = {name: [LossSums({}), LossSums({})] for name in names}
    for micro in batches:
        for at, part in enumerate(probe.with_and_without_history(micro)):
            trace = Trace(model)
            with trace.recording():
                losses = probe.forward(model, part).losses
            sums[WHOLE][at].add(losses, {})
            on_pass()
            for name in units:
                with trace.replaying(trace.stage_of(name)), model.skipping([name]):
                    sums[name][at].add(probe.forward(model, part).losses, {})
                on_pass()
    return {name: without.mean - history.mean for name, (history, without) in sums.items()}
