"""One interface over plain PyTorch on one device and DeepSpeed ZeRO 0 to 3, so that the loop is written once.

Loss accounting: the loop hands `backward` the sum of its losses divided by the number of supervised positions of the
whole global batch, so that gradients of all micro-batches and processes simply add up. An engine must not average
anything on top of that.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumos.errors import RunError
from lumos.training.checkpoint import WEIGHT, Stored, key
from lumos.training.muon import Muon, layer_matrices
from lumos.training.settings import TrainingSettings, world_size

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of each weight in AdamW, in Muon only the first, beside the number of updates that all weights share."""
LOST = re.compile(r"Connection (closed|reset|refused|timed out)|Broken pipe|[Tt]imed out|Timeout|gloo|NCCL|Socket")
"""In the messages with which torch's communication fails when a process is gone."""


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA; fp32 elsewhere, where bf16 is many times slower on most CPUs."""
    return PRECISIONS[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


def parameter_groups(
    model: nn.Module, weight_decay: float, which: str, matrices: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups by decay, by optimizer and by learning rate.

    Muon's are the weights named in `matrices`, with the learning rate of the run times the number there ("lr_scale").
    "matrices": no decay for norms and vectors, whatever shape their weights are stored in; "all": for every weight.
    """
    groups: dict[tuple[float, float | None], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = which == "all" or (p.ndim >= 2 and "norm" not in name)
            groups[weight_decay if decayed else 0.0, (matrices or {}).get(name)].append(p)
    return [
        {"params": params, "weight_decay": decay, "muon": scale is not None, "lr_scale": 1.0 if scale is None else scale}
        for (decay, scale), params in groups.items()
    ]


def make_optimizer(
    model: nn.Module, settings: TrainingSettings, device: torch.device, matrices: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW or, with training.optimizer=muon, Muon for `matrices` (as in `parameter_groups`; None: those of linear layers)."""
    training = settings.training
    if training.optimizer == "muon":
        matrices = dict.fromkeys(layer_matrices(model), 1.0) if matrices is None else matrices
    else:
        matrices = None
    groups = parameter_groups(model, training.weight_decay, training.decay_parameters, matrices)
    optimizer = Muon if matrices else torch.optim.AdamW
    return optimizer(groups, lr=training.lr, betas=training.betas, eps=training.eps, fused=device.type in ("cpu", "cuda"))


@contextlib.contextmanager
def lost_process_reported() -> Iterator[None]:
    """RunError in place of what torch raises if another process died or does not answer."""
    try:
        yield
    except (RunError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if world_size() > 1 and LOST.search(str(error)):
            reason = " ".join(str(error).split())[:300]
            raise RunError(
                f"another process of the run ended or did not answer within deepspeed.timeout_minutes ({reason}); its own message "
                "says why; start the same command again"
            ) from error
        raise


@dataclass(frozen=True)
class Slot:
    """Where a process keeps its run of a parameter.

    Values start .. start + count - 1 of the parameter in its flat order are those of `owner`, the fp32 tensor that AdamW
    updates, from `offset` on.
    """

    owner: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This run [count] of a tensor that is laid out as `owner`, as a view."""
        return tensor.view(-1).narrow(0, self.offset, self.count)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of the optimizer its multiple of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class TrainingEngine:
    """What the loop needs of an engine. Both kinds have `slots`, from which their state is stored and loaded alike."""

    rank: int
    world: int
    kind: str
    device: torch.device
    model: nn.Module  # to call forward on
    module: nn.Module  # the bare model
    adam: torch.optim.AdamW
    stores = True  # False if another process has the same weights and stores them
    prefix = ""  # of the names in checkpoints, which may hold a second network

    def autocast(self) -> contextlib.AbstractContextManager:
        raise NotImplementedError

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the one before `step`."""
        raise NotImplementedError

    def step(self, lr: float) -> float:
        """Clip, update, forget the gradients; returns the norm before clipping, the same in all processes.

        If the norm is not finite, nothing was updated.
        """
        raise NotImplementedError

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        raise NotImplementedError

    def slots(self) -> dict[str, Slot]:
        """This process's runs of the trained weights, by name."""
        raise NotImplementedError

    def weights_changed(self) -> None:
        """To be called after writing to `weights()`."""
        raise NotImplementedError

    def any_of(self, value: bool) -> bool:
        """True if it is true in any process."""
        return float(self.all_sum(torch.tensor([value], dtype=torch.float64))) > 0

    def weights(self) -> dict[str, Tensor]:
        """This process's runs [n] of the fp32 weights, by name, as views that can be written to."""
        return {name: slot.of(slot.owner.data) for name, slot in self.slots().items()}

    def whole(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole trained parameters in fp32 on the CPU, gathered from the parts of all processes.

        `values` holds this process's part, one [n] for each of `weights()`. Call it in all processes;
        only the first gets the result.
        """
        slots, whole = self.slots() if self.stores else {}, {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves nothing in the parameter itself
                flat = torch.zeros(shape.numel())
                if name in slots:
                    flat[slots[name].start :][: slots[name].count] = values[name].float().cpu()
                flat = self.all_sum(flat)
                if self.rank == 0:
                    whole[name] = flat.view(shape)
        return whole

    def state(self) -> dict[str, Tensor]:
        """What `load` needs beside `updates`, under the names that `Stored` reads."""
        slots = self.slots()
        tensors = self.labelled(WEIGHT, self.weights())
        for kind in MOMENTS:
            states = {name: (slot, self.adam.state.get(slot.owner, {})) for name, slot in slots.items()}
            tensors |= self.labelled(kind, {n: slot.of(state[kind]) for n, (slot, state) in states.items() if kind in state})
        return tensors

    def load(self, stored: Stored, updates: int) -> None:
        """Take over a checkpoint, whichever engine wrote it."""
        with torch.no_grad():
            self.fill(stored, WEIGHT, self.weights())
            slots = self.slots()
            if updates:
                muon = {id(p) for group in self.adam.param_groups if group.get("muon") for p in group["params"]}
                # A weight that the losses do not reach has no gradient, and so no state.
                slots = {name: slot for name, slot in slots.items() if stored.has(MOMENTS[0], self.prefix + name)}
                for owner in {id(slot.owner): slot.owner for slot in slots.values()}.values():
                    count = torch.tensor(float(updates), device=owner.device)
                    kinds = MOMENTS[:1] if id(owner) in muon else MOMENTS
                    self.adam.state[owner] = {"step": count} | {kind: torch.zeros_like(owner) for kind in kinds}
                for kind in MOMENTS:
                    states = {name: (slot, self.adam.state[slot.owner]) for name, slot in slots.items()}
                    self.fill(stored, kind, {n: slot.of(state[kind]) for n, (slot, state) in states.items() if kind in state})
            self.weights_changed()

    @property
    def updates(self) -> int:
        """How often the weights were updated."""
        return max((int(state["step"]) for state in self.adam.state.values()), default=0)

    def labelled(self, kind: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """One value [n] for each of `weights()`, under the names of a checkpoint; empty where another process stores them."""
        slots = self.slots() if self.stores else {}
        return {key(kind, self.prefix + name, slots[name].start): tensor for name, tensor in values.items() if name in slots}

    def fill(self, stored: Stored, kind: str, values: dict[str, Tensor]) -> None:
        """Read them, one [n] for each of `weights()`, from a checkpoint."""
        slots = self.slots()
        for name, value in values.items():
            slot = slots[name]
            value.copy_(stored.read(kind, self.prefix + name, slot.start, slot.count))

    def put(self, whole: Mapping[str, Tensor]) -> None:
        """Take over whole weights, by name; those that are not named stay."""
        slots, weights = self.slots(), self.weights()
        for name, value in whole.items():
            if name in weights:
                weights[name].copy_(value.detach().flatten()[slots[name].start :][: slots[name].count])
        self.weights_changed()


class PlainEngine(TrainingEngine):
    """One process, one device. Weights stay fp32; bf16 is autocast."""

    rank, world, kind = 0, 1, "plain PyTorch"

    def __init__(
        self, model: nn.Module, settings: TrainingSettings, device: torch.device, matrices: Mapping[str, float] | None = None
    ):
        self.device, self.clip = device, settings.training.clip_grad
        self.precision = pick_precision(settings.training.precision, device)
        self.module = model.to(device)
        self.model = self.module
        self.adam = make_optimizer(self.module, settings, device, matrices)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or math.inf))
        if math.isfinite(norm):
            set_learning_rate(self.adam, lr)
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def all_sum(self, values: Tensor) -> Tensor:
        return values

    def slots(self) -> dict[str, Slot]:
        return whole_slots(self.module)

    def weights_changed(self) -> None:
        pass


def whole_slots(module: nn.Module) -> dict[str, Slot]:
    """Return the slots of a process that holds all parameters unsharded."""
    return {name: Slot(p, 0, 0, p.numel()) for name, p in module.named_parameters() if p.requires_grad}
