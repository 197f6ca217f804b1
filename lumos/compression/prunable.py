"""The interface between compression and a network of which units can be skipped and removed.

A stream of states runs through such a network, and every unit adds to it. A stage is a part through which the whole stream
goes, such as a layer. A unit is a stage, or a part of one with a residual connection of its own, such as its attention.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from lumos.errors import UserError, shown
from tokenizer.narrowing import check_narrower, strongest


class Prunable(Protocol):
    """A network of which units can be skipped and removed.

    unit_kinds  {kind of unit: whether units of this kind can be removed}; the first kind is the usual one
    stream_axis axis of the channels in the stream
    width       what `narrowed` can make smaller: {name of a size: its value}
    """

    unit_kinds: ClassVar[Mapping[str, bool]]
    stream_axis: ClassVar[int]
    width: Mapping[str, int]

    def units(self, kind: str | None = None) -> dict[str, tuple[str, ...]]:
        """Return {name of a unit: names of the parameters that it owns} of a kind, in the order of execution.

        None stands for the first kind.
        """

    def stages(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return {name of a stage: its modules} in the order of execution.

        A module takes the stream as its first argument and returns it. The name of a part of a stage begins with
        "<name of the stage>.".
        """

    def named_plans(self) -> dict[str, tuple[str, ...]]:
        """Return {name of a plan that only networks of this class have: units that it removes}."""

    def skipping(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Skip units within the block: the stream behind a skipped unit is the stream before it.

        Blocks can be nested. Raises UserError for an unknown unit.
        """

    def without(self, names: Collection[str]) -> Self:
        """Return a network without these units, which has the other weights and a config of its own.

        The weights are shared with this network. Raises UserError for a unit that is unknown or cannot be removed.
        """

    def narrowed(self, sizes: Mapping[str, int]) -> Self:
        """Return a network with smaller sizes, which keeps the channels of the largest L2 norm.

        Raises UserError for an unknown size and for one that is not smaller.
        """


def rebuilt(model: Any, changes: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """Return a model of the class of `model`, of transformers, with a changed config and the weights `state`."""
    config = type(model.config)(**{**copy.deepcopy(model.config.to_dict()), **changes})
    config.dtype = model.dtype
    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict(state, assign=True)
    return made.train(model.training)


def check_known(names: Collection[str], known: Collection[str]) -> None:
    """Raise UserError for a name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise UserError(f"there is no unit {shown(name)}; the network has {some(known)}")


def some(names: Collection[str]) -> str:
    """Return the names for a message: all of them, or the first ones and the number of the others."""
    names = list(names)
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} and {len(names) - 10} more"


