"""One interface over plain PyTorch on one device and DeepSpeed ZeRO 0 to 3, so that the loop is written once.

Loss accounting: the loop hands `backward` the sum of its losses divided by the number of supervised positions of the
whole global batch, so that gradients of all micro-batches and processes simply add up. An engine must not average
anything on top of that.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lumos.errors import RunError
from lumos.training.settings import TrainingSettings

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA; fp32 elsewhere, where bf16 is many times slower."""
    return PRECISIONS[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


def parameter_groups(model: nn.Module, weight_decay: float, which: str) -> list[dict[str, Any]]:
    """AdamW groups. "matrices": no decay for norms and vectors, whatever shape their weights are stored in; "all": one group."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if which == "all" or (p.ndim >= 2 and "norm" not in name)]
    kept = {id(p) for p in decayed}
    rest = [p for p in parameters.values() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: TrainingSettings, device: torch.device) -> torch.optim.AdamW:
    training = settings.training
    groups = parameter_groups(model, training.weight_decay, training.decay_parameters)
    return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, eps=training.eps, fused=device.type in ("cpu", "cuda"))


def start_processes(settings: TrainingSettings, device: torch.device) -> None:
    """Connect the processes of a DeepSpeed run; nothing to do for plain PyTorch."""
    if device.type == "cpu":
        # Other libraries import DeepSpeed too, which without this warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if settings.zero_stage is not None:
        from lumos.training.deepspeed_engine import connect

        connect(device)


class Engine(Protocol):
    """What the loop needs of an engine; `PlainEngine` documents the methods. `kind` says whose checkpoints it can read."""

    rank: int
    world: int
    kind: str
    device: torch.device
    model: nn.Module  # to call forward on
    module: nn.Module  # the bare model

    def autocast(self) -> contextlib.AbstractContextManager: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self, lr: float) -> float: ...
    def all_sum(self, values: Tensor) -> Tensor: ...
    def barrier(self) -> None: ...
    def local_parameters(self) -> dict[str, Tensor]: ...
    def parameters_changed(self) -> None: ...
    def gathered(self) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: dict[str, Tensor]) -> None: ...
    def save_files(self, folder: Path) -> None: ...
    def load_files(self, folder: Path) -> None: ...


def make_engine(model: nn.Module, settings: TrainingSettings, device: torch.device) -> Engine:
    """The engine that the settings and the launcher ask for."""
    stage = settings.zero_stage
    if stage is None:
        return PlainEngine(model, settings, device)
    from lumos.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, settings, device, stage)


class PlainEngine:
    """One process, one device. Weights stay fp32; bf16 is autocast."""

    rank, world, kind = 0, 1, "plain"

    def __init__(self, model: nn.Module, settings: TrainingSettings, device: torch.device):
        self.device, self.clip = device, settings.training.clip_grad
        self.precision = pick_precision(settings.training.precision, device)
        self.module = model.to(device)
        self.model = self.module
        self.optimizer = make_optimizer(self.module, settings, device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the one before `step`."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Clip, update, forget the gradients; returns the norm before clipping.

        RunError, before the update, if the norm is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or math.inf))
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        return values

    def barrier(self) -> None:
        pass

    def local_parameters(self) -> dict[str, Tensor]:
        """This process's share of the weights by name, as tensors that can be written to."""
        return {name: p.data for name, p in self.module.named_parameters()}

    def parameters_changed(self) -> None:
        """To be called after writing to local_parameters."""

    def gathered(self) -> dict[str, Tensor]:
        """A copy of the whole weights on the CPU in fp32; with several processes only on rank 0."""
        return {name: p.detach().cpu().to(torch.float32, copy=True) for name, p in self.module.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs, by name."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        tensors = {f"model.{name}": p for name, p in self.local_parameters().items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in state.items()}

    def save_files(self, folder: Path) -> None:
        """Engine files of its own beside the common ones; none here."""

    def load_files(self, folder: Path) -> None:
        """Counterpart of `save_files`."""
