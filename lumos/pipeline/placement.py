"""Models larger than their device: layers that do not fit wait in host memory, or in their files, until it is their turn.

transformers' `device_map="auto"` and accelerate do it. One GPU at most does the work, because the cache of keys and values lies on
one device; several GPUs make several clips at once instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lumos.errors import UserError, shown

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
FOR_WEIGHTS = 0.8  # share of the free memory that weights may take by default; cache, states and video tokenizer need the rest


def loading_arguments(
    device: torch.device, device_map: str | None, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes for this placement; nothing without a device_map.

    max_memory: bytes, or text as 6GiB, that weights may take at most: of the GPU under its number, of the host under "cpu";
    default: FOR_WEIGHTS of what is free. UserError for another map, another GPU and what is no size.
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


def size_in_bytes(size: int | str) -> int:
    """6GiB, 500 MB, 1000 -> bytes; UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if found is None or found[2] not in UNITS:
        raise UserError(f"{shown(size)} is no size of memory; give 6GiB or 500MB for example")
    return int(float(found[1]) * UNITS[found[2]])


def parse_max_memory(items: list[str] | None) -> dict[int | str, str] | None:
    """["0=6GiB", "cpu=16GiB"] -> {0: "6GiB", "cpu": "16GiB"}."""
    if items is None:
        return None
    pairs = [item.partition("=") for item in items]
    for item, (place, equals, _) in zip(items, pairs, strict=True):
        if not equals or not (place == "cpu" or place.isdecimal()):
            raise UserError(f"--max-memory {item} is not allowed; give the GPU's number or cpu, and a size: 0=6GiB cpu=16GiB")
    return {int(place) if place.isdecimal() else place: size for place, _, size in pairs}


def is_spread(model: torch.nn.Module) -> bool:
    """True if weights wait elsewhere until their layer runs."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def working_device(model: torch.nn.Module) -> torch.device:
    """Where a model with a device_map computes: its GPU, or the CPU."""
    places = {place for place in model.hf_device_map.values() if str(place) not in ("cpu", "disk")}
    place = places.pop() if places else "cpu"
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
