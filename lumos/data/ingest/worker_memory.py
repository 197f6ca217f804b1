"""How much memory an item may take in a worker, so that one that asks for all of it costs itself and not the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ITEM_MEMORY = 16 << 30
"""Bytes of address space that an item may take in a worker, beyond what the worker has once its tokenizer is loaded."""
CORE_MEMORY = 256 << 20
"""Bytes more for each core: decoders start a thread a core, which reserves address space that it does not use."""


def limit_memory() -> int | None:
    """Limit this process to ITEM_MEMORY more address space than it has; returns the bytes that are left to it.

    None where there is no limit: on systems without /proc and RLIMIT_AS, and once CUDA runs, which reserves address space by
    the hundred GiB.
    """
    statm = Path("/proc/self/statm")
    if torch.cuda.is_initialized() or not statm.is_file():
        return None
    import resource

    has = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = has + ITEM_MEMORY + CORE_MEMORY * (os.cpu_count() or 1)
    if soft != resource.RLIM_INFINITY:  # someone set a limit for the whole ingest
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return most - has
