"""The memory and the peak FLOP/s of GPUs by name."""

from __future__ import annotations

from dataclasses import dataclass

from lumos.device_peak import GPU_TFLOPS

GIB = 2**30
RESERVED = 2 * GIB
"""Bytes of GPU memory that a plan leaves free: for the CUDA context, the communication library and unusable gaps."""
GPUS = {
    "3090": (24, 71.0), "4090": (24, 165.2), "l40s": (48, GPU_TFLOPS["L40S"]), "a100-40": (40, GPU_TFLOPS["A100"]),
    "a100": (80, GPU_TFLOPS["A100"]), "h20": (96, GPU_TFLOPS["H20"]), "h100": (80, GPU_TFLOPS["H100"]),
    "h200": (141, GPU_TFLOPS["H200"]), "b200": (180, GPU_TFLOPS["B200"]),
}  # fmt: skip
"""Name -> (memory in GiB, peak TFLOP/s of bf16 matrix products without sparsity), from the makers' data sheets."""


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run: `count` GPUs or CPU processes. `memory` (bytes) and `peak` (FLOP/s) are those of one."""

    name: str
    count: int
    memory: int
    peak: float
