"""GPUs by name: what they hold and what they can do."""

from __future__ import annotations

from dataclasses import dataclass

from lumos.device_peak import GPU_TFLOPS

GIB = 2**30
RESERVED = 2 * GIB
"""Of a GPU's memory, for the CUDA context, the communication library and what the allocator cannot fill."""
GPUS = {
    "3090": (24, 71.0), "4090": (24, 165.2), "l40s": (48, GPU_TFLOPS["L40S"]), "a100-40": (40, GPU_TFLOPS["A100"]),
    "a100": (80, GPU_TFLOPS["A100"]), "h20": (96, GPU_TFLOPS["H20"]), "h100": (80, GPU_TFLOPS["H100"]),
    "h200": (141, GPU_TFLOPS["H200"]), "b200": (180, GPU_TFLOPS["B200"]),
}  # fmt: skip
"""Name -> (memory in GiB, peak TFLOP/s of bf16 matrix products without sparsity), from the makers' data sheets."""


@dataclass(frozen=True)
class Hardware:
    """`count` GPUs or, on a CPU, processes. Memory in bytes and peak in FLOP/s are those of one."""

    name: str
    count: int
    memory: int
    peak: float
