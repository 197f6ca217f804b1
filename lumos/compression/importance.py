"""How much each unit of a network matters, on fixed clips with fixed draws. F is the output, F_l that with unit l skipped.

    loss       L(F_l) - L(F), the rise of the training loss (sensitivity)
    elbo       the same, as the mean over the ranges of noise levels or mask ratios that occur (arXiv 2603.01685)
    output     sum (F_l - F)^2 / sum F^2 (LAPTOP-Diff, arXiv 2404.11098)
    bi         1 - cos between the streams before and behind the unit, mean over tokens (ShortGPT, arXiv 2403.03853)
    magnitude  mean of w^2 over the weights of the unit
    taylor     mean of |w dL/dw| over the weights of the unit

The error F_l - F = d_t at the T frames of a clip is split exactly: with the mean m over the frames, content is T |m|^2 and
motion sum_t |d_t - m|^2; their sum is sum_t |d_t|^2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumos.compression.depth import intervals, motion_trend
from lumos.compression.prunable import Prunable
from lumos.compression.trace import Trace
from lumos.errors import UserError
from lumos.training.loss_sums import LossSums
from lumos.training.task import Forward, Output

MEASURES = ("loss", "bi", "output", "magnitude", "taylor", "elbo")
SKIPPING = {"loss", "output", "elbo"}
"""Measures that need a forward pass without each unit."""
FRAMES = ("first frame", "later frames")
TOKENS = ("text", *FRAMES)
LEVEL = "level"
WHOLE = ""
"""The name of the network without a skipped unit, in tables of sums."""


class Probe(Protocol):
    """The functions of a training task that scores need."""

    score_groups: Mapping[str, tuple[str, ...]]

    def forward(self, model: nn.Module, micro: dict[str, Any]) -> Forward: ...

    def stream_frames(self, micro: dict[str, Any], stream: Tensor) -> Tensor: ...


def split(error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the content and the motion of an error [T, n], two scalars whose sum is that of its squares."""
    mean = error.mean(dim=0)
    return len(error) * mean.square().sum(), (error - mean).square().sum()


def direction_change(before: Tensor, behind: Tensor) -> Tensor:
    """Return 1 - cos between vectors [..., C], [...], as half the squared distance of unit vectors, which is 0 for equal ones."""
    return (F.normalize(before.float(), dim=-1) - F.normalize(behind.float(), dim=-1)).square().sum(-1) / 2


def squares(values: Tensor) -> Tensor:
    """Return the sum of squares of each frame of values [T, n], float64 [T], on the CPU."""
    return values.square().sum(dim=1, dtype=torch.float64).cpu()


class OutputSums:
    """Sums of squares of errors, and of the outputs that they are errors of; by frame and by level."""

    def __init__(self, levels: int):
        self.error = {"frames": torch.zeros(len(FRAMES)).double(), LEVEL: torch.zeros(levels).double()}
        self.power = {group: torch.zeros_like(sums) for group, sums in self.error.items()}
        self.clips: list[list[float]] = []  # content, motion and power of each clip
        self.has_motion = False

    def add(self, found: Output, whole: Output, power: Tensor) -> None:
        """Add the output of a clip without the unit, and the whole one, of which `power` has the squares."""
        error = found.values - whole.values
        self.clips.append([*map(float, split(error)), float(power.sum())])
        self.has_motion |= len(error) > 1
        for sums, values in ((self.error, squares(error)), (self.power, power)):
            sums["frames"].index_add_(0, whole.frames.clamp(max=1).cpu(), values)
            sums[LEVEL].index_add_(0, whole.levels.cpu(), values)

    def results(self, levels: Sequence[str]) -> dict[str, Any]:
        """Return output, output_by, content, motion and motion_share; shares of 0 are None. With enough clips, also intervals.

        content and motion are shares of the output's power, so that they add up to `output`.
        """
        content, motion, power = self.table().sum(0).tolist()
        named = {"frames": FRAMES, LEVEL: levels}
        return {
            "output": float(self.error["frames"].sum()) / power if power else None,
            "output_by": {group: ratios(names, self.error[group], self.power[group]) for group, names in named.items()},
            "content": content / power if power else None,
            "motion": motion / power if power and self.has_motion else None,
            "motion_share": motion / (content + motion) if content + motion and self.has_motion else None,
        } | (intervals(self.table()) if self.has_motion else {})

    def table(self) -> Tensor:
        """Return content, motion and power of each clip, float64 [N, 3]."""
        return torch.tensor(self.clips, dtype=torch.float64).view(-1, 3)


