"""The environment of a run: device, versions, run time, memory, and progress bars of libraries."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from transformers.utils import logging as transformers_logging

from lumos.errors import UserError
from lumos.progress import is_terminal
from lumos.version import __version__

MALLOPT = {"trim threshold": (-1, 64 * 2**20), "mmap threshold": (-3, 4 * 2**20)}  # malloc.h: parameter, value in bytes

T = TypeVar("T")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect a result, by name."""
    return {
        "lumos": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def is_first_process() -> bool:
    """Return whether this process has rank 0 of a launcher's, or was started without one."""
    return os.environ.get("RANK", "0") == "0"


def pick_device(device: str | int | torch.device | None) -> torch.device:
    """Return the torch device of this name (cpu, cuda, cuda:1, mps); a number is that of a GPU.

    None or "auto" means CUDA if it is available, else the CPU. "cuda" is the GPU number LOCAL_RANK, which a
    launcher such as deepspeed or torchrun sets for each process. Raises UserError for an unknown name and
    for a device that is not available.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
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
    """Return the seconds since this process started. Imports are included."""
    return time.time() - psutil.Process().create_time()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process so far: allocated by torch on a GPU, or resident for the CPU."""
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


def parameter_count(model: torch.nn.Module) -> int:
    """Return the number of parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_memory(needed: int, what: str) -> None:
    """Raise UserError if `what` needs more bytes than the total memory and swap of this machine."""
    has = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > has:
        raise UserError(
            f"{what} needs {needed / 2**30:,.0f} GiB of memory at least, this machine has {has / 2**30:,.0f}; ask for less"
        )


def return_freed_memory(device: torch.device) -> bool:
    """Make glibc return the memory of freed CPU tensors of 4 MiB and more to the system at once.

    Returns False if the device is not the CPU or the C library is not glibc; then nothing changes.

    By default, glibc raises its threshold for this up to 32 MiB and keeps smaller blocks in a heap. There,
    long-lived tensors lie between freed ones, and a training step of 8,192 tokens holds twice the memory
    that its tensors need. The cost of this setting is that each large tensor takes new pages from the
    system, a few percent of the time of a step.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values())


def _precision() -> str | tuple[str, ...]:
    """Return how exact products of float32 are: in torch's one word, or in a word for each backend if these were set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's word, where a backend has another
        return tuple(backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn))


def _set_precision(value: str | tuple[str, ...]) -> None:
    if isinstance(value, str):
        torch.set_float32_matmul_precision(value)
        return
    for backend, word in zip((torch.backends.cuda, torch.backends.mkldnn), value, strict=True):
        backend.matmul.fp32_precision = word


class _OfTheProcess:
    """Defaults of torch that are one for all threads: the dtype of new tensors, and how exact products of float32 are.

    They are plain from the first of the calls that run at a time until the last one has ended.
    """

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._before: dict[Callable[[Any], None], Any] = {}

    def enter(self) -> None:
        plain = (
            (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
            (_precision, _set_precision, "highest"),
        )
        with self._lock:
            self._calls += 1
            for get, change, value in plain:
                if (found := get()) != value:
                    self._before[change] = found
                    change(value)

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            while self._before and not self._calls:
                change, value = self._before.popitem()
                change(value)


_OF_THE_PROCESS = _OfTheProcess()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, new tensors are float32 on the CPU, products of float32 are exact, and no autocast changes dtypes.

    A result then depends on its arguments alone, whatever the caller of the library has set.
    """
    with ExitStack() as held:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        _OF_THE_PROCESS.enter()
        held.callback(_OF_THE_PROCESS.leave)
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        yield


def each_in_plain_defaults(made: Generator[T, None, None]) -> Iterator[T]:
    """Yield from an iterator whose every step runs inside of `plain_defaults`; closing this one closes that one."""
    with closing(made):
        while True:
            with plain_defaults():
                try:
                    item = next(made)
                except StopIteration:
                    return
            yield item


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Inside, transformers shows progress bars only if stderr is a terminal."""
    with nullcontext() if is_terminal(sys.stderr) else no_progress_bar():
        yield


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Turn off the progress bars of transformers for the block.

    Use it where reading or writing a model is only a part of a larger job.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
