"""The streams of a forward pass, stage by stage: recorded once, and replayed by passes that differ only from a later stage on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lumos.compression.prunable import Prunable


class Trace:
    """The streams of a network in one forward pass, which may call each stage several times.

    before   {name of a stage that ran: the streams before it, one a call}
    behind   {name of a stage that ran: the streams behind it, one a call}
    seconds  {name of a stage that ran: seconds of all its calls}
    """

    def __init__(self, model: Prunable):
        self.stages = model.stages()
        self.before: dict[str, list[Tensor]] = {}
        self.behind: dict[str, list[Tensor]] = {}
        self.seconds: dict[str, float] = {}
        self._outputs: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the streams of the forward pass in the block."""
        started: dict[nn.Module, float] = {}
        handles = []

        def now(stream: Tensor) -> float:
            if stream.is_cuda:
                torch.cuda.synchronize(stream.device)
            return time.perf_counter()

        for name, modules in self.stages.items():

            def start(module: nn.Module, args: tuple, name: str = name, first: nn.Module = modules[0]) -> None:
                if module is first:
                    self.before.setdefault(name, []).append(args[0])
                started[module] = now(args[0])

            def end(module: nn.Module, args: tuple, out: Tensor, name: str = name, last: nn.Module = modules[-1]) -> None:
                self.seconds[name] = self.seconds.get(name, 0.0) + now(out) - started[module]
                self._outputs.setdefault(module, []).append(out)
                if module is last:
                    self.behind.setdefault(name, []).append(out)

            handles += [module.register_forward_pre_hook(start) for module in modules]
            handles += [module.register_forward_hook(end) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, stage: str) -> Iterator[None]:
        """Let the stages before `stage` return what was recorded in place of running, in a forward pass of the same input."""
        earlier = [module for name in list(self.stages)[: list(self.stages).index(stage)] for module in self.stages[name]]
        for module in earlier:
            recorded = iter(self._outputs.get(module, ()))
            module.forward = lambda *_, recorded=recorded: next(recorded)
        try:
            yield
        finally:
            for module in earlier:
                del module.forward

    def stage_of(self, unit: str) -> str:
        """Return the stage that a unit is, or is a part of; the first one for a unit outside of the stream."""
        inside = (name for name in self.stages if unit == name or unit.startswith(f"{name}."))
        return next(inside, next(iter(self.stages)))
