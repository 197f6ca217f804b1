"""A memory limit for worker processes, so that an item that needs too much is skipped and the machine keeps running."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ITEM_MEMORY = 16 << 30
"""Bytes of address space that an item may use, in addition to what the worker uses after it loaded its tokenizer."""
CORE_MEMORY = 256 << 20
"""Additional bytes per core. Decoders start a thread per core, and each thread reserves address space without using it."""


def limit_memory() -> int | None:
    """Limit the address space of this process to its present size plus ITEM_MEMORY and CORE_MEMORY per core.

    Return the number of bytes that the process can still use, or None if no limit was set: on systems
    without /proc, and if CUDA runs, which reserves hundreds of GiB of address space.
    """
    statm = Path("/proc/self/statm")
    if torch.cuda.is_initialized() or not statm.is_file():
        return None
    import resource

    has = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = has + ITEM_MEMORY + CORE_MEMORY * (os.cpu_count() or 1)
    if soft != resource.RLIM_INFINITY:  # a limit for the whole ingest was set from outside
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return most - has
