"""Plans and pruning of video U-Nets of diffusers: SVD-type and ModelScope-type.

A U-Net has stages, one a size. Stage s has the down block s and the up block that works at the same size.
A slot of a block is a residual block with its attention. Each down block passes the output of every slot
on to an up block; an up block of a stage with L slots has L + 1, the last of which reads what entered the
stage. So a slot can be removed from a down block only together with one from the up block of its stage.

The plans are readings of arXiv 2411.18375, whose list of removed blocks is not published:

    vdmini      the second slot of each block, but not in the second-deepest stage; the deepest stage and
                the middle block as a whole
    vdmini-mid  the same with the middle block kept
    B           the second slot of each block, but not in the second-deepest stage; the middle block
    B-mid       the same with the middle block kept
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lumos.compression.diffusers_folder import Pruning, check_units, on_meta
from lumos.errors import UserError

PREFIX = "Pruned"
KINDS = {
    "UNetSpatioTemporalConditionModel": ("resnets", "attentions"),
    "UNet3DConditionModel": ("resnets", "temp_convs", "attentions", "temp_attentions"),
}
"""Stock class -> the lists of a block that have one module a slot, in order of execution."""
CLASSES = (*KINDS, *(f"{PREFIX}{name}" for name in KINDS))
PLANS = ("vdmini", "vdmini-mid", "B", "B-mid")
PER_STAGE = ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim", "attention_head_dim",
             "num_attention_heads", "transformer_layers_per_block")  # fmt: skip
"""Entries of a config that may have one value a stage."""
OF_THE_MIDDLE = ("cross_attention_dim", "attention_head_dim", "num_attention_heads", "transformer_layers_per_block")
"""Entries whose last value is also that of the middle block."""
MID = "mid_block"


def __getattr__(name: str) -> Any:
    """Return a class of `lumos.compression.pruned_unets`; that module imports diffusers."""
    if name.startswith(PREFIX) and name in CLASSES:
        return getattr(import_module("lumos.compression.pruned_unets"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class UNetLayout:
    """The blocks of a U-Net. `widths` and `layers` have one entry a stage: channels, and slots of the down block."""

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    mid: bool = True

    @property
    def stages(self) -> int:
        return len(self.widths)

    def units(self) -> list[str]:
        """Return the names of all slots, in order of execution, with that of the middle block."""
        down = [f"down_blocks.{s}.{k}" for s, count in enumerate(self.layers) for k in range(count)]
        up = [f"up_blocks.{b}.{k}" for b, count in enumerate(reversed(self.layers)) for k in range(count + 1)]
        return [*down, *([MID] if self.mid else []), *up]

    def expanded(self, remove: Iterable[str], where: str) -> set[str]:
        """Return the units that a plan removes; a whole block (`down_blocks.3`) stands for all of its slots.

        Raises UserError for a name that is not one of this U-Net.
        """
        units, remove = self.units(), list(remove)
        blocks = [f"{side}_blocks.{b}" for side in ("down", "up") for b in range(self.stages)]
        check_units(remove, [*units, *blocks], where)
        return {unit for unit in units if unit in remove or unit.rpartition(".")[0] in remove}

    def up(self, stage: int) -> str:
        """Return the name of the up block of a stage."""
        return f"up_blocks.{self.stages - 1 - stage}"


@dataclass(frozen=True)
class Kept:
    """The remaining parts of a U-Net: the parent's slots of each block, in the order of the pruned model.

    `dropped` deepest stages are gone as a whole. `reduced` units keep only their shortcut.
    """

    dropped: int
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: bool
    reduced: frozenset[str]


def plan_units(plan: str, layout: UNetLayout) -> tuple[str, ...]:
    """Return the units that a named plan removes. Raises UserError for a U-Net that the plan does not fit."""
    whole = layout.stages - 2
    deepest = layout.stages - 1
    drops = plan.startswith("vdmini")
    cut = [s for s in range(layout.stages) if s != whole and not (drops and s == deepest)]
    if layout.stages < 2 or any(layout.layers[s] < 2 for s in cut) or not layout.mid:
        raise UserError(f"plan {plan} needs two stages, two slots in each down block and a middle block; this U-Net has the slots "
                        f"{list(layout.layers)}{'' if layout.mid else ' and no middle block'}: give a list of units")  # fmt: skip
    if drops and layout.widths[deepest] != layout.widths[whole]:
        raise UserError(f"plan {plan} removes the deepest stage, which must have the width of the one before it; the widths are "
                        f"{list(layout.widths)}: use plan B, or give a list of units")  # fmt: skip
    slots = [unit for s in cut for unit in (f"down_blocks.{s}.1", f"{layout.up(s)}.1")]
    stage = [f"down_blocks.{deepest}", layout.up(deepest)] if drops else []
    return (*sorted(slots), *stage, *([] if plan.endswith("-mid") else [MID]))


def resolve(layout: UNetLayout, remove: set[str]) -> Kept:
    """Return what is left when units are removed.

    The deepest stage goes as a whole if all of its slots are removed and the next one has its width. Other
    slots go in pairs, one of a down block with one of the up block of its stage, if the widths of all slots
    left still fit. A unit for which that is not possible is reduced to its shortcut.
    """
    stages = layout.stages
    while stages > 1 and _is_removed(layout, stages - 1, remove) and layout.widths[stages - 1] == layout.widths[stages - 2]:
        stages -= 1
    down, up, reduced = [], [], set()
    for s in range(stages):
        kept = [list(range(layout.layers[s])), list(range(layout.layers[s] + 1))]
        asked = [[k for k in slots if f"{block}.{k}" in remove]
                 for block, slots in zip((f"down_blocks.{s}", layout.up(s)), kept, strict=True)]  # fmt: skip
        for d in asked[0].copy():
            for u in asked[1]:
                left = [[k for k in kept[0] if k != d], [k for k in kept[1] if k != u]]
                if _fits(layout, s, s == stages - 1, *left):
                    kept = left
                    asked[0].remove(d)
                    asked[1].remove(u)
                    break
        reduced |= {f"down_blocks.{s}.{k}" for k in asked[0]} | {f"{layout.up(s)}.{k}" for k in asked[1]}
        down.append(tuple(kept[0]))
        up.insert(0, tuple(kept[1]))
    return Kept(layout.stages - stages, tuple(down), tuple(up), layout.mid and MID not in remove, frozenset(reduced))


def _is_removed(layout: UNetLayout, stage: int, remove: set[str]) -> bool:
    blocks = (f"down_blocks.{stage}", layout.up(stage))
    return all(unit in remove for unit in layout.units() if unit.rpartition(".")[0] in blocks)


def _fits(layout: UNetLayout, stage: int, deepest: bool, down: list[int], up: list[int]) -> bool:
    """Return whether slots of a stage read the widths that they were made for. `deepest`: it is the last stage left."""
    width, last = layout.widths[stage], layout.layers[stage]
    entry = layout.widths[max(stage - 1, 0)]
    hidden, skips = entry, [entry]
    for k in down:
        if hidden != (width if k else entry):
            return False
        hidden = width
        skips.append(width)
    if hidden != width:
        return False
    below = layout.widths[min(stage + 1, layout.stages - 1)]
    hidden = width if deepest else below
    for k in up:
        if hidden != (width if k else below) or not skips or skips.pop() != (entry if k == last else width):
            return False
        hidden = width
    return bool(up) and not skips


def stock_class(class_name: str) -> str:
    """Return the class of diffusers of which a class is, or is a subclass."""
    return class_name.removeprefix(PREFIX)


def model_class(class_name: str) -> type:
    """Return one of CLASSES."""
    return __getattr__(class_name) if class_name.startswith(PREFIX) else getattr(import_module("diffusers"), class_name)


def prune(config: Mapping[str, Any], plan: str, remove: Iterable[str] | None = None) -> Pruning:
    """Return what a plan makes of a U-Net.

    Args:
        config: content of its config.json.
        plan: one of PLANS, or the name of a list of units.
        remove: the list of units; None for a named plan.

    Raises UserError for a plan that does not fit the U-Net.
    """
    name = config["_class_name"]
    teacher = on_meta(model_class(name), config)
    layout = _layout(teacher, config)
    removed = tuple(plan_units(plan, layout) if remove is None else remove)
    kept = resolve(layout, layout.expanded(removed, f"plan {plan}"))
    _check_middle(teacher.config, kept, layout.stages)
    before = frozenset(config.get("reduced", ()))
    student_config, stock = _config(config, teacher.config, layout, kept, before)
    student = on_meta(model_class(student_config["_class_name"]), student_config)
    source = _source(kept, stock_class(name), before)
    tensors = {tensor: source(tensor) for tensor in student.state_dict()}
    return Pruning(
        class_name=name, plan=plan, remove=removed, reduced=tuple(sorted(kept.reduced - before)),
        kept={"down_blocks": kept.down, "up_blocks": kept.up, MID: kept.mid},
        config=student_config, tensors=tensors,
        shapes={tensor: tuple(value.shape) for tensor, value in student.state_dict().items()},
        taps=_taps(student, kept, KINDS[stock_class(name)]),
        rows=_rows(teacher, layout, {tensors[parameter] for parameter, _ in student.named_parameters()}), stock=stock,
    )  # fmt: skip


def _layout(unet: Any, config: Mapping[str, Any]) -> UNetLayout:
    layers = [len(block.resnets) for block in unet.down_blocks]
    return UNetLayout(tuple(unet.config["block_out_channels"]), tuple(layers), config.get(MID, "whole") is not None)


def _check_middle(config: Mapping[str, Any], kept: Kept, stages: int) -> None:
    """Raise UserError if the middle block stays, but would be built with other attention than before."""
    for key in OF_THE_MIDDLE if kept.mid and kept.dropped else ():
        value = config.get(key)
        if isinstance(value, list | tuple) and value[-1] != value[stages - kept.dropped - 1]:
            raise UserError(f"the middle block has the {key} of the deepest stage, which other stages do not have ({list(value)}); "
                            f"remove {MID} too, or keep the deepest stage")  # fmt: skip


def _config(
    config: Mapping[str, Any], full: Mapping[str, Any], layout: UNetLayout, kept: Kept, before: frozenset[str]
) -> tuple[dict[str, Any], bool]:
    """Return the config of the pruned U-Net, and whether a stock class loads it. `full` has the values of defaults too."""
    stages, name = layout.stages - kept.dropped, stock_class(config["_class_name"])
    changed: dict[str, Any] = {}
    for key in PER_STAGE:
        value = full.get(key)
        if isinstance(value, list | tuple) and len(value) == layout.stages:
            changed[key] = list(value[kept.dropped :] if key == "up_block_types" else value[:stages])
    layers = [len(slots) for slots in kept.down]
    is_one_number = name == "UNet3DConditionModel"
    reduced = _renamed(kept, kept.reduced | before)
    types = [kind.removeprefix(PREFIX) for kind in changed["down_block_types"]]
    result = {key: value for key, value in config.items() if key not in (MID, "reduced")} | changed
    stock = kept.mid and not reduced and not (is_one_number and len(set(layers)) > 1)
    if stock:
        own = {"_class_name": name, "down_block_types": types, "layers_per_block": layers[0] if is_one_number else layers}
    else:
        own = {"_class_name": f"{PREFIX}{name}", "down_block_types": [f"{PREFIX}{kind}" for kind in types],
               "layers_per_block": layers, MID: "whole" if kept.mid else None, "reduced": reduced}  # fmt: skip
    return result | own, stock


def _renamed(kept: Kept, units: Iterable[str]) -> list[str]:
    """Return the names in the pruned U-Net of those of the parent's units that are left."""
    blocks = [(f"down_blocks.{b}", f"down_blocks.{b}", slots) for b, slots in enumerate(kept.down)]
    blocks += [(f"up_blocks.{b + kept.dropped}", f"up_blocks.{b}", slots) for b, slots in enumerate(kept.up)]
    return [f"{own}.{k}" for parent, own, slots in blocks for k, slot in enumerate(slots) if f"{parent}.{slot}" in units]