def ratios(names: Sequence[str], over: Tensor, under: Tensor) -> dict[str, float]:
    """Return {name: over / under} without the places whose denominator is 0."""
    return {name: a / b for name, a, b in zip(names, over.tolist(), under.tolist(), strict=True) if b}


class StreamSums:
    """Sums of the changes of direction of the stream, for each stage by kind of token, and between all pairs of stages."""

    def __init__(self, stages: Sequence[str]):
        self.stages = list(stages)
        self.change = {name: torch.zeros(2, len(TOKENS)).double() for name in stages}
        self.pairs = torch.zeros(len(stages) + 1, len(stages) + 1).double()

    def add(self, probe: Probe, micro: dict[str, Any], trace: Trace, axis: int) -> None:
        for call in range(len(next(iter(trace.before.values())))):
            ran = [name for name in self.stages if name in trace.before]
            for name in ran:
                before, behind = (streams[name][call].movedim(axis, -1) for streams in (trace.before, trace.behind))
                frames = probe.stream_frames(micro, before).flatten()
                kind = frames.clamp(-1, 1) + 1
                change = direction_change(before, behind).flatten().double()
                for at, values in ((0, change), (1, torch.ones_like(change))):
                    self.change[name][at].index_add_(0, kind[frames > -2].cpu(), values[frames > -2].cpu())
            points = [*(trace.before[name][call] for name in ran), trace.behind[ran[-1]][call]]
            if ran == self.stages and len({point.shape for point in points}) == 1:
                self._add_pairs(points, frames > -2, axis)

    def _add_pairs(self, points: list[Tensor], used: Tensor, axis: int) -> None:
        """Add half the squared distances of unit vectors; float64, so that the squares may be subtracted from each other."""
        units = torch.stack([
            F.normalize(point.movedim(axis, -1).flatten(0, -2)[used].float(), dim=-1).flatten().double() for point in points
        ])  # fmt: skip
        products = units @ units.T
        squares = products.diagonal()
        self.pairs += ((squares[:, None] + squares[None]) / 2 - products).clamp(min=0).triu(1).cpu()

    def results(self, name: str) -> dict[str, Any]:
        """Return bi and bi_by of a stage."""
        change, count = self.change[name]
        return {"bi": float(change.sum() / count.sum()), "bi_by": ratios(TOKENS, change, count)}

    def distances(self) -> list[list[float]] | None:
        """Return the mean of 1 - cos between the streams before stage i and before stage j; the last row is the end."""
        count = next(iter(self.change.values()))[1].sum()
        return None if not self.pairs.any() else ((self.pairs + self.pairs.T) / count).tolist()


