"""A clip before a model is loaded for it: tokens, FLOPs, bytes. Only the config is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lumos.benchmarks.bound import products
from lumos.benchmarks.decoding import Case
from lumos.configuration import LumosConfig
from lumos.errors import UserError
from lumos.generation.settings import ClipDefaults, GenerationSettings
from lumos.pipeline_inputs import check_length, check_num_frames
from lumos.planning.memory import meta_model, parameter_count
from lumos.sequence import num_latent_frames, size_units


@dataclass(frozen=True)
class ClipPlan:
    """One clip from a prompt of `text_tokens`, as `generate_frames` makes it; the video tokenizer's part is not in it.

    UserError or ValueError for what the pipeline would refuse.
    """

    config: LumosConfig
    clip: ClipDefaults
    settings: GenerationSettings
    text_tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_num_frames(self.clip.num_frames, self.config.temporal_compression)
        if self.text_tokens > self.config.max_prompt_tokens:
            raise UserError(f"a prompt of {self.text_tokens} tokens is too long; this model reads {self.config.max_prompt_tokens}")
        case = self.case
        check_length(max(case.prefix_lengths), case.span, case.frames, self.settings, self.config)

    @property
    def case(self) -> Case:
        """The clip as the bench describes it, without weights and ids."""
        rows, cols = (
            size_units(pixels, name, self.config) * self.config.pixels_per_size_unit // self.config.spatial_compression
            for name, pixels in (("height", self.clip.height), ("width", self.clip.width))
        )
        header = 3  # video_start, duration, fps
        conditional, unconditional = (torch.empty(n, device="meta") for n in (self.text_tokens + 2 + header, header))
        return Case(
            meta_model(self.config).to(self.dtype), conditional, unconditional if self.settings.guidance_scale != 1 else None,
            (rows, cols), num_latent_frames(self.clip.num_frames, self.config.temporal_compression), self.settings,
        )  # fmt: skip

    def report(self, peak: float, utilisation: float) -> dict[str, Any]:
        """All of it as plain JSON values. peak: FLOP/s of the device, of which the share `utilisation` is reached."""
        case, flops = self.case, {"layers": 0, "attention": 0, "head": 0}
        parameters = parameter_count(case.model)
        for product in products(case):
            part = product.part.split()[0]
            flops[part if part in flops else "layers"] += product.flops
        total = sum(flops.values())
        return {
            "parameters": parameters, "clip": vars(self.clip), "latent_frames": case.frames,
            "codes_of_a_frame": math.prod(case.grid), "rows": len(case.prefix_lengths), "tokens": case.tokens,
            "steps": self.settings.steps_before(case.frames),
            "flops": {**flops, "total": total},
            "bytes": {"weights": parameters * self.dtype.itemsize, "cache": case.cache_bytes},
            "peak": peak, "utilisation": utilisation, "seconds": total / (peak * utilisation),
        }  # fmt: skip
