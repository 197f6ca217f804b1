"""The peak FLOP/s of a device, so that a run can report which share of it is used."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

GPU_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
"""TFLOP/s of dense bf16 matrix products with fp32 sums from the makers' data sheets, by a word of the device's name."""
PROBE = {"seconds": 0.2, "products": 50}
CPU_PROBE_SIZE = 256  # one product takes a third of a millisecond, so some of fifty run undisturbed on a busy machine


def peak_flops(device: torch.device, dtype: torch.dtype, stated: float | None) -> tuple[float, str]:
    """Return the peak FLOP/s of one device for matrix products, and its source.

    The source is "stated", "data sheet of ..." or "measured". `stated` is the TFLOP/s from the settings
    and takes precedence. The table of data sheets holds for bf16. Any other device or dtype, and a part
    of a GPU (MIG), is measured: the fastest of several products of two square matrices counts. The
    global random states do not change.
    """
    if stated is not None:
        return stated * 1e12, "stated"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype == torch.bfloat16 and (known := known_gpu(name)):
        return GPU_TFLOPS[known] * 1e12, f"data sheet of {known}"
    size = CPU_PROBE_SIZE if device.type == "cpu" else None
    return matrix_peak_gflops(str(device), dtype, size=size, **PROBE) * 1e9, "measured"


def known_gpu(name: str) -> str | None:
    """Return the key of GPU_TFLOPS for a device's name, or None if there is none or the device is a MIG part."""
    if "MIG" in name.split():
        return None
    return next((entry for entry in GPU_TFLOPS if re.search(rf"\b{entry}\b", name)), None)


MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}


def matrix_peak_gflops(
    device: str, dtype: torch.dtype, seconds: float = 1.0, size: int | None = None, products: int = 1
) -> float:
    """Return the GFLOP/s of the fastest product of two square matrices.

    Products are repeated for `seconds` and at least `products` times. `size` is the side of the matrices.
    """
    n = size or MATRIX_SIZE[torch.device(device).type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, n, generator=generator).to(device, dtype) for _ in range(2))
    best, done, until = float("inf"), 0, time.perf_counter() + seconds
    a @ b
    while time.perf_counter() < until or done < products:
        best, done = min(best, timed(lambda: a @ b, device)[0]), done + 1
    return 2 * n**3 / best / 1e9


def timed(step: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Call `step` and return (seconds, result). The time includes the work that the call starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    result = step()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()
