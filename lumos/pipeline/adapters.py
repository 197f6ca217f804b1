"""LoRA adapters of a loaded pipeline, with the method names of diffusers: load, set with scales, unload.

An adapter is kept as the difference that it makes to each weight, in float32 in host memory. The weights of the
network become the original ones plus the sum of scale times difference. So a clip takes as long as without adapters,
any code that reads weights works, and without adapters the weights are again exactly the original ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from lumos.data.trained_on import TrainedOn, read_trained_on
from lumos.errors import UserError, instead, shown
from lumos.lora import fingerprints, merge_adapter
from lumos.pipeline.acceleration import has_int8_weights
from lumos.pipeline.hub import local_folder
from lumos.pipeline.placement import is_spread
from lumos.settings import is_finite


@dataclass
class Adapters:
    """The adapters of a pipeline: the differences of each by its name, their scales, and the original weights that they change.

    trained_on is that of the model without adapters, learned_from that of each adapter by its name.
    """

    differences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)
    trained_on: TrainedOn | None = None
    learned_from: dict[str, TrainedOn | None] = field(default_factory=dict)
    are_on: bool = True

    def apply(self, model: nn.Module) -> None:
        """Set the weights of the model by the scales."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.original.items():
                parts = [(self.scales.get(key, 0.0), found[name]) for key, found in self.differences.items() if name in found]
                used = [scale * difference for scale, difference in parts if scale and self.are_on]
                parameters[name].copy_(weight.float() + sum(used) if used else weight)

    def all_trained_on(self) -> TrainedOn | None:
        """Return what the model with its adapters was trained on; None if that of the model is not known."""
        found = self.trained_on
        for own in self.learned_from.values() if found is not None else ():
            found = found.joined(own)
        return found

    def copied(self) -> Adapters:
        """Return a copy with the same tensors, which nothing changes in place."""
        dicts = ("differences", "scales", "original", "learned_from")
        return replace(self, **{name: dict(getattr(self, name)) for name in dicts})


class HasAdapters:
    """The methods of a pipeline on adapters. `tokenizer_folders` are the places of its video and its text tokenizer."""

    model: nn.Module
    trained_on: TrainedOn | None
    tokenizer_folders: tuple[str | Path, str | Path] | None = None
    _adapters: Adapters | None = None

    def load_lora_weights(self, folder: str | Path, adapter_name: str | None = None) -> None:
        """Load an adapter folder, which a run with lora.rank exports, and use it with scale 1, beside those loaded before.

        The folder may be a repository ORG/NAME on the Hugging Face hub. Loading takes the memory of three copies of the network in
        float32. UserError if the adapter does not fit the model, if the name is taken, and for a network with int8 weights or a
        device_map.
        """
        folder = local_folder(folder)
        if is_spread(self.model) or has_int8_weights(self.model):
            raise UserError("adapters need the whole network in one place, without int8; leave device_map and int8 out")
        if self.tokenizer_folders is None:
            raise UserError("adapters are checked against the tokenizers' files; load the pipeline with from_pretrained first")
        found = self._adapters or Adapters(trained_on=self.trained_on)
        free = (f"default_{number}" for number in itertools.count(len(found.differences)))
        name = adapter_name or next(name for name in free if name not in found.differences)
        if name in found.differences:
            raise UserError(f"there is an adapter {shown(name)} already; give another adapter_name, or unload_lora_weights first")
        base = deepcopy(self.model).cpu().float()
        with torch.no_grad():
            for key, weight in found.original.items():
                base.get_parameter(key).copy_(weight)
        before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
        merged = merge_adapter(base, folder, fingerprints(*self.tokenizer_folders))
        changes = ((key, parameter.detach() - before.pop(key)) for key, parameter in merged.named_parameters())
        found.differences[name] = {key: change for key, change in changes if bool(change.any())}
        for key in found.differences[name]:
            found.original.setdefault(key, self.model.get_parameter(key).detach().cpu().clone())
        found.scales[name] = 1.0
        found.learned_from[name] = read_trained_on(folder)
        self._adapters, self.trained_on = found, found.all_trained_on()
        found.apply(self.model)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None) -> None:
        """Use these adapters with these scales, one for all or one for each; None: 1. Other adapters get the scale 0."""
        found, names = self._known(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        scales = [1.0 if weight is None else weight for weight in weights]
        if len(scales) != len(names):
            raise UserError(f"adapter_weights has {len(scales)} scales for {len(names)} adapters; give one for each, or one")
        if wrong := [scale for scale in scales if not is_finite(scale)]:
            raise UserError(f"adapter_weights holds {shown(wrong[0])}; give finite numbers, for example 0.7")
        found.scales = dict.fromkeys(found.differences, 0.0) | dict(zip(names, map(float, scales), strict=True))
        found.apply(self.model)

    def set_scale(self, scale: float) -> None:
        """Use the adapter that was loaded last with this scale. The others keep theirs."""
        scales = self._adapters.scales if self._adapters else {}
        self.set_adapters([*scales], [*list(scales.values())[:-1], scale])

    def copied(self) -> Self:
        """Return a pipeline with a network of its own, whose adapters can be changed alone; the tokenizers are shared."""
        other = copy(self)
        vars(other).pop("_calls_of_threads", None)
        other.model = deepcopy(self.model)
        other._adapters = self._adapters and self._adapters.copied()
        return other

    def _known(self, adapter_names: str | Sequence[str]) -> tuple[Adapters, list[str]]:
        """Return the adapters, and the names as a list; UserError for a name of none."""
        found = self._adapters or Adapters()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if unknown := [name for name in names if name not in found.differences]:
            known = [*found.differences] or ["none"]
            raise UserError(f"there is no adapter {shown(unknown[0])}{instead(unknown[0], known, 'loaded:')}")
        return found, names

    def get_active_adapters(self) -> list[str]:
        """Return the names of the adapters whose scale is not 0; none while they are disabled."""
        if self._adapters is None or not self._adapters.are_on:
            return []
        return [name for name, scale in self._adapters.scales.items() if scale]

    def disable_lora(self) -> None:
        """Use no adapter until `enable_lora`. The adapters stay loaded, with their scales."""
        self._switch(False)

    def enable_lora(self) -> None:
        self._switch(True)

    def _switch(self, on: bool) -> None:
        if self._adapters is not None:
            self._adapters.are_on = on
            self._adapters.apply(self.model)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove these adapters. Those that are left keep their scales."""
        found, names = self._known(adapter_names)
        for name in names:
            found.differences.pop(name, None)
            found.scales.pop(name, None)
            found.learned_from.pop(name, None)
        if self._adapters is not None:
            self.trained_on = found.all_trained_on()
        found.apply(self.model)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. The weights are again those before the first one was loaded."""
        if self._adapters is not None:
            self._adapters.scales = {}
            self._adapters.apply(self.model)
            self.trained_on = self._adapters.trained_on
            self._adapters = None
