"""CPU offload of a pipeline: its parts lie in host memory, and each lies on the GPU only while it is needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn

from lumos.errors import UserError, shown
from lumos.pipeline.placement import is_spread
from lumos.runtime import pick_device


class HasOffload:
    """The offload of a pipeline: `stage` moves parts to the working device for a block, if offload is enabled."""

    model: nn.Module
    offload_device: torch.device | None = None
    """The device on which parts work; None: offload is not enabled."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> Self:
        """Keep the parts of the pipeline in host memory, and move each to the GPU while it is needed; return the pipeline.

        A clip needs less GPU memory and takes longer, by one copy of each part. For networks larger than the GPU there is
        `device_map="auto"`. UserError if there is no such GPU, and for a network with a device_map.
        """
        if gpu_id is not None and device is not None:
            raise UserError(f"both gpu_id {shown(gpu_id)} and device {shown(device)} are given; give one of them")
        if is_spread(self.model):
            raise UserError("a network with a device_map is offloaded already; load it without one")
        found = pick_device("cuda" if device is None and gpu_id is None else f"cuda:{gpu_id}" if device is None else device)
        for part in self.networks():
            part.to("cpu")
        self.offload_device = found
        return self

    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """Return all networks of the pipeline."""

    @contextmanager
    def stage(self, *parts: nn.Module) -> Iterator[None]:
        """Move these networks to the working device for the block, and back to host memory after it."""
        if self.offload_device is None:
            yield
            return
        for part in parts:
            part.to(self.offload_device)
        try:
            yield
        finally:
            for part in parts:
                part.to("cpu")
            if self.offload_device.type == "cuda":
                torch.cuda.empty_cache()