class PrunableStack:
    """`Prunable` for a model of transformers whose blocks have equal sizes; unit "3" is a block, "3.mlp" a part of it.

    A block has an attribute `skipped`, a set of names of parts, which its forward pass obeys. The model leaves out a block
    whose parts are all skipped.

    stack         name of the nn.ModuleList of the blocks
    parts         {part of a block: names of the modules and parameters that it owns}
    mlp_width     name of the size of the MLPs in the config
    mlp_channels  {parameter of an MLP: axis of the channels between its layers}
    """

    stack: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    unit_kinds: ClassVar[Mapping[str, bool]]
    mlp_width: ClassVar[str]
    mlp_channels: ClassVar[Mapping[str, int]]
    stream_axis: ClassVar[int] = -1

    @property
    def width(self) -> dict[str, int]:
        return {self.mlp_width: getattr(self.config, self.mlp_width)}

    def units(self, kind: str | None = None) -> dict[str, tuple[str, ...]]:
        blocks, usual = self.get_submodule(self.stack), next(iter(self.unit_kinds))
        kind = usual if kind is None else kind
        if kind not in self.unit_kinds:
            raise UserError(f"units {shown(kind)} are unknown; allowed: {', '.join(self.unit_kinds)}")
        found = {}
        for i, block in enumerate(blocks):
            owned = [name for name, _ in block.named_parameters() if kind == usual or self._is_of(name, kind)]
            if owned:
                name = str(i) if kind == usual else f"{i}.{kind}"
                found[name] = tuple(f"{self.stack}.{i}.{parameter}" for parameter in owned)
        return found

    def stages(self) -> dict[str, tuple[nn.Module, ...]]:
        return {str(i): (block,) for i, block in enumerate(self.get_submodule(self.stack))}

    def named_plans(self) -> dict[str, tuple[str, ...]]:
        return {}

    @contextmanager
    def skipping(self, names: Collection[str]) -> Iterator[None]:
        check_known(names, self._all_units())
        blocks = self.get_submodule(self.stack)
        before = [block.skipped for block in blocks]
        for index, _, part in (name.partition(".") for name in names):
            block = blocks[int(index)]
            block.skipped = block.skipped | ({part} if part else self.parts.keys())
        try:
            yield
        finally:
            for block, skipped in zip(blocks, before, strict=True):
                block.skipped = skipped

    def without(self, names: Collection[str]) -> Self:
        check_known(names, self._all_units())
        for name in names:
            if not self.unit_kinds[name.partition(".")[2] or next(iter(self.unit_kinds))]:
                raise UserError(f"unit {name} can be skipped, but not removed: the config of the model has no place for it")
        gone = {int(name) for name in names if "." not in name}
        kept = [i for i in range(len(self.get_submodule(self.stack))) if i not in gone]
        if not kept:
            raise UserError("all layers would be removed; keep at least one")
        lost = [name for name in names if "." in name and int(name.partition(".")[0]) not in gone]
        place = {str(before): str(after) for after, before in enumerate(kept)}
        state = {}
        for name, tensor in self.state_dict().items():
            if not name.startswith(f"{self.stack}."):
                state[name] = tensor
                continue
            index, _, rest = name.removeprefix(f"{self.stack}.").partition(".")
            if index in place and not any(self._is_of(rest, part) for part in self._parts_of(index, lost)):
                state[f"{self.stack}.{place[index]}.{rest}"] = tensor
        return rebuilt(self, self.changes(kept, [f"{place[i]}.{part}" for i, _, part in (n.partition(".") for n in lost)]), state)

    def narrowed(self, sizes: Mapping[str, int]) -> Self:
        check_narrower(sizes, self.width)
        if not sizes:
            return self
        state, before = self.state_dict(), self.width[self.mlp_width]
        for i in range(len(self.get_submodule(self.stack))):
            places = {f"{self.stack}.{i}.mlp.{name}": axis for name, axis in self.mlp_channels.items()}
            axes = {name: axis for name, axis in places.items() if name in state}  # none where the MLP is removed
            if axes:
                weights = [(state[name], axis) for name, axis in axes.items() if state[name].dim() > 1]
                stay = strongest(weights, weights[0][0].shape[weights[0][1]] * sizes[self.mlp_width] // before)
                state |= {name: state[name].index_select(axis, stay.to(state[name].device)) for name, axis in axes.items()}
        return rebuilt(self, dict(sizes), state)

    def changes(self, kept: Sequence[int], lost: Sequence[str]) -> dict[str, Any]:
        """Return the fields of the config that differ when only the blocks `kept` stay, without the parts `lost` of them.

        lost: names of parts with the new numbers of the blocks.
        """
        return {"num_hidden_layers": len(kept)}

    def _is_of(self, name: str, part: str) -> bool:
        return any(name == owned or name.startswith(f"{owned}.") for owned in self.parts[part])

    def _all_units(self) -> list[str]:
        return [name for kind in self.unit_kinds for name in self.units(kind)]

    @staticmethod
    def _parts_of(index: str, lost: Sequence[str]) -> set[str]:
        return {name.partition(".")[2] for name in lost if name.partition(".")[0] == index}
