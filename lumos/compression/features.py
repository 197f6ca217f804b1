"""The blocks of two networks that are compared, and their outputs in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from lumos.errors import UserError, shown
from lumos.settings import is_whole

Key = TypeVar("Key", bound=Hashable)
MOST = 2**16


def chosen_layers(count: int, layers: Any, name: str = "layers") -> list[int]:
    """Return the numbers, ascending, of the layers out of `count` that are compared.

    layers: "all"; "last"; or n for every n-th, so that the last one is among them. name: what it is called in the message.

    Raises UserError for other values.
    """
    every = {"all": 1, "last": max(1, count)}.get(layers) if isinstance(layers, str) else layers
    if not is_whole(every) or not 1 <= every <= MOST:
        raise UserError(f"{name} is {shown(layers)}; allowed: all, last, or a whole number from 1 to {MOST}")
    return list(range(count))[::-1][::every][::-1]


@contextmanager
def tapped(
    modules: Mapping[Key, nn.Module], form: Callable[[Any], Tensor] = lambda output: output
) -> Iterator[dict[Key, Tensor]]:
    """Yield a dict that each forward pass within the block fills: {key of a module: form(its output)}."""
    found: dict[Key, Tensor] = {}

    def hook(key: Key) -> Any:
        return lambda module, args, output: found.__setitem__(key, form(output))

    hooks = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


class _Enough(Exception):
    """Ends a forward pass behind the last block whose output is wanted."""


@contextmanager
def tapped_first(
    modules: Mapping[Key, nn.Module], form: Callable[[Any], Tensor] = lambda output: output
) -> Iterator[dict[Key, Tensor]]:
    """Do the same as `tapped` for a single forward pass, the last one of the block, which ends behind the last module.

    What a network computes behind it would cost time and is not used. modules: in the order of execution.
    """

    def end(*_: Any) -> None:
        raise _Enough

    with suppress(_Enough), tapped(modules, form) as found:
        handle = list(modules.values())[-1].register_forward_hook(end)  # behind the hook that takes the output
        try:
            yield found
        finally:
            handle.remove()
