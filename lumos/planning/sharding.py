"""The division of a training run over processes.

The memory that follows from it is computed in `fixed_memory.py` (weights, gradients, optimizer) and in the
`memory_moments` of a generator (activations); `training.py` adds both.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Sharding:
    """The division of a training run over processes, and the settings that decide its memory.

    stage              None: plain PyTorch on one device; else DeepSpeed's ZeRO stage
    world              number of processes
    offload_optimizer  the optimizer's state is in host memory
    offload_weights    the weights are in host memory
    bucket             elements that DeepSpeed reduces at once
    live               elements that ZeRO-3 holds gathered
    half               computation in bf16
    on_gpu             CUDA with its fused kernels
    averaged           the run averages its weights (EMA)
    optimizer          training.optimizer; all but adamw need undivided weights
    accumulates        a step has several micro-batches
    checkpointing      activation checkpointing
    """

    stage: int | None = None
    world: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 50_000_000
    live: int = 1_000_000_000
    half: bool = True
    on_gpu: bool = True
    averaged: bool = False
    optimizer: str = "adamw"
    accumulates: bool = False
    checkpointing: bool = True

    @property
    def autocast(self) -> bool:
        """Whether bf16 products use float32 weights. From stage 1 on, the weights themselves are bf16."""
        return self.half and not self.stage

    @property
    def product(self) -> int:
        """The bytes of a number in the inputs and outputs of matrix products."""
        return 2 if self.half else 4

    @property
    def residual(self) -> int:
        """The bytes of a number in the residual stream, from layer to layer."""
        return 4 if self.autocast else self.product

    @property
    def offloaded(self) -> list[str]:
        """The parts that are in host memory in place of GPU memory."""
        return [what for what, is_on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if is_on]

    @property
    def name(self) -> str:
        if self.stage is None:
            return "no DeepSpeed"
        return f"ZeRO {self.stage}" + (f", {' and '.join(self.offloaded)} on CPU" if self.offloaded else "")
