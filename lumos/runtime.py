"""What a run was made with: versions, seconds since the process began, peak memory."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import psutil
import torch
import transformers


def versions() -> dict[str, str]:
    """Versions that decide a result."""
    import lumos

    return {
        "lumos": lumos.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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
