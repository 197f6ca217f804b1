"""What a run is made with: its device, versions, seconds since the process began, peak memory; quiet libraries."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import transformers
from transformers.utils import logging as transformers_logging

from lumos.errors import UserError
from lumos.version import __version__

MALLOPT = {"trim threshold": (-1, 64 * 2**20), "mmap threshold": (-3, 4 * 2**20)}  # malloc.h: parameter, value in bytes


def versions() -> dict[str, str]:
    """Versions that decide a result."""
    return {
        "lumos": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device by its name (cpu, cuda, cuda:1, mps); None or "auto": CUDA if there is one, else the CPU.

    "cuda" under a launcher such as deepspeed or torchrun is the GPU of this process (LOCAL_RANK). UserError for a name that is
    unknown and for a device that is not there.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if found is None or found.type not in counts:
        raise UserError(f"device '{device}' is unknown; allowed: auto, cpu, cuda, cuda:1 (any number), mps")
    index = found.index
    if found.type == "cuda" and index is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
    if (index or 0) >= counts[found.type]:
        raise UserError(f"device '{device}' is not available here; give {' or '.join(k for k, n in counts.items() if n)}")
    return torch.device(found.type) if index is None else torch.device(found.type, index)


def seconds_since_start() -> float:
    """Wall seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on the GPU if the work is there, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    if platform.system() == "Linux":  # ru_maxrss of a child begins at its parent's peak; VmHWM is its own
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def check_memory(needed: int, what: str) -> None:
    """UserError if `what` alone needs more bytes than this machine has memory and swap, in use or not."""
    has = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > has:
        raise UserError(
            f"{what} needs {needed / 2**30:,.0f} GiB of memory at least, this machine has {has / 2**30:,.0f}; ask for less"
        )


def return_freed_memory(device: torch.device) -> bool:
    """Make freed tensors of 4 MiB and more on the CPU go back to the system at once; False where nothing was set.

    glibc raises its threshold for that up to 32 MiB by itself and keeps smaller blocks in a heap, where tensors that live long
    stand between freed ones: a training step of 8,192 tokens then holds twice the memory that its tensors need. Each such
    tensor costs fresh pages instead, a few percent of a step's time.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values())


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without the bars of transformers, where reading or writing a model is a part of something else."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
