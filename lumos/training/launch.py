"""Start of a run: connection of its processes, and choice of the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from lumos.training.engine import PlainEngine, TrainingEngine
from lumos.training.settings import TrainingSettings


def start_processes(settings: TrainingSettings, device: torch.device) -> None:
    """Connect the processes of a DeepSpeed run; do nothing for plain PyTorch."""
    if device.type == "cpu":
        # Other libraries import DeepSpeed too. Without this variable it warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if settings.zero_stage is not None:
        from lumos.training.deepspeed_engine import connect

        connect(device, settings.deepspeed.timeout_minutes)


def make_engine(
    model: nn.Module, settings: TrainingSettings, device: torch.device, matrices: Mapping[str, float] | None = None
) -> TrainingEngine:
    """Return the engine for the ZeRO stage of the settings and for the number of launched processes.

    `matrices` is the argument of `make_optimizer`.
    """
    stage = settings.zero_stage
    if stage is None:
        return PlainEngine(model, settings, device, matrices)
    from lumos.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, settings, device, stage, matrices)