def _source(kept: Kept, stock: str, before: frozenset[str]) -> Callable[[str], str]:
    """Return a function from the name of a tensor to that of the parent's tensor."""
    slots_of = {"down": kept.down, "up": kept.up}

    def source(name: str) -> str:
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if found is None:
            return name
        side, block, kind, slot, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        parent = block + (kept.dropped if side == "up" else 0)
        if kind in KINDS[stock]:
            slot = slots_of[side][block][slot]
            unit = f"{side}_blocks.{parent}.{slot}"
            if unit in kept.reduced - before and stock == "UNetSpatioTemporalConditionModel":
                rest = f"spatial_res_block.{rest}"  # the shortcut of the spatial half of the residual block
        return f"{side}_blocks.{parent}.{kind}.{slot}.{rest}"

    return source


def _taps(student: Any, kept: Kept, kinds: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of modules (pruned, parent) whose outputs match: all blocks.

    The last down block has lost its sampler if a stage is gone; the output of its last slot is taken instead.
    """
    down = [(f"down_blocks.{b}",) * 2 for b in range(len(kept.down))]
    if kept.dropped:
        last = len(kept.down) - 1
        kind = [kind for kind in kinds if hasattr(student.down_blocks[last], kind)][-1]
        slots = kept.down[last]
        at = [(f"down_blocks.{last}.{kind}.{len(slots) - 1}", f"down_blocks.{last}.{kind}.{slots[-1]}")] if slots else []
        down = [*down[:-1], *at]
    return (*down, *((f"up_blocks.{b}", f"up_blocks.{b + kept.dropped}") for b in range(len(kept.up))))


def _rows(teacher: Any, layout: UNetLayout, kept: set[str]) -> tuple[tuple[str, int, int], ...]:
    """Return for each unit, each sampler and the rest: name, parameters, parameters that are left."""
    rows: dict[str, list[int]] = {}
    for unit in layout.units():
        block, _, slot = unit.rpartition(".")
        rows[unit] = [0, 0]
        if block and int(slot) == len(teacher.get_submodule(block).resnets) - 1:
            rows[f"{block}.sampler"] = [0, 0]
    for name, parameter in teacher.named_parameters():
        found = re.match(r"((?:down|up)_blocks\.\d+)\.(\w+)\.(\d+)\.", name)
        if found is not None:
            unit = f"{found[1]}.sampler" if found[2] in ("downsamplers", "upsamplers") else f"{found[1]}.{found[3]}"
        else:
            unit = MID if name.startswith(f"{MID}.") else "other"
        row = rows.setdefault(unit, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if name in kept else 0
    return tuple((unit, *row) for unit, row in rows.items() if row[0] or not unit.endswith(".sampler"))
