"""A training run before it is paid for: its steps, their tokens and FLOPs, the days, and on what it fits.

All follows from the settings; weights, tokenizers and shards need not be there. What settings do not say is assumed and named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lumos.data.buckets import bucket_for, bucket_sizes
from lumos.data.curriculum import Curriculum, StepShape, check_shares
from lumos.data.ingest.encode import TARGET_SIZES, ClipSettings
from lumos.data.shards import format as shards
from lumos.errors import RunError, UserError
from lumos.models.lumos1.cost import (
    Trainee,
    code_count,
    host_bytes,
    mean_mask_ratio,
    memory_moments,
    planned_config,
    sequence_layout,
)
from lumos.models.lumos1.flops import layer_flops_per_token, training_flops
from lumos.models.lumos1.sequence import Layout, num_latent_frames
from lumos.models.lumos1.training import check_clip_shape
from lumos.planning.gpus import GIB, RESERVED, Hardware
from lumos.planning.sharding import PARTS, Spread
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.engine import pick_precision
from lumos.training.settings import DataSettings, TrainingSettings

SHIPPED = {
    f"configs/deepspeed/zero{name}.json": spread
    for name, spread in (
        ("0", Spread(0)), ("1", Spread(1)), ("2", Spread(2)), ("3", Spread(3)),
        ("2-offload", Spread(2, offload_optimizer=True)), ("3-offload", Spread(3, offload_optimizer=True, offload_weights=True)),
    )
}  # fmt: skip
"""What the shipped DeepSpeed files say."""
TEXT_TOKENS = {"worlds": 16, "shards": 160}
"""Of a prompt, unless told: a caption of the small worlds; the published template around one of some eighty words."""


@dataclass(frozen=True)
class Work:
    """The steps of one shape: `steps` of them, each of `clips` sequences over all processes, on average.

    `share` is what the fullest process has of them. `layout` is the usual sequence, of which `supervised` codes are asked on
    average, `longest` that of the size with the most tokens.
    """

    kind: str
    steps: int
    clips: float
    share: int
    layout: Layout
    longest: Layout
    supervised: float

    def rows(self, micro_batch_size: int | None) -> int:
        """Sequences of a micro-batch, as `Batch.micro_batches` makes them."""
        return min(micro_batch_size or self.share, self.share)


@dataclass(frozen=True)
class Way:
    """A way to run the same steps. `file`: the shipped DeepSpeed file that stands for `spread`; None: as the settings have it."""

    spread: Spread
    micro_batch_size: int | None
    file: str | None = None


@dataclass(frozen=True)
class Need:
    """Bytes on a GPU: each part at its largest, all together at the worst moment of a `step`, and at the `start` of the run.

    Parts are not at their largest all at once, so they add up to more than a step.
    """

    parts: dict[str, int]
    step: int
    start: int

    @property
    def peak(self) -> int:
        return max(self.step, self.start)


def clip_sizes(data: DataSettings, unit: int) -> tuple[tuple[int, int], tuple[int, int], str | None]:
    """(height, width) of a usual clip and of the one with the most tokens, and what was assumed. UserError if nothing says it."""
    if data.source == "worlds":
        return (data.height, data.width), (data.height, data.width), None
    size = data.size
    if size is None:
        try:
            size = shards.read_description(Path(data.path))["settings"]["size"]
        except (OSError, UserError, RunError, KeyError) as error:
            raise UserError(
                f"data.size is null and no shards can be read in {data.path}; say how large clips will be, such as data.size=256p"
            ) from error
    if size not in TARGET_SIZES:
        only = ClipSettings(size=size).target(1, 1)
        if any(side % unit for side in only):
            raise UserError(f"data.size is {size}; height and width must be multiples of {unit}")
        return only, only, None
    usual = bucket_for(9, 16, TARGET_SIZES[size])
    longest = max(bucket_sizes(TARGET_SIZES[size]), key=lambda side: side[0] * (side[1] + 8))  # 8 pixels a code, a newline a row
    return usual, longest, f"clips have {usual[0]}x{usual[1]} pixels, for memory the most of {size}, {longest[0]}x{longest[1]}"


def sent_bytes(model: Trainee, spread: Spread, micro_batches: int) -> float:
    """What a process sends in a step (ZeRO, arXiv 1910.02054, section 7): gradients in float32, weights as they are stored."""
    if spread.stage is None:
        return 0.0
    gradients, weight = 4 * model.trained, 2 if spread.half else 4
    if spread.stage == 0:
        volume = 2 * gradients
    elif spread.stage < 3:
        volume = gradients * (micro_batches if spread.stage == 2 else 1) + weight * model.trained
    else:
        volume = micro_batches * (gradients + 2 * weight * model.parameters)
    return volume * (spread.world - 1) / spread.world


class TrainingPlan:
    """`settings` on `hardware`; UserError where the trainer would not start. `utilisation`: the share of the peak in use (MFU)."""

    def __init__(self, settings: TrainingSettings, hardware: Hardware, *, utilisation: float, text_tokens: int | None = None):
        training, data = settings.training, settings.data
        self.settings, self.hardware, self.utilisation = settings, hardware, utilisation
        config, about_model = planned_config(settings)
        check_clip_shape(config, data)
        self.model = Trainee.of(config, settings.lora if settings.lora.rank else None)
        self.usual, self.largest, about_size = clip_sizes(data, config.pixels_per_size_unit)
        self.text_tokens = TEXT_TOKENS[data.source] if text_tokens is None else text_tokens
        shorter = f"all clips have {data.num_frames} frames, none only data.min_frames" if data.min_frames else None
        text = f"a prompt has {self.text_tokens} tokens (--text-tokens)" if text_tokens is None else None
        muon = "Muon's own products cost nothing" if training.optimizer == "muon" else None
        self.assumed = [said for said in (about_model, about_size, shorter, text, muon) if said]

        curriculum = Curriculum(data.stages, training.batch_size, training.tokens_per_batch)
        most_codes = {kind: code_count(self._layout(kind, self.largest)) for kind in curriculum.kinds}
        check_shares(curriculum, most_codes, hardware.count)
        self.works = [self._work(shape, steps) for shape, steps in curriculum.counts(training.max_steps).items()]
        device = torch.device("cuda" if training.device == "auto" else training.device)
        half = pick_precision(training.precision, device) == torch.bfloat16
        self.common = {
            "world": hardware.count, "half": half, "on_gpu": device.type != "cpu", "averaged": training.ema_decay > 0,
            "muon": training.optimizer == "muon", "checkpointing": training.activation_checkpointing,
        }  # fmt: skip
        self.configured = Way(self._own_spread(), training.micro_batch_size)

    def _layout(self, kind: str, size: tuple[int, int], num_frames: int | None = None) -> Layout:
        config = self.model.config
        frames = 1 if kind == "image" else num_frames or self.settings.data.num_frames
        t = num_latent_frames(frames, config.temporal_compression)
        return sequence_layout(config, self.text_tokens, t, *size)

    def _work(self, shape: StepShape, steps: int) -> Work:
        usual, longest = (self._layout(shape.kind, size, shape.first_frames) for size in (self.usual, self.largest))
        clips = shape.batch_size
        if clips is None:  # counted in codes of whole clips; worlds draw whole clips only
            clips = shape.tokens / code_count(self._layout(shape.kind, self.usual))
            clips = clips if self.settings.data.source == "shards" else int(clips)
        supervised = mean_mask_ratio(self.settings.masking, len(usual.frames)) * code_count(usual)
        kind = shape.kind if shape.first_frames is None else f"{shape.kind}, first {shape.first_frames} frames"
        return Work(kind, steps, clips, math.ceil(clips / self.hardware.count), usual, longest, supervised)

    def _own_spread(self) -> Spread:
        stage = self.settings.zero_stage_with(self.hardware.count)
        if stage is None:
            return Spread(None, **self.common)
        precision = torch.bfloat16 if self.common["half"] else torch.float32
        zero = deepspeed_options(self.settings, stage, precision)["zero_optimization"]
        offloads = {
            field: zero.get(key, {}).get("device", "none") != "none"
            for field, key in (("offload_optimizer", "offload_optimizer"), ("offload_weights", "offload_param"))
        }
        sizes = {"bucket": int(zero.get("reduce_bucket_size", 5e8)), "live": int(zero.get("stage3_max_live_parameters", 1e9))}
        return Spread(zero["stage"], **self.common, **offloads, **sizes)

    def ways(self) -> list[Way]:
        """What a table compares: the shipped DeepSpeed files, in their place what the settings say, and one process alone.

        Muon leaves out those that divide matrices.
        """
        own, micro = self.configured.spread, self.settings.training.micro_batch_size
        ways = [Way(replace(spread, **self.common), micro, file) for file, spread in SHIPPED.items()]
        ways = [way for way in ways if not (own.muon and way.spread.stage)]
        if self.hardware.count == 1:
            ways.insert(0, Way(Spread(None, **self.common), micro))
        same = [i for i, way in enumerate(ways) if way.spread.name == own.name]
        if same:
            ways[same[0]] = self.configured
        else:
            ways.append(self.configured)
        return ways

    def needed(self, way: Way) -> Need:
        """Of the worst step."""
        worst = Need({}, 0, 0)
        for work in self.works:
            rows = work.rows(way.micro_batch_size)
            moments = memory_moments(self.model, replace(way.spread, accumulates=rows < work.share), rows, work.longest)
            start = sum(moments.pop("start").values())
            parts = {part: max(moment[part] for moment in moments.values()) for part in PARTS}
            need = Need(parts, max(sum(moment.values()) for moment in moments.values()), start)
            worst = max(worst, need, key=lambda found: found.step)
        return worst

    def free(self, way: Way) -> int:
        """Bytes of a GPU that are left; below 0 it does not fit."""
        return self.hardware.memory - RESERVED - self.needed(way).peak

    def cheapest(self) -> Way | None:
        """The first way that fits, in this order: nothing offloaded, micro-batches as they are set before smaller ones, nothing
        computed twice, weights not divided, as stages 0 to 2 send less than 3; of equals that of the settings."""
        set_size = self.settings.training.micro_batch_size
        sizes = [set_size]
        rows = max(work.rows(set_size) for work in self.works)
        while rows > 1:
            rows //= 2
            sizes.append(rows)
        ways = sorted(self.ways(), key=lambda way: (way.spread.stage == 3, way is not self.configured, way.spread.stage == 0))
        for offloaded in range(3):
            for size in sizes:
                for checkpointing in (False, True):
                    for way in ways:
                        chosen = replace(way, spread=replace(way.spread, checkpointing=checkpointing), micro_batch_size=size)
                        if len(way.spread.offloaded) == offloaded and self.free(chosen) >= 0:
                            return chosen
        return None

    def changes(self, way: Way) -> list[str]:
        """Overrides that make these settings run that way."""
        settings, changes = self.settings, []
        if way.file:
            changes.append(f"deepspeed.config={way.file}")
        elif way.spread.stage is None and settings.deepspeed.config is not None:
            changes.append("deepspeed.config=null")
        if changes and settings.deepspeed.zero_stage is not None:
            changes.append("deepspeed.zero_stage=null")
        if way.spread.checkpointing != settings.training.activation_checkpointing:
            changes.append(f"training.activation_checkpointing={str(way.spread.checkpointing).lower()}")
        if way.micro_batch_size != settings.training.micro_batch_size:
            changes.append(f"training.micro_batch_size={way.micro_batch_size}")
        return changes

    def advice(self) -> str:
        """What to set, in a sentence."""
        free, best = self.free(self.configured), self.cheapest()
        if best is None and free < 0:
            least = min(self.needed(replace(way, micro_batch_size=1)).peak for way in self.ways()) + RESERVED
            return (
                f"Nothing fits, as at least {least / GIB:.1f} GiB are needed: take more or larger GPUs, shorter or smaller clips, "
                "or a smaller model."
            )
        said = f"These settings fit, with {free / GIB:.1f} GiB to spare." if free >= 0 else "These settings do not fit."
        if best is None or not (changes := self.changes(best)):
            return said
        what = "Less work or traffic" if free >= 0 else "What does"
        return f"{said} {what}, with {self.free(best) / GIB:.1f} GiB to spare: {' '.join(changes)}"

    def report(self) -> dict[str, Any]:
        """All of it as plain JSON values; bytes, FLOPs, seconds."""
        hardware, micro = self.hardware, self.settings.training.micro_batch_size
        speed = hardware.count * hardware.peak * self.utilisation
        kinds = [self._kind(work, micro, speed) for work in self.works]
        total = {key: sum(kind["steps"] * kind[key] for kind in kinds) for key in ("tokens", "flops", "seconds")}
        ways = []
        for way in self.ways():
            need = self.needed(way)
            ways.append(
                {
                    "name": way.spread.name, "file": way.file, "configured": way is self.configured, "parts": need.parts,
                    "step": need.step, "start": need.start, "host": host_bytes(self.model, way.spread), "fits": self.free(way) >= 0,
                }
            )  # fmt: skip
        return {
            "name": self.settings.name, "parameters": self.model.parameters, "trained": self.model.trained,
            "hardware": vars(hardware), "reserved": RESERVED, "utilisation": self.utilisation, "steps": kinds,
            "total": {"steps": sum(kind["steps"] for kind in kinds), **total, "days": total["seconds"] / 86400},
            "memory": ways, "advice": self.advice(), "assumed": self.assumed,
        }  # fmt: skip

    def _kind(self, work: Work, micro: int | None, speed: float) -> dict[str, Any]:
        adapters = self.model.trained if self.model.lora else None
        config, rows = self.model.config, work.rows(micro)
        micro_batches = math.ceil(work.share / rows)
        flops = work.clips * training_flops(config, work.layout, work.supervised, adapters)
        again = work.clips * work.layout.length * layer_flops_per_token(config, 0)  # kernels of attention are not repeated
        return {
            "kind": work.kind, "steps": work.steps, "clips": work.clips, "clips_of_a_process": work.share, "micro_batch": rows,
            "micro_batches": micro_batches, "tokens_of_a_clip": work.layout.length,
            "tokens": work.clips * work.layout.length, "flops": flops,
            "flops_computed_again": again if self.configured.spread.checkpointing else 0.0, "seconds": flops / speed,
            "sent": sent_bytes(self.model, self.configured.spread, micro_batches),
        }  # fmt: skip
