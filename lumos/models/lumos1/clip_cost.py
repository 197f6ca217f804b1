"""The cost of a clip: tokens, FLOPs and bytes. It follows from the config alone, so no weights are loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lumos.errors import UserError
from lumos.models.lumos1.benchmarks.decoding import DecodingCase
from lumos.models.lumos1.benchmarks.roofline import products
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.conversion import read_config
from lumos.models.lumos1.request import check_effect, check_length, largest_side
from lumos.models.lumos1.sequence import num_latent_frames
from lumos.models.lumos1.settings import GenerationSettings
from lumos.models.lumos1.training_cost import meta_model
from lumos.pipeline.defaults import ClipDefaults, read_defaults
from lumos.pipeline.inputs import check_num_frames
from lumos.pipeline.request import check_side
from lumos.runtime import parameter_count


@dataclass(frozen=True)
class LumosClipCost:
    """The cost of one clip that `generate_frames` makes from a prompt of `text_tokens` tokens.

    The cost of the video tokenizer is not included. With image_guidance_scale it is a clip with given frames, since other clips
    cannot have this option; given frames count like made ones. Raises UserError or ValueError for a clip that the
    pipeline would refuse.
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
    def case(self) -> DecodingCase:
        """The clip as a `DecodingCase` of the benchmark, on the meta device: it has shapes, but no weights and no ids."""
        for name in ("height", "width"):
            check_side(getattr(self.clip, name), name, self.config.pixels_per_size_unit, largest_side(self.config))
        rows, cols = (side // self.config.spatial_compression for side in (self.clip.height, self.clip.width))
        header = 3  # video_start, duration, fps
        conditional, unconditional = (torch.empty(n, device="meta") for n in (self.text_tokens + 2 + header, header))
        return DecodingCase(
            meta_model(self.config).to(self.dtype), conditional, unconditional if self.settings.is_guided else None,
            (rows, cols), num_latent_frames(self.clip.num_frames, self.config.temporal_compression), self.settings,
            unconditional if self.settings.has_three_branches else None,
        )  # fmt: skip

    def warn_of_effects(self, given: Mapping[str, Any]) -> None:
        """Warn of the options in `given` that have no effect on this clip; `given` holds those that the user set."""
        check_effect(self.case.frames, self.case.frames, given, self.settings)

    def report(self, peak: float, utilisation: float) -> dict[str, Any]:
        """Return the cost as plain JSON values.

        peak: the peak FLOP/s of the device. utilisation: the share of the peak that is reached, for the
        estimate of the seconds.
        """
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
            "may_end_early": self.settings.confidence_threshold is not None,
            "flops": {**flops, "total": total},
            "bytes": {"weights": parameters * self.dtype.itemsize, "cache": case.cache_bytes},
            "peak": peak, "utilisation": utilisation, "seconds": total / (peak * utilisation),
        }  # fmt: skip


def lighter(plan: LumosClipCost, clips: int = 1) -> list[tuple[str, int]]:
    """Return (options, bytes of weights and cache) of cheaper plans for `clips` clips at a time.

    Each plan changes one setting. It at least halves the cache, or it changes the dtype to bfloat16.
    Settings that cannot do so are left out.
    """
    weights = parameter_count(plan.case.model)

    def needed(other: LumosClipCost) -> int:
        return weights * other.dtype.itemsize + clips * other.case.cache_bytes

    def largest(options: str, plans: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, int]]:
        for values, changed in plans:
            with suppress(ValueError):
                other = replace(plan, **changed)
                if 2 * other.case.cache_bytes <= plan.case.cache_bytes:
                    yield options.format(*values.split()), needed(other)
                    return

    clip, settings, stride, unit = plan.clip, plan.settings, plan.config.temporal_compression, plan.config.pixels_per_size_unit
    found = []
    if clips > 1:
        found.append((f"--batch-size {clips // 2}", weights * plan.dtype.itemsize + clips // 2 * plan.case.cache_bytes))
    if plan.dtype.itemsize > 2:
        found.append(("--dtype bfloat16", needed(replace(plan, dtype=torch.bfloat16))))
    with warnings.catch_warnings(action="ignore"):
        found += largest("--history-frames {}", (
            (f"{n}", {"settings": replace(settings, history_frames=n)})
            for n in range((settings.history_frames or plan.case.frames) - 1, 0, -1)
        ))  # fmt: skip
        found += largest("--num-frames {}", (
            (f"{n}", {"clip": replace(clip, num_frames=n)}) for n in range(clip.num_frames - stride, 0, -stride)
        ))  # fmt: skip
        found += largest("--height {} --width {}", (
            (f"{height} {width}", {"clip": replace(clip, height=height, width=width)})
            for height in range(clip.height - unit, 0, -unit)
            for width in (round(clip.width * height / clip.height / unit) * unit,)
            if width
        ))  # fmt: skip
    return found


def clip_cost(
    config: LumosConfig, clip: ClipDefaults, sampling: GenerationSettings, text_tokens: int, dtype: torch.dtype
) -> LumosClipCost:
    """Return the cost of one clip from text alone. Raises UserError for a clip that the pipeline would refuse."""
    return LumosClipCost(config, clip, sampling.for_text_alone(), text_tokens, dtype)


def model_of(folder: str | Path | None, preset: str | None) -> tuple[LumosConfig, GenerationSettings, ClipDefaults]:
    """Return the config and the defaults of a model folder, or of a preset.

    Only config.json and pipeline.json of the folder are read.
    """
    if preset is not None:
        return LumosConfig.preset(preset), GenerationSettings(), ClipDefaults()
    return read_config(Path(folder)), *read_defaults(Path(folder), GenerationSettings)


def out_of_memory_advice(
    config: LumosConfig, clip: ClipDefaults, sampling: GenerationSettings, text_tokens: int, dtype: torch.dtype, clips: int = 1
) -> str:
    """Return a sentence for a clip that ran out of memory: the bytes that it needs, and settings that need fewer."""
    plan = LumosClipCost(config, clip, sampling, text_tokens, dtype)
    weights, cache = parameter_count(plan.case.model) * plan.dtype.itemsize, clips * plan.case.cache_bytes
    less = "; ".join(f"{options} needs {in_units(size)}" for options, size in lighter(plan, clips))
    return (
        f"weights need {in_units(weights)} and the cache {in_units(cache)}, besides the activations of one step: {less}; "
        "`python -m lumos plan --generate` counts other settings"
    )


def in_units(size: int) -> str:
    """Return a number of bytes as text in MiB or GiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
