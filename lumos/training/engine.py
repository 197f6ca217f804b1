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
from collections.abc import Collection, Iterator, Mapping, Sequence
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
"""Names of the tensors that AdamW keeps for each weight; Muon keeps only the first. All weights share the number of updates."""
FACTORS = ("row_var", "col_var", "variance")
"""Names of the tensors that Adafactor keeps: the first two for each matrix, the last for each vector."""
LEAST_SIZE = 1.0
"""Epsilon 2 of torch's Adafactor, which multiplies lr by the root mean square (RMS) of each weight, but at least by this.

With 1, lr is the RMS of an update, as large as AdamW's, unless the weights are above 1. With torch's default, 1e-3, the many
weights that begin at 0 would hardly move."""
LOST = re.compile(r"Connection (closed|reset|refused|timed out)|Broken pipe|[Tt]imed out|Timeout|gloo|NCCL|Socket")
"""Matches the messages of torch's communication when another process is gone."""


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a precision by name.

    "auto" is bf16 on CUDA and fp32 elsewhere, because bf16 is many times slower on most CPUs.
    """
    return PRECISIONS[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


def parameter_groups(
    model: nn.Module, weight_decay: float, which: str, matrices: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the trained weights as groups of an optimizer: one for each weight decay, optimizer and learning rate.

    which: "all" for decay of every weight; "matrices" for no decay of norms and vectors, whatever shape their weights
    are stored in. matrices: the weights that Muon updates, by name, and the factor of their learning rate ("lr_scale").
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
) -> torch.optim.Optimizer:
    """Return the optimizer that training.optimizer names: AdamW, Adafactor, or Muon for `matrices` and AdamW for other weights.

    `parameter_groups` explains `matrices`. If it is None, Muon updates the weights of the linear layers.
    """
    training = settings.training
    if training.optimizer == "muon":
        matrices = dict.fromkeys(layer_matrices(model), 1.0) if matrices is None else matrices
    else:
        matrices = None
    groups = parameter_groups(model, training.weight_decay, training.decay_parameters, matrices)
    if training.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=training.lr, eps=(training.eps, LEAST_SIZE))
    kind = Muon if matrices else torch.optim.AdamW
    optimizer = kind(groups, lr=training.lr, betas=training.betas, eps=training.eps, fused=device.type in ("cpu", "cuda"))
    if matrices:
        optimizer.half = pick_precision(training.precision, device) == torch.bfloat16
    return optimizer


def factor_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that Adafactor keeps for a weight, by name.

    A weight of more than two dimensions counts as many matrices, of its last two dimensions.
    """
    if len(shape) < 2:
        return {"variance": tuple(shape)}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


