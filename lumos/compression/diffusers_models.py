"""Prunes a U-Net or transformer of diffusers in a folder, and loads the result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from lumos.compression import transformers, unets
from lumos.compression.diffusers_folder import Pruning, check_diffusers, read_config, read_plan
from lumos.errors import UserError, shown

SUPPORTED = (*unets.CLASSES, *transformers.CLASSES)


def plan_folder(folder: str | Path, plan: str, keep: Sequence[int] = ()) -> Pruning:
    """Return what a plan makes of the model in a folder, from its config.json alone.

    Args:
        folder: folder of one of the classes in SUPPORTED.
        plan: a plan of `unets.PLANS` or `transformers.PLANS`, or a JSON file with the units to remove.
        keep: the number of blocks that a named plan for transformers keeps, one for each list of blocks.

    Raises UserError, among others for a model of another class and for a plan that does not fit.
    """
    config = read_config(folder, SUPPORTED)
    check_diffusers()
    name = config["_class_name"]
    is_unet = name in unets.CLASSES
    known = unets.PLANS if is_unet else transformers.PLANS
    remove = None
    if plan not in known:
        if not os.path.lexists(plan):
            raise UserError(f"plan {shown(plan)} is unknown and no file; {name} takes {', '.join(known)}, or a JSON file")
        remove = read_plan(plan, name)
    if keep and (is_unet or remove is not None):
        raise UserError(f"--keep has no effect with plan {plan}; leave it out")
    return unets.prune(config, plan, remove) if is_unet else transformers.prune(config, plan, remove, keep)


def model_class_of(config: Mapping[str, Any]) -> type:
    """Return the class that loads a model with this config.json: of diffusers, or of `lumos.compression.unets`."""
    name = config["_class_name"]
    check_diffusers()
    return unets.model_class(name) if name in unets.CLASSES else getattr(import_module("diffusers"), name)


def load(folder: str | Path, **options: Any) -> nn.Module:
    """Return the model in a folder, of a stock class or of a class of `lumos.compression.unets`.

    `options` are those of `from_pretrained` of diffusers, for example torch_dtype.
    """
    model_class = model_class_of(read_config(folder, SUPPORTED))
    return model_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
