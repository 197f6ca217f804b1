"""U-Nets of diffusers without some of their slots, or without a middle block, that stock classes cannot express.

This module imports diffusers. `lumos.compression.unets` gives its classes without that import, until one is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import UNet3DConditionModel, UNetSpatioTemporalConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PREFIX = "Pruned"
"""The prefix of the class name and of the block types in a config.

The prefix of the block types makes stock classes fail. Without it they would load the weights and add a
middle block of random numbers, with a warning only.
"""


class Through(nn.Module):
    """Stands for a removed module: it returns its input, in a tuple where the caller asks for one."""

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Tensor | tuple[Tensor]:
        return hidden_states if return_dict else (hidden_states,)


class Shortcut(nn.Module):
    """Stands for a residual block whose residual branch was removed: the shortcut alone, which may change the width."""

    def __init__(self, conv_shortcut: nn.Module):
        super().__init__()
        self.conv_shortcut = conv_shortcut

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.conv_shortcut(hidden_states)


def reduce_slot(block: nn.Module, slot: int) -> None:
    """Leave of one slot of a down or up block only the shortcut of its residual block, in place."""
    resnet = block.resnets[slot]
    shortcut = getattr(resnet, "spatial_res_block", resnet).conv_shortcut
    block.resnets[slot] = Through() if shortcut is None else Shortcut(shortcut)
    for kind in ("temp_convs", "attentions", "temp_attentions"):
        if hasattr(block, kind):
            getattr(block, kind)[slot] = Through()


def keep_slots(block: nn.Module, slots: Sequence[int]) -> None:
    """Leave only some slots of a down or up block, in place."""
    for kind in ("resnets", "temp_convs", "attentions", "temp_attentions"):
        if hasattr(block, kind):
            setattr(block, kind, nn.ModuleList(getattr(block, kind)[slot] for slot in slots))


def arguments_of(stock: type[nn.Module]) -> Callable[[Callable], Callable]:
    """Return a decorator that gives an `__init__` the arguments of a stock class and two of its own.

    diffusers reads the signature to know which entries of a config a class takes. Deriving it keeps the
    classes below valid when a release of diffusers adds an argument.
    """

    def decorate(init: Callable) -> Callable:
        arguments = list(inspect.signature(stock.__init__).parameters.values())
        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
               for name, default in (("mid_block", None), ("reduced", ()))]  # fmt: skip
        init.__signature__ = inspect.Signature([*arguments, *own])
        return register_to_config(init)

    return decorate


class _Pruned:
    """Part of both classes below: it finds the middle block, although the config has an entry of that name.

    A model of diffusers otherwise answers `unet.mid_block` with the entry of its config.
    """

    @property
    def mid_block(self) -> nn.Module:
        return self._modules["mid_block"]


class PrunedUNetSpatioTemporalConditionModel(_Pruned, UNetSpatioTemporalConditionModel):
    """An SVD-type U-Net whose middle block or slots were removed. Calls and outputs are those of the stock class.

    Args:
        down_block_types: those of the stock class, each with the prefix "Pruned".
        layers_per_block: the number of slots of each down block; the up block of the same stage has one more.
        mid_block: None if the model has no middle block, "whole" if it has one.
        reduced: the slots that keep only their shortcut, for example "up_blocks.1.0".
    """

    @arguments_of(UNetSpatioTemporalConditionModel)
    def __init__(self, *, mid_block: str | None = None, reduced: Sequence[str] = (), **stock: Any):
        types = stock["down_block_types"]
        super().__init__(**{**stock, "down_block_types": [name.removeprefix(PREFIX) for name in types]})
        _prune(self, mid_block, reduced)
        self.register_to_config(down_block_types=types)


class PrunedUNet3DConditionModel(_Pruned, UNet3DConditionModel):
    """A ModelScope-type U-Net whose middle block or slots were removed. Calls and outputs are those of the stock class.

    Args: see `PrunedUNetSpatioTemporalConditionModel`. `layers_per_block` is a list here; in the stock class
    it is one number for all blocks.
    """

    @arguments_of(UNet3DConditionModel)
    def __init__(self, *, mid_block: str | None = None, reduced: Sequence[str] = (), **stock: Any):
        types, layers = stock["down_block_types"], stock["layers_per_block"]
        most = max(layers)
        super().__init__(
            **{**stock, "down_block_types": [name.removeprefix(PREFIX) for name in types], "layers_per_block": most}
        )
        for down, up, count in zip(self.down_blocks, reversed(self.up_blocks), layers, strict=True):
            keep_slots(down, range(count))
            keep_slots(up, [*range(count), most] if count else [0])
        _prune(self, mid_block, reduced)
        self.register_to_config(down_block_types=types, layers_per_block=layers)


def _prune(unet: nn.Module, mid_block: str | None, reduced: Sequence[str]) -> None:
    if mid_block is None:
        unet.mid_block = Through()
    for unit in reduced:
        blocks, number, slot = unit.split(".")
        reduce_slot(getattr(unet, blocks)[int(number)], int(slot))
