"""The plan of a training run: its steps, their tokens and FLOPs, its time, and the strategies that fit into memory.

The plan follows from the settings alone: weights, tokenizers and shards need not exist. Assumptions that the
settings do not state are listed in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lumos.data.buckets import bucket_for, bucket_sizes
from lumos.data.curriculum import Curriculum, StepShape, check_shares
from lumos.data.ingest.encode import TARGET_SIZES, ClipSettings
from lumos.data.shards.description import read_description
from lumos.errors import RunError, UserError
from lumos.planning.cost import TrainingCost
from lumos.planning.fixed_memory import host_bytes
from lumos.planning.gpus import GIB, RESERVED, Hardware
from lumos.planning.sharding import PARTS, Sharding
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.engine import pick_precision
from lumos.training.sections import WHOLE_MATRICES, DataSettings
from lumos.training.settings import TrainingSettings

SHIPPED = {
    f"configs/deepspeed/zero{name}.json": sharding
    for name, sharding in (
        ("0", Sharding(0)), ("1", Sharding(1)), ("2", Sharding(2)), ("3", Sharding(3)),
        ("2-offload", Sharding(2, offload_optimizer=True)),
        ("3-offload", Sharding(3, offload_optimizer=True, offload_weights=True)),
    )
}  # fmt: skip
"""The shipped DeepSpeed files and the sharding of each."""
TEXT_TOKENS = {"worlds": 16, "shards": 160}
"""The default number of prompt tokens by source: a caption of a synthetic scene, or the published template with 80 words."""


@dataclass(frozen=True)
class StepGroup:
    """The training steps of one shape.

    kind        "image" or "video", with the number of frames if only the first ones are used
    steps       number of steps
    clips       mean number of sequences in a step, over all processes
    share       largest number of sequences that one process has in a step
    sequence    the sequence of a usual clip
    longest     the sequence of a clip of the size with the most tokens
    supervised  mean number of losses of a sequence
    """

    kind: str
    steps: int
    clips: float
    share: int
    sequence: Any
    longest: Any
    supervised: float

    def rows(self, micro_batch_size: int | None) -> int:
        """Return the number of sequences in a micro-batch, as `Batch.micro_batches` divides a batch."""
        return min(micro_batch_size or self.share, self.share)


@dataclass(frozen=True)
class Strategy:
    """One way to run the steps.

    `file` is the shipped DeepSpeed file for `sharding`; None means the settings themselves, or no DeepSpeed.
    """

    sharding: Sharding
    micro_batch_size: int | None
    file: str | None = None


@dataclass(frozen=True)
class Estimate:
    """The memory of one GPU in bytes.

    parts  the peak of each part; parts peak at different moments, so their sum is larger than `step`
    step   the peak of all parts together in a step
    start  the memory at the start of the run
    """

    parts: dict[str, int]
    step: int
    start: int

    @property
    def peak(self) -> int:
        return max(self.step, self.start)


def clip_sizes(data: DataSettings, unit: int) -> tuple[tuple[int, int], tuple[int, int], str | None]:
    """Return the (height, width) of a usual clip, that of the clip with the most tokens, and the assumption made or None.

    `unit` divides height and width of every clip. Raises UserError if neither settings nor shards have a size.
    """
    if data.source == "worlds":
        return (data.height, data.width), (data.height, data.width), None
    size = data.size
    if size is None:
        try:
            size = read_description(Path(data.path))["settings"]["size"]
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


class TrainingPlan:
    """The plan of a training with `settings` on `hardware`.

    `training_cost(settings, text_tokens)` is the cost function of the generator. `utilisation` is the share of
    the peak FLOP/s that the run reaches (MFU). `text_tokens` is the number of tokens of a prompt; None: the
    default of the data source. Raises UserError for settings with which the training would not start.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        training_cost: Callable[[TrainingSettings, int], TrainingCost],
        hardware: Hardware,
        *,
        utilisation: float,
        text_tokens: int | None = None,
    ):
        training, data = settings.training, settings.data
        self.settings, self.hardware, self.utilisation = settings, hardware, utilisation
        self.text_tokens = TEXT_TOKENS[data.source] if text_tokens is None else text_tokens
        self.cost: TrainingCost = training_cost(settings, self.text_tokens)
        self.usual, self.largest, about_size = clip_sizes(data, self.cost.size_unit)
        shorter = f"all clips have {data.num_frames} frames, none only data.min_frames" if data.min_frames else None
        text = f"a prompt has {self.text_tokens} tokens (--text-tokens)" if text_tokens is None else None
        muon = "Muon's own products cost nothing" if training.optimizer == "muon" else None
        self.assumed = [said for said in (*self.cost.assumed, about_size, shorter, text, muon) if said]

        curriculum = Curriculum(data.stages, training.batch_size, training.tokens_per_batch)
        most_codes = {kind: self.cost.codes(self._sequence(kind, self.largest)) for kind in curriculum.kinds}
        check_shares(curriculum, most_codes, hardware.count)
        self.groups = [self._group(shape, steps) for shape, steps in curriculum.counts(training.max_steps).items()]
        device = torch.device("cuda" if training.device == "auto" else training.device)
        half = pick_precision(training.precision, device) == torch.bfloat16
        self.common = {
            "world": hardware.count, "half": half, "on_gpu": device.type != "cpu", "averaged": training.ema_decay > 0,
            "optimizer": training.optimizer, "checkpointing": training.activation_checkpointing,
        }  # fmt: skip
        self.configured = Strategy(self._own_sharding(), training.micro_batch_size)

    def _sequence(self, kind: str, size: tuple[int, int], num_frames: int | None = None) -> Any:
        return self.cost.sequence(1 if kind == "image" else num_frames or self.settings.data.num_frames, *size)

    def _group(self, shape: StepShape, steps: int) -> StepGroup:
        usual, longest = (self._sequence(shape.kind, size, shape.first_frames) for size in (self.usual, self.largest))
        clips = shape.batch_size
        if clips is None:  # the batch is a number of codes; synthetic scenes fill it with whole clips only
            clips = shape.tokens / self.cost.codes(self._sequence(shape.kind, self.usual))
            clips = clips if self.settings.data.source == "shards" else int(clips)
        supervised = self.cost.supervised(usual)
        kind = shape.kind if shape.first_frames is None else f"{shape.kind}, first {shape.first_frames} frames"
        return StepGroup(kind, steps, clips, math.ceil(clips / self.hardware.count), usual, longest, supervised)

    def _own_sharding(self) -> Sharding:
        stage = self.settings.zero_stage_with(self.hardware.count)
        if stage is None:
            return Sharding(None, **self.common)
        precision = torch.bfloat16 if self.common["half"] else torch.float32
        zero = deepspeed_options(self.settings, stage, precision)["zero_optimization"]
        offloads = {
            field: zero.get(key, {}).get("device", "none") != "none"
            for field, key in (("offload_optimizer", "offload_optimizer"), ("offload_weights", "offload_param"))
        }
        sizes = {"bucket": int(zero.get("reduce_bucket_size", 5e8)), "live": int(zero.get("stage3_max_live_parameters", 1e9))}
        return Sharding(zero["stage"], **self.common, **offloads, **sizes)

    def strategies(self) -> list[Strategy]:
        """Return the strategies to compare: the settings, the shipped DeepSpeed files, and on one GPU plain PyTorch.

        With an optimizer that needs whole matrices, strategies that divide them are left out.
        """
        own, micro = self.configured.sharding, self.settings.training.micro_batch_size
        strategies = [Strategy(replace(sharding, **self.common), micro, file) for file, sharding in SHIPPED.items()]
        strategies = [strategy for strategy in strategies if not (own.optimizer in WHOLE_MATRICES and strategy.sharding.stage)]
        if self.hardware.count == 1:
            strategies.insert(0, Strategy(Sharding(None, **self.common), micro))
        same = [i for i, strategy in enumerate(strategies) if strategy.sharding.name == own.name]
        if same:
            strategies[same[0]] = self.configured
        else:
            strategies.append(self.configured)
        return strategies

    def estimate(self, strategy: Strategy) -> Estimate:
        """Return the memory of the step group that needs the most."""
        worst = Estimate({}, 0, 0)
        for group in self.groups:
            rows = group.rows(strategy.micro_batch_size)
            moments = self.cost.memory_moments(replace(strategy.sharding, accumulates=rows < group.share), rows, group.longest)
            start = sum(moments.pop("start").values())
            parts = {part: max(moment[part] for moment in moments.values()) for part in PARTS}
            estimate = Estimate(parts, max(sum(moment.values()) for moment in moments.values()), start)
            worst = max(worst, estimate, key=lambda found: found.step)
        return worst

    def free(self, strategy: Strategy) -> int:
        """Return the bytes of a GPU that stay free. The result is negative if the strategy does not fit."""
        return self.hardware.memory - RESERVED - self.estimate(strategy).peak

    def cheapest(self) -> Strategy | None:
        """Return the cheapest strategy that fits, or None if none fits.

        A strategy is cheaper if it offloads fewer parts; then, in this order, if it has larger micro-batches (up
        to those of the settings), no recomputation, and a stage below 3, which sends less. Among equals, the
        strategy of the settings comes first.
        """
        set_size = self.settings.training.micro_batch_size
        sizes = [set_size]
        rows = max(group.rows(set_size) for group in self.groups)
        while rows > 1:
            rows //= 2
            sizes.append(rows)
        order = {strategy: (strategy.sharding.stage == 3, strategy is not self.configured, strategy.sharding.stage == 0)
                 for strategy in self.strategies()}  # fmt: skip
        strategies = sorted(order, key=order.__getitem__)
        for offloaded in range(3):
            for size in sizes:
                for checkpointing in (False, True):
                    for strategy in strategies:
                        sharding = replace(strategy.sharding, checkpointing=checkpointing)
                        chosen = replace(strategy, sharding=sharding, micro_batch_size=size)
                        if len(strategy.sharding.offloaded) == offloaded and self.free(chosen) >= 0:
                            return chosen
        return None

    def changes(self, strategy: Strategy) -> list[str]:
        """Return the overrides that change these settings to the strategy."""
        settings, changes = self.settings, []
        if strategy.file:
            changes.append(f"deepspeed.config={strategy.file}")
        elif strategy.sharding.stage is None and settings.deepspeed.config is not None:
            changes.append("deepspeed.config=null")
        if changes and settings.deepspeed.zero_stage is not None:
            changes.append("deepspeed.zero_stage=null")
        if strategy.sharding.checkpointing != settings.training.activation_checkpointing:
            changes.append(f"training.activation_checkpointing={str(strategy.sharding.checkpointing).lower()}")
        if strategy.micro_batch_size != settings.training.micro_batch_size:
            changes.append(f"training.micro_batch_size={strategy.micro_batch_size}")
        return changes

    def advice(self) -> str:
        """Return a sentence on whether the settings fit, and which overrides are better."""
        free, best = self.free(self.configured), self.cheapest()
        if best is None and free < 0:
            least = min(self.estimate(replace(strategy, micro_batch_size=1)).peak for strategy in self.strategies()) + RESERVED
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
        """Return the whole plan as plain JSON values, in bytes, FLOPs and seconds."""
        hardware, micro = self.hardware, self.settings.training.micro_batch_size
        speed = hardware.count * hardware.peak * self.utilisation
        kinds = [self._kind(group, micro, speed) for group in self.groups]
        total = {key: sum(kind["steps"] * kind[key] for kind in kinds) for key in ("tokens", "flops", "seconds")}
        strategies = []
        for strategy in self.strategies():
            found = self.estimate(strategy)
            strategies.append(
                {
                    "name": strategy.sharding.name, "file": strategy.file, "configured": strategy is self.configured,
                    "parts": found.parts, "step": found.step, "start": found.start,
                    "host": host_bytes(self.cost, strategy.sharding), "fits": self.free(strategy) >= 0,
                }
            )  # fmt: skip
        return {
            "name": self.settings.name, "parameters": self.cost.parameters, "trained": self.cost.trained,
            "hardware": vars(hardware), "reserved": RESERVED, "utilisation": self.utilisation, "steps": kinds,
            "total": {"steps": sum(kind["steps"] for kind in kinds), **total, "days": total["seconds"] / 86400},
            "memory": strategies, "advice": self.advice(), "assumed": self.assumed,
        }  # fmt: skip

    def _kind(self, group: StepGroup, micro: int | None, speed: float) -> dict[str, Any]:
        rows = group.rows(micro)
        micro_batches = math.ceil(group.share / rows)
        flops = group.clips * self.cost.training_flops(group.sequence, group.supervised)
        again = group.clips * self.cost.recomputed_flops(group.sequence)
        tokens = self.cost.tokens(group.sequence)
        return {
            "kind": group.kind, "steps": group.steps, "clips": group.clips, "clips_of_a_process": group.share, "micro_batch": rows,
            "micro_batches": micro_batches, "tokens_of_a_clip": tokens,
            "tokens": group.clips * tokens, "flops": flops,
            "flops_computed_again": again if self.configured.sharding.checkpointing else 0.0, "seconds": flops / speed,
            "sent": sent_bytes(self.cost, self.configured.sharding, micro_batches),
        }  # fmt: skip


def sent_bytes(cost: TrainingCost, sharding: Sharding, micro_batches: int) -> float:
    """Return the bytes that a process sends in a step: gradients in float32, weights in their stored dtype.

    Source: ZeRO, arXiv 1910.02054, section 7.
    """
    if sharding.stage is None:
        return 0.0
    gradients, weight = 4 * cost.trained, 2 if sharding.half else 4
    if sharding.stage == 0:
        volume = 2 * gradients
    elif sharding.stage < 3:
        volume = gradients * (micro_batches if sharding.stage == 2 else 1) + weight * cost.trained
    else:
        volume = micro_batches * (gradients + 2 * weight * cost.parameters)
    return volume * (sharding.world - 1) / sharding.world
