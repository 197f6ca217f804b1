"""Learned gates: a number for each unit that says how much a network needs it beside the others.

Unit l has a gate g_l in {0, 1}, which is 1 with the probability p_l = sigmoid(a_l). The stream behind the unit is
x + g_l (f(x) - x), where f(x) is what the unit makes of the stream x. The logits a are trained for some steps, and nothing
else is, to lower

    L(g) / |L(no unit) - L(all units)|  +  sparsity x mean p

with the gradient of g straight through to p (arXiv 1308.3432). With sparsity 1, a unit is worth its gate if it lowers the loss
by more than the mean share of a unit. Differentiable choices of layers are those of TinyFusion (arXiv 2412.01199), which draws
a fixed number of each group of layers and trains adapters along with them; here gates are independent and weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumos.compression.prunable import Prunable
from lumos.errors import UserError

START = 2.0
"""The logits at the start: each unit is open in 88 % of the steps."""


@dataclass(frozen=True)
class GateSettings:
    """Settings of the training of gates: steps, weight of the penalty, learning rate of Adam, and seed of the draws."""

    steps: int = 200
    sparsity: float = 1.0
    lr: float = 0.05
    seed: int = 0


def learned_gates(
    probe: Any, model: Prunable, batches: Sequence[dict[str, Any]], units: Sequence[str], settings: GateSettings,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Return {unit: p}, the probabilities that the gates of units are open after training; the lowest matters least.

    Args:
        probe: as for `importance.score`.
        model: in eval mode. Its weights, flags and gradients stay as they are.
        batches: micro-batches of the probe, which the steps take in turn.
        units: names of whole layers.
        on_step: called after each step.

    Raises UserError for units that are parts of layers.
    """
    stages = model.stages()
    if parts := [name for name in units if name not in stages]:
        raise UserError(f"the measure learned puts gates around whole layers, which {parts[0]} is not; leave learned out")
    generator = torch.Generator().manual_seed(settings.seed)
    device = next(model.parameters()).device
    with frozen(model):
        with torch.no_grad():
            whole = mean_loss(probe, model, batches[0])
            with model.skipping(units):
                scale = abs(float(mean_loss(probe, model, batches[0]) - whole)) or 1.0
        logits = torch.full((len(units),), START, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=settings.lr)
        for step in range(settings.steps):
            p = torch.sigmoid(logits)
            drawn = (torch.rand(len(units), generator=generator).to(device) < p).float()
            with torch.enable_grad(), gated(model, units, drawn + p - p.detach()):
                loss = mean_loss(probe, model, batches[step % len(batches)]) / scale + settings.sparsity * p.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_step()
    return dict(zip(units, torch.sigmoid(logits.detach()).tolist(), strict=True))


def mean_loss(probe: Any, model: nn.Module, micro: dict[str, Any]) -> Tensor:
    """Return the mean loss of a micro-batch."""
    return probe.forward(model, micro).losses.float().mean()


@contextmanager
def gated(model: Prunable, units: Sequence[str], gates: Tensor) -> Iterator[None]:
    """Within the block, multiply what each unit adds to the stream by its gate. gates: [number of units]."""
    stages, handles = model.stages(), []
    for i, name in enumerate(units):
        before: list[Tensor] = []

        def start(module: nn.Module, args: tuple, before: list[Tensor] = before) -> None:
            before.append(args[0])

        def end(module: nn.Module, args: tuple, out: Tensor, before: list[Tensor] = before, i: int = i) -> Tensor:
            stream = before.pop()
            return stream + gates[i].to(out.dtype) * (out - stream)

        handles += [stages[name][0].register_forward_pre_hook(start), stages[name][-1].register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no weight needs a gradient."""
    needed = {name: weight.requires_grad for name, weight in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.requires_grad_(needed[name])
