"""How benchmarks measure time and memory. A form is one of the implementations that a benchmark compares.

Time     Forms run in turn (a, b, a, b, ...), so that a disturbance of the machine affects all of them.
         The median counts. For a whole training step the fastest run counts: a step is so long that the
         median of a few runs would still contain disturbances.
Memory   Each figure comes from a new process (`lumos.benchmarks.isolated`), so that no memory that was
         freed earlier is used again. The process runs the code once on a tiny input, which loads
         libraries and thread pools, makes the real inputs, resets the peak and runs the step once. The
         figure is the peak after the step minus the peak before it.
         CPU on Linux: VmHWM, the peak of the resident set, reset through /proc/self/clear_refs.
         ru_maxrss is of no use there, because it starts at the peak of the parent process.
         CPU elsewhere: ru_maxrss, which cannot be reset. The figure is then too small if making the
         inputs took more memory than the inputs themselves.
         CUDA: torch's max_memory_allocated minus memory_allocated.
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
from torch import Tensor, nn

from lumos.device_peak import synchronize, timed
from lumos.errors import RunError
from lumos.runtime import peak_memory_bytes

MB = 2**20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bench:
    """The settings that all targets share.

    device, dtype  where and in which dtype to run
    threads        CPU threads
    repetitions    timed runs of each form
    peak_gflops    GFLOP/s of the machine's matrix products by dtype
    step           called after each finished measurement, to move the progress bar
    """

    device: str
    dtype: str
    threads: int
    repetitions: int
    peak_gflops: Mapping[str, float]
    step: Callable[[], None] = field(default=lambda: None)

    @property
    def place(self) -> dict[str, Any]:
        """The device and dtype as arguments for a separate process."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Report:
    """The result of one target.

    settings  the resolved settings
    measured  the figures, as JSON values
    ratios    ratios of figures of this run, as JSON values
    tables    tables [headers, *rows] to print
    """

    settings: dict[str, Any]
    measured: Any
    ratios: Any
    tables: list[list[list[str]]]


def hardware(device: str) -> dict[str, Any]:
    """Return a description of the machine: CPU, cores, memory in GiB, GPU, and the version of torch, whose kernels run."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": rounded(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "torch": torch.__version__,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def interleaved(
    forms: Mapping[str, Step], bench: Bench, what: str, choose: Callable[[list[float]], float] = statistics.median
) -> tuple[dict[str, float], float]:
    """Time all forms in turn and compare their results with those of the first form.

    Returns (seconds of each form, largest difference). `choose` makes one figure of the times of a form; the
    default is the median. A form that returns an empty tuple is only timed. The difference is that of
    `largest_difference`. Raises RunError if it exceeds the tolerance of the dtype, because a form that is
    fast and wrong must not be reported.
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
    """Return the largest max |a - b| / max(|a|, |b|) of all pairs of tensors; nan if a value is not finite."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.float(), b.float()
        scale = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(torch.finfo(torch.float32).tiny)
        differences.append((a - b).abs().max() / scale)
    return float(torch.stack(differences).max())


def extra_peak_bytes(prepare: Callable[..., Step], arguments: dict[str, Any], warm_up: dict[str, Any]) -> int:
    """Return the peak memory in bytes of prepare(**arguments)(), without the memory that `prepare` itself takes.

    `warm_up` are the arguments of a first small run. The figure is right only in a new process.
    """
    prepare(**{**arguments, **warm_up})()
    step = prepare(**arguments)
    device = torch.device(arguments["device"])
    before = lowered_peak(device)
    kept = step()
    synchronize(str(device))
    peak = peak_memory_bytes(device)
    del kept
    return max(peak - before, 0)  # Linux counts pages for each CPU, so a tiny difference may come out below 0


def with_optimizer(model: nn.Module, device: str, dtype: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model in training mode and an AdamW that has allocated its moments and never changes a weight."""
    model = model.to(device, getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def lowered_peak(device: torch.device) -> int:
    """Reset the peak memory to the memory in use, if the system can do so, and return the peak in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Return the value rounded to `digits` significant digits. Four are more than a measurement is good for."""
    return None if value is None else float(f"{value:.{digits}g}")


def ratio(theirs: float, ours: float) -> float | None:
    """Return theirs / ours, rounded; None if `ours` is too small to be measured."""
    return rounded(theirs / ours) if ours > 0 else None


def shown(value: float | None, unit: str = "") -> str:
    """Return a figure as text for a table; "-" for None."""
    return "-" if value is None else f"{value:,.3g}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


def render_table(table: list[list[str]]) -> str:
    """Return a table [headers, *rows] as text. The first column is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in table]
    return "\n".join(line.rstrip() for line in lines)