@contextlib.contextmanager
def lost_process_reported() -> Iterator[None]:
    """Within the block, raise RunError in place of torch's error when another process has died or does not answer."""
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
    """The place in which a process keeps its part of a parameter.

    The part is the values start .. start + count - 1 of the parameter in its flat order. They are stored in `owner`,
    the fp32 tensor that the optimizer updates, from `offset` on.
    """

    owner: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part [count] of a tensor that is laid out as `owner`, as a view."""
        return tensor.view(-1).narrow(0, self.offset, self.count)

    def of_state(self, kind: str, tensor: Tensor) -> Tensor:
        """Return this part of a tensor of the optimizer, flat, as a view. Adafactor has whole weights, so that it is all of it."""
        return tensor.view(-1) if kind in FACTORS else self.of(tensor)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class TrainingEngine:
    """The interface of the engines that the loop uses. Their states are stored and loaded in one way, by means of `slots`."""

    rank: int
    world: int
    kind: str
    device: torch.device
    model: nn.Module  # its forward is called
    module: nn.Module  # the model without the wrapper of DeepSpeed
    inner: torch.optim.Optimizer  # without the wrapper of DeepSpeed
    stores = True  # False if another process has the same weights and stores them
    prefix = ""  # begins the names in checkpoints; not empty for a second network

    def autocast(self) -> contextlib.AbstractContextManager:
        raise NotImplementedError

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the one before `step`."""
        raise NotImplementedError

    def step(self, lr: float) -> float:
        """Clip the gradients, update the weights and delete the gradients.

        Returns the norm of the gradient before clipping, which is the same in all processes. If it is not
        finite, no weight was updated.
        """
        raise NotImplementedError

    def all_sum(self, values: Tensor) -> Tensor:
        """Return the sum of the values over all processes."""
        raise NotImplementedError

    def slots(self) -> dict[str, Slot]:
        """Return the places of this process's parts of the trained weights, by name."""
        raise NotImplementedError

    def weights_changed(self) -> None:
        """Pass values that were written to `weights()` on to the model. Call this after writing to them."""
        raise NotImplementedError

    def any_of(self, value: bool) -> bool:
        """Return whether `value` is true in any process."""
        return float(self.all_sum(torch.tensor([value], dtype=torch.float64))) > 0

    def weights(self) -> dict[str, Tensor]:
        """Return this process's parts [n] of the fp32 weights, by name, as views that can be written to."""
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
        """Return the tensors that `load` needs, by the keys under which `Stored` reads them."""
        tensors = self.labelled(WEIGHT, self.weights())
        for kind in (*MOMENTS, *FACTORS):
            tensors |= self.labelled(kind, self._state_of(kind))
        return tensors

    def load(self, stored: Stored, updates: int) -> None:
        """Load a checkpoint of any engine. updates: the number of updates of its weights."""
        with torch.no_grad():
            self.fill(stored, WEIGHT, self.weights())
            if updates:
                # A weight that the losses do not reach has no gradient, and so no state.
                kinds = (*MOMENTS, *FACTORS)
                names = {name for name in self.slots() if any(stored.has(kind, self.prefix + name) for kind in kinds)}
                self._make_state(names, updates)
                for kind in kinds:
                    self.fill(stored, kind, {name: part for name, part in self._state_of(kind).items() if name in names})
            self.weights_changed()

    def _state_of(self, kind: str) -> dict[str, Tensor]:
        """Return this process's parts of the optimizer's tensors of a kind, by name of the weight, as views."""
        states = {name: (slot, self.inner.state.get(slot.owner, {})) for name, slot in self.slots().items()}
        return {name: slot.of_state(kind, state[kind]) for name, (slot, state) in states.items() if kind in state}

    def _make_state(self, names: Collection[str], updates: int) -> None:
        """Give the optimizer the state of these weights after a number of updates, with tensors of zeros."""
        is_factored = isinstance(self.inner, torch.optim.Adafactor)
        muon = {id(p) for group in self.inner.param_groups if group.get("muon") for p in group["params"]}
        for owner in {id(slot.owner): slot.owner for name, slot in self.slots().items() if name in names}.values():
            if is_factored:
                shapes = factor_shapes(owner.shape)
            else:
                shapes = dict.fromkeys(MOMENTS[:1] if id(owner) in muon else MOMENTS, owner.shape)
            count = torch.tensor(float(updates), device="cpu" if is_factored else owner.device)
            self.inner.state[owner] = {"step": count} | {kind: owner.new_zeros(shape) for kind, shape in shapes.items()}

    @property
    def updates(self) -> int:
        """The number of updates of the weights."""
        return max((int(state["step"]) for state in self.inner.state.values()), default=0)

    def labelled(self, kind: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return values, one [n] for each of `weights()`, by their keys in a checkpoint.

        The result is empty in a process whose weights another process stores.
        """
        slots = self.slots() if self.stores else {}
        return {key(kind, self.prefix + name, slots[name].start): tensor for name, tensor in values.items() if name in slots}

    def fill(self, stored: Stored, kind: str, values: dict[str, Tensor]) -> None:
        """Fill `values`, one [n] for each of `weights()`, from a checkpoint."""
        slots = self.slots()
        for name, value in values.items():
            if kind in FACTORS:  # of the whole weight
                stored.check_size(kind, self.prefix + name, value.numel())
            value.copy_(stored.read(kind, self.prefix + name, slots[name].start, value.numel()))

    def put(self, whole: Mapping[str, Tensor]) -> None:
        """Set weights to whole tensors, given by name; other weights stay as they are."""
        slots, weights = self.slots(), self.weights()
        for name, value in whole.items():
            if name in weights:
                weights[name].copy_(value.detach().flatten()[slots[name].start :][: slots[name].count])
        self.weights_changed()


class PlainEngine(TrainingEngine):
    """The engine for one process on one device. Weights are fp32; bf16 is used by autocast."""

    rank, world, kind = 0, 1, "plain PyTorch"

    def __init__(
        self, model: nn.Module, settings: TrainingSettings, device: torch.device, matrices: Mapping[str, float] | None = None
    ):
        self.device, self.clip = device, settings.training.clip_grad
        self.precision = pick_precision(settings.training.precision, device)
        self.module = model.to(device)
        self.model = self.module
        self.inner = make_optimizer(self.module, settings, device, matrices)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or math.inf))
        if math.isfinite(norm):
            set_learning_rate(self.inner, lr)
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
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
