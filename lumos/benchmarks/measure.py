"""How the bench measures: interleaved times with a check that all forms agree, peak memory, the machine's own peak.

Time     Forms are run in turn (a, b, a, b, ...), so that a disturbance of the machine hits all; the median counts,
         the fastest for a whole training step, which is long and meets more disturbance than a few runs level out.
Memory   Each figure comes from a fresh process (`lumos.benchmarks.isolated`), so that nothing freed earlier is used again.
         There the code runs once on a tiny input (libraries and thread pools are loaded), the real inputs are made, the
         high-water mark is set back, and the step runs once: the figure is the mark after the step minus the mark before.
         CPU: the mark is VmHWM, the resident set's peak, set back through /proc/self/clear_refs; ru_maxrss will not do on
         Linux, as a process begins with its parent's. Elsewhere it is ru_maxrss, which cannot be set back: what making the
         inputs took on top of them is then missing. CUDA: torch's max_memory_allocated minus memory_allocated.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lumos.device_peak import synchronize, timed
from lumos.errors import RunError
from lumos.runtime import peak_memory_bytes

MB = 2**20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bench:
    """What every target is told: where and how to run, the machine's peak, and whom to tell of each finished measurement."""

    device: str
    dtype: str
    threads: int
    repetitions: int
    peak_gflops: Mapping[str, float]
    step: Callable[[], None] = field(default=lambda: None)

    @property
    def place(self) -> dict[str, Any]:
        """The part that a process of its own needs."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Report:
    """One target's result: resolved settings, figures, ratios of figures of this run, and tables [headers, *rows] to print."""

    settings: dict[str, Any]
    measured: Any
    ratios: Any
    tables: list[list[list[str]]]


def hardware(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": rounded(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def interleaved(
    forms: Mapping[str, Step], bench: Bench, what: str, choose: Callable[[list[float]], float] = statistics.median
) -> tuple[dict[str, float], float]:
    """Seconds of each form, the median or what `choose` takes, and how far any form's results are from the first one's.

    A form that returns nothing is only timed. The difference of two tensors is the largest one of their elements,
    relative to the largest element of both. RunError if it exceeds the tolerance of the dtype: a form that is fast and
    wrong must not be reported.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    difference, tolerance = 0.0, TOLERANCE[getattr(torch, bench.dtype)]
    for _ in range(bench.repetitions):
        first: tuple[Tensor, ...] = ()
        for name, form in forms.items():
            spent, result = timed(form, bench.device)
            seconds[name].append(spent)
            if not first:
                first, reference = result, name
            elif result:
                found = largest_difference(first, result)
                if not found <= tolerance:
                    raise RunError(f"{what}: {name} and {reference} differ by {found:.2g}; {bench.dtype} allows {tolerance:.2g}")
                difference = max(difference, found)
            del result
            bench.step()
    return {name: choose(times) for name, times in seconds.items()}, difference


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """max |a - b| / max(|a|, |b|) over pairs of tensors; nan if a value is not finite."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.float(), b.float()
        scale = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(torch.finfo(torch.float32).tiny)
        differences.append((a - b).abs().max() / scale)
    return float(torch.stack(differences).max())


def extra_peak_bytes(prepare: Callable[..., Step], arguments: dict[str, Any], warm_up: dict[str, Any]) -> int:
    """Bytes that prepare(**arguments)() needs on top of what `prepare` made, at its peak. Only true in a fresh process."""
    prepare(**{**arguments, **warm_up})()
    step = prepare(**arguments)
    device = torch.device(arguments["device"])
    before = lowered_peak(device)
    kept = step()
    synchronize(str(device))
    peak = peak_memory_bytes(device)
    del kept
    return max(peak - before, 0)  # Linux counts pages a CPU at a time, so next to nothing may come out below 0


def lowered_peak(device: torch.device) -> int:
    """Set the high-water mark back to what is in use now, where the system can; returns the mark."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Four significant digits, which is more than a measurement holds."""
    return None if value is None else float(f"{value:.{digits}g}")


def ratio(theirs: float, ours: float) -> float | None:
    """How many times ours theirs is; None where ours is too small to be measured."""
    return rounded(theirs / ours) if ours > 0 else None


def shown(value: float | None, unit: str = "") -> str:
    """A figure for the table."""
    return "-" if value is None else f"{value:,.3g}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


def render_table(table: list[list[str]]) -> str:
    """[headers, *rows] in aligned columns; the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in table]
    return "\n".join(line.rstrip() for line in lines)