def score(
    probe: Probe | None, model: Prunable, batches: Iterable[dict[str, Any]], units: Mapping[str, Sequence[str]],
    measures: Sequence[str], on_pass: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Return {"units": {name: scores}, "loss": of the network, "loss_by": by group, "distances", "motion_trend"}.

    "distances" are those of `plans.middle`, "motion_trend" is that of `depth.motion_trend`; both may be None.

    Scores by name of a measure: a number, or None where the measure is not defined. Besides there are `loss_by`, `bi_by` and
    `output_by` by group, content, motion and motion_share of the output, parameters, and time_share of whole stages.

    Args:
        probe: None if no measure needs clips (magnitude).
        model: in eval mode.
        batches: micro-batches of the probe.
        units: units to score and their parameters, as from `model.units()`.
        measures: some of MEASURES.
        on_pass: called after each forward pass.
    """
    named = {} if probe is None else probe.score_groups
    stages, groups = model.stages(), {group: len(names) for group, names in named.items()}
    if "bi" in measures and (parts := [name for name in units if name not in stages]):
        raise UserError(f"the measure bi compares the stream around a whole layer, which {parts[0]} is not; leave bi out")
    names = [WHOLE, *(units if SKIPPING & set(measures) else ())]
    losses = {name: LossSums(groups) for name in names}
    outputs = {name: OutputSums(groups[LEVEL]) for name in names[1:]} if "output" in measures else {}
    streams = StreamSums([name for name in stages if name in units])
    seconds, total = dict.fromkeys(units, 0.0), 0.0
    gradients = Gradients(model, units) if "taylor" in measures else None
    with torch.no_grad():
        for micro in batches:
            trace, found = Trace(model), {}
            started = time.perf_counter()
            with trace.recording():
                found[WHOLE] = probe.forward(model, micro)
            total += time.perf_counter() - started
            for name in seconds:
                seconds[name] += trace.seconds.get(name, 0.0)
            if "bi" in measures:
                streams.add(probe, micro, trace, model.stream_axis)
            on_pass()
            for name in names[1:]:
                with trace.replaying(trace.stage_of(name)), model.skipping([name]):
                    found[name] = probe.forward(model, micro)
                on_pass()
            if outputs:
                for whole, *parts in zip(*(made.outputs() for made in found.values()), strict=True):
                    power = squares(whole.values)
                    for name, part in zip(units, parts, strict=True):
                        outputs[name].add(part, whole, power)
            for name, made in found.items():
                losses[name].add(made.losses, made.places)
            if gradients is not None:
                gradients.add(probe, micro)
    weights = dict(model.named_parameters())
    scores: dict[str, dict[str, Any]] = {}
    for name, owned in units.items():
        parameters = [weights[parameter].detach() for parameter in owned]
        count = sum(weight.numel() for weight in parameters)
        scores[name] = {"parameters": count}
        if name in stages:
            scores[name]["time_share"] = seconds[name] / total if total else None
        if name in losses and {"loss", "elbo"} & set(measures):
            scores[name] |= loss_rise(losses[name], losses[WHOLE], named, "elbo" in measures)
        if "bi" in measures:
            scores[name] |= streams.results(name)
        if outputs:
            scores[name] |= outputs[name].results(named[LEVEL])
        if "magnitude" in measures:
            scores[name]["magnitude"] = float(sum(weight.double().square().sum() for weight in parameters)) / count
        if gradients is not None:
            scores[name]["taylor"] = gradients.change(owned, losses[WHOLE].table[1, 0]) / count
    total, count = losses[WHOLE].table
    return {
        "units": scores, "loss": losses[WHOLE].mean if count[0] else None, "loss_by": by_group(named, total, count),
        "distances": streams.distances() if "bi" in measures else None,
        "motion_trend": motion_trend([sums.table() for sums in outputs.values() if sums.has_motion]),
    }  # fmt: skip


def by_group(groups: Mapping[str, Sequence[str]], total: Tensor, count: Tensor) -> dict[str, dict[str, float]]:
    """Return {group: {place: total / count}} of two rows of `LossSums.table`."""
    sizes = [1, *map(len, groups.values())]
    rows = zip(groups.items(), total.split(sizes)[1:], count.split(sizes)[1:], strict=True)
    return {group: ratios(names, over, under) for (group, names), over, under in rows}


def loss_rise(found: LossSums, whole: LossSums, groups: Mapping[str, Sequence[str]], elbo: bool) -> dict[str, Any]:
    """Return the rise of the mean loss: in total, by place of each group, and with equal weight for each level."""
    by = by_group(groups, found.table[0] - whole.table[0], whole.table[1])
    more = {"elbo": sum(by[LEVEL].values()) / len(by[LEVEL]) if by[LEVEL] else None} if elbo else {}
    return {"loss": float((found.table[0, 0] - whole.table[0, 0]) / whole.table[1, 0]), "loss_by": by} | more


class Gradients:
    """Sums of the gradients of losses with respect to the weights of units. Other weights need none."""

    def __init__(self, model: nn.Module, units: Mapping[str, Sequence[str]]):
        self.model, self.sums = model, {}
        weights = dict(model.named_parameters())
        self.weights = {name: weights[name] for owned in units.values() for name in owned}

    def add(self, probe: Probe, micro: dict[str, Any]) -> None:
        """Add the gradient of the sum of the losses of a micro-batch. The flags and gradients of the weights stay as they are."""
        needed = {name: weight.requires_grad for name, weight in self.model.named_parameters()}
        try:
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(name in self.weights)
            with torch.enable_grad():
                losses = probe.forward(self.model, micro).losses
                if not losses.requires_grad:  # no loss depends on these weights
                    return
                found = torch.autograd.grad(losses.sum(), list(self.weights.values()), allow_unused=True)
        finally:
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(needed[name])
        for name, gradient in zip(self.weights, found, strict=True):
            if gradient is not None:
                self.sums[name] = self.sums.get(name, 0) + gradient

    def change(self, owned: Sequence[str], count: Tensor) -> float:
        """Return the sum of |w dL/dw| over parameters, of the mean of `count` losses."""
        parts = ((self.weights[name].detach() * self.sums[name]).abs().double().sum() for name in owned if name in self.sums)
        return float(sum(parts)) / float(count)
