"""How a training run is divided over processes, and what each of them holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Sharding:
    """How a run is sharding. `stage` None: plain PyTorch on one device, else DeepSpeed's ZeRO stage over `world` processes.

    `bucket`, `live`: elements that DeepSpeed reduces at once, and that ZeRO-3 holds gathered. `half`: bf16. `on_gpu`: CUDA's
    fused kernels. `averaged`: with EMA. `accumulates`: a step has several micro-batches. `muon`: in place of AdamW, with whole
    weights only.
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
    muon: bool = False
    accumulates: bool = False
    checkpointing: bool = True

    @property
    def autocast(self) -> bool:
        """bf16 products over float32 weights; from stage 1 on the weights themselves are bf16."""
        return self.half and not self.stage

    @property
    def product(self) -> int:
        """Bytes of a number that a matrix product takes and gives."""
        return 2 if self.half else 4

    @property
    def residual(self) -> int:
        """Bytes of a number in the sums that go from layer to layer."""
        return 4 if self.autocast else self.product

    @property
    def offloaded(self) -> list[str]:
        """What lies in the machine's memory in place of the GPU's."""
        return [what for what, is_on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if is_on]

    @property
    def name(self) -> str:
        if self.stage is None:
            return "no DeepSpeed"
        return f"ZeRO {self.stage}" + (f", {' and '.join(self.offloaded)} on CPU" if self.offloaded else "")


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
