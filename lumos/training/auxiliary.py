"""The second network of a task, with an engine and an optimizer of its own: a critic that is trained beside the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lumos.errors import UserError
from lumos.training.checkpoint import AUXILIARY
from lumos.training.engine import TrainingEngine
from lumos.training.launch import make_engine
from lumos.training.loss_sums import LossSums
from lumos.training.settings import TrainingSettings
from lumos.training.task import TrainingTask


class Auxiliary:
    """The auxiliary network of a task, on the engine that the settings select.

    Raises UserError for ZeRO 3, which would split the network over processes.
    """

    def __init__(self, network: nn.Module, task: TrainingTask, settings: TrainingSettings, device: torch.device):
        if settings.zero_stage == 3:
            raise UserError(
                f"the training of {settings.generator} has a second network, which ZeRO 3 cannot hold; set deepspeed.zero_stage=2"
            )
        self.task = task
        self.settings = replace(settings, training=replace(settings.training, **task.auxiliary_optimization()))
        self.engine = make_engine(network, self.settings, device)
        self.engine.prefix = AUXILIARY

    def step(self, model: TrainingEngine, micro_batches: list[dict[str, Any]], clips: int, lr: float) -> tuple[LossSums, float]:
        """Update the network for the mean loss of all clips; return the sums of the losses and the norm of the gradient.

        clips: the number of clips in all processes. If the norm is not finite, no weight was updated.
        """
        sums = LossSums({})
        with without_gradient(model.module):
            for i, micro in enumerate(micro_batches):
                with self.engine.autocast():
                    losses = self.task.auxiliary_losses(model.model, self.engine.model, micro)
                sums.add(losses, {})
                total = losses.sum() / clips
                self.engine.backward(total if sums.table.isfinite().all() else total * math.nan, last=i + 1 == len(micro_batches))
        sums = sums.over_processes(self.engine)
        if (found := int(sums.table[1, 0])) != clips:
            name = type(self.task).__name__
            raise TypeError(f"{name}.auxiliary_losses gave {found} losses for {clips} clips; it must give one each")
        return sums, self.engine.step(lr)


@contextmanager
def without_gradient(module: nn.Module) -> Iterator[None]:
    """Within the block, losses have no gradient for the module's parameters, to which other losses give gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
