"""Plans and pruning of video transformers of diffusers: whole blocks are removed, and the stock class loads the result."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from lumos.compression.diffusers_folder import Pruning, check_units, on_meta
from lumos.compression.plans import removed_by
from lumos.errors import UserError

BLOCKS = {
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    "WanTransformer3DModel": {"blocks": "num_layers"},
    "CogVideoXTransformer3DModel": {"transformer_blocks": "num_layers"},
    "LTXVideoTransformer3DModel": {"transformer_blocks": "num_layers"},
}
"""Class -> list of blocks, in order of execution -> the entry of its config that says how many there are."""
CLASSES = tuple(BLOCKS)
PLANS = ("spaced", "shallow", "deep")


def plan_units(plan: str, counts: Mapping[str, int], keep: Sequence[int]) -> tuple[str, ...]:
    """Return the blocks that a named plan removes.

    Args:
        plan: one of PLANS.
        counts: the number of blocks of each list.
        keep: the number of blocks to keep of each list, in the same order.

    Raises UserError for numbers that do not fit.
    """
    have = " and ".join(f"{count} {name}" for name, count in counts.items())
    if len(keep) != len(counts):
        raise UserError(f"plan {plan} needs --keep with a number of blocks for each list; {len(keep)} given, and this model "
                        f"has {have}")  # fmt: skip
    if any(not 2 <= n <= count for n, count in zip(keep, counts.values(), strict=True)):
        raise UserError(f"--keep {' '.join(map(str, keep))} is not allowed; this model has {have}, and 2 or more of each must stay")
    return tuple(unit for (name, count), n in zip(counts.items(), keep, strict=True)
                 for unit in removed_by(plan, [f"{name}.{i}" for i in range(count)], n))  # fmt: skip


def prune(config: Mapping[str, Any], plan: str, remove: Iterable[str] | None = None, keep: Sequence[int] = ()) -> Pruning:
    """Return what a plan makes of a transformer.

    Args:
        config: content of its config.json.
        plan: one of PLANS, or the name of a list of blocks.
        remove: the list of blocks, for example ["blocks.3"]; None for a named plan.
        keep: the number of blocks that a named plan keeps, one for each list of blocks.

    Raises UserError for a plan that does not fit the transformer, or that removes nothing or all of a list.
    """
    name = config["_class_name"]
    model_class = getattr(import_module("diffusers"), name)
    teacher = on_meta(model_class, config)
    counts = {blocks: len(getattr(teacher, blocks)) for blocks in BLOCKS[name]}
    removed = plan_units(plan, counts, keep) if remove is None else tuple(remove)
    check_units(removed, [f"{blocks}.{i}" for blocks, count in counts.items() for i in range(count)], f"plan {plan}")
    kept = {blocks: [i for i in range(count) if f"{blocks}.{i}" not in removed] for blocks, count in counts.items()}
    if not removed:
        raise UserError(f"plan {plan} keeps every block; keep fewer")
    if not all(kept.values()):
        raise UserError(f"plan {plan} leaves no {next(blocks for blocks, left in kept.items() if not left)}; keep one or more")
    own = dict(config) | {BLOCKS[name][blocks]: len(indices) for blocks, indices in kept.items()}
    student = on_meta(model_class, own)
    state = student.state_dict()
    tensors = {tensor: source(tensor, kept) for tensor in state}
    return Pruning(
        class_name=name, plan=plan, remove=removed, kept=kept, config=own, tensors=tensors,
        shapes={tensor: tuple(value.shape) for tensor, value in state.items()},
        taps=tuple((f"{blocks}.{k}", f"{blocks}.{i}") for blocks, indices in kept.items() for k, i in enumerate(indices)),
        rows=_rows(teacher, counts, set(removed)),
    )  # fmt: skip


def source(name: str, kept: Mapping[str, Sequence[int]]) -> str:
    """Return the name of the parent's tensor that a tensor of the pruned model equals."""
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    return f"{found[1]}.{kept[found[1]][int(found[2])]}.{found[3]}" if found and found[1] in kept else name


def _rows(teacher: Any, counts: Mapping[str, int], removed: set[str]) -> tuple[tuple[str, int, int], ...]:
    sizes = {f"{blocks}.{i}": 0 for blocks, count in counts.items() for i in range(count)} | {"other": 0}
    for name, parameter in teacher.named_parameters():
        unit = ".".join(name.split(".")[:2])
        sizes[unit if unit in sizes else "other"] += parameter.numel()
    return tuple((unit, size, 0 if unit in removed else size) for unit, size in sizes.items())
