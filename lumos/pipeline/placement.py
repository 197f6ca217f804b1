"""Placement of models that are larger than the memory of their device.

Layers that do not fit stay in host memory, or in their files on the disk, and are loaded when they
run. The work is done by transformers' `device_map="auto"` and accelerate. At most one GPU is used,
because the cache of keys and values lies on one device. Several GPUs are used by making several
clips at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lumos.errors import UserError, shown

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# The share of the free memory that weights may take by default. The cache, hidden states and the video tokenizer need the rest.
FOR_WEIGHTS = 0.8


def loading_arguments(
    device: torch.device, device_map: str | None, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, Any]:
    """Return the arguments of transformers' `from_pretrained` for this placement; an empty dict without a device_map.

    max_memory: the most memory for weights, in bytes or as text, for example "6GiB". The key is the
    number of the GPU, or "cpu" for host memory. Default: FOR_WEIGHTS of the free memory. UserError
    for a device_map other than "auto", for a device that is not used, and for a malformed size.
    """
    if device_map is None:
        if max_memory:
            raise UserError("max_memory has no effect without device_map; give device_map='auto' (--device-map auto) too")
        return {}
    if device_map != "auto":
        raise UserError(f"device_map {shown(device_map)} is not allowed; give 'auto', or leave it out")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device_map works with CUDA and the CPU, not with {device.type}; leave it out")
    here = (device.index or 0) if device.type == "cuda" else "cpu"
    if unknown := set(max_memory or {}) - {here, "cpu"}:
        raise UserError(f"max_memory names {', '.join(map(str, unknown))}; allowed: {' and '.join(map(str, {here: 0, 'cpu': 0}))}")
    limits = {"cpu": int(FOR_WEIGHTS * psutil.virtual_memory().available)}
    if here != "cpu":
        limits[here] = int(FOR_WEIGHTS * torch.cuda.mem_get_info(device)[0])
    limits |= {place: size_in_bytes(size) for place, size in (max_memory or {}).items()}
    return {"device_map": "auto", "max_memory": limits}


def pick_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None, device: torch.device
) -> torch.dtype:
    """Return the dtype of weights: a torch.dtype or its name; `torch_dtype` is the name of diffusers for the same argument.

    None and "auto" mean bfloat16 on CUDA, else float32. UserError if both are given, and for an unknown dtype.
    """
    if dtype is not None and torch_dtype is not None:
        raise UserError(f"both dtype {shown(dtype)} and torch_dtype {shown(torch_dtype)} are given; give one of them")
    found = torch_dtype if dtype is None else dtype
    if found is None or found == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if found not in DTYPES:
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
        raise UserError(f"dtype {shown(dtype if torch_dtype is None else torch_dtype)} is not allowed; give one of {allowed}")
    return found


def is_dtype(value: Any) -> bool:
    """Return whether a value is a dtype or the name of one of DTYPES."""
    return isinstance(value, torch.dtype) or (isinstance(value, str) and getattr(torch, value, None) in DTYPES)


def size_in_bytes(size: int | str) -> int:
    """Return a size such as "6GiB", "500 MB" or 1000 in bytes; UserError if it is malformed."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if found is None or found[2] not in UNITS:
        raise UserError(f"{shown(size)} is no size of memory; give 6GiB or 500MB for example")
    return int(float(found[1]) * UNITS[found[2]])


def parse_max_memory(items: list[str] | None) -> dict[int | str, str] | None:
    """Return the values of --max-memory as a dict: ["0=6GiB", "cpu=16GiB"] gives {0: "6GiB", "cpu": "16GiB"}."""
    if items is None:
        return None
    pairs = [item.partition("=") for item in items]
    for item, (place, equals, _) in zip(items, pairs, strict=True):
        if not equals or not (place == "cpu" or place.isdecimal()):
            raise UserError(f"--max-memory {item} is not allowed; give the GPU's number or cpu, and a size: 0=6GiB cpu=16GiB")
    return {int(place) if place.isdecimal() else place: size for place, _, size in pairs}


def is_spread(model: torch.nn.Module) -> bool:
    """Return whether some weights of the model lie on another device, or on the disk, until their layer runs."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def working_device(model: torch.nn.Module) -> torch.device:
    """Return the device on which a model with a device_map computes: its GPU, or the CPU."""
    places = {place for place in model.hf_device_map.values() if str(place) not in ("cpu", "disk")}
    place = places.pop() if places else "cpu"
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
