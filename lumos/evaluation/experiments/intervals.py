"""Means, spreads and intervals of the figures of runs that differ by their seed."""

from __future__ import annotations

import statistics
from typing import Any

WILSON = 1.96
"""Standard deviations of a normal distribution on each side of its mean that hold 95 %."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The same for the mean of so many values, whose standard deviation is measured (Student's t)."""


def summary(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return {name: [mean over seeds, standard deviation]} of each share and of the last value of each curve.

    Curves whose values are lists are left out. The standard deviation of one seed is 0.
    """
    return {
        name: [round(statistics.mean(found), 4), round(statistics.stdev(found), 4) if len(found) > 1 else 0.0]
        for name, found in values_of(runs).items()
    }


def values_of(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return {name: value of each run} of each share and of the last value of each curve that has numbers."""
    values: dict[str, list[float]] = {}
    for result in runs:
        for field, points in result.get("curves", {}).items():
            if points and isinstance(points[-1][1], float):
                values.setdefault(field, []).append(points[-1][1])
        for figure, share in (*result.get("shares", {}).items(), *costs_of(result).items()):
            values.setdefault(figure, []).append(share)
    return values


def costs_of(run: dict[str, Any]) -> dict[str, float]:
    """Return what a clip of a run costs, as far as the run measured it: CPU seconds, GFLOPs, and peak memory in MB."""
    costs = {"clip_gflops": run.get("clip_flops", 0) / 1e9, "memory_mb": run.get("peak_memory_mb", 0)}
    costs |= {"clip_seconds": run["cpu_seconds"] / run["clips"]} if "cpu_seconds" in run else {}
    return {name: cost for name, cost in costs.items() if cost}


def wilson(right: int, total: int) -> list[float]:
    """Return the 95 % interval of a share of which `right` of `total` trials are right (Wilson 1927)."""
    share, square = right / total, WILSON**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    reach = WILSON * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5 / (1 + square / total)
    return [round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)]


def share_difference(one: list[list[int]], other: list[list[int]]) -> list[float]:
    """Return the 95 % interval of the difference of two shares, each [right, all] of every seed (Newcombe 1998, method 10)."""
    (p, low, high), (q, least, most) = (
        (right / total, *wilson(right, total)) for right, total in (map(sum, zip(*counts, strict=True)) for counts in (one, other))
    )
    below, above = ((p - low) ** 2 + (most - q) ** 2) ** 0.5, ((high - p) ** 2 + (q - least) ** 2) ** 0.5
    return [round(p - q - below, 4), round(p - q + above, 4)]


def same_clips_difference(one: str, other: str) -> list[float]:
    """Return the 95 % interval of the difference of two shares of the same clips (Newcombe 1998, paired, method 10).

    one, other: for each prompt "1" if its clip is right, else "0". Both variants answer the same prompts from the same noise, so
    their verdicts go together, and the interval is narrower than `share_difference`.
    """
    total, (first, second) = len(one), (found.count("1") for found in (one, other))
    both = sum(a == b == "1" for a, b in zip(one, other, strict=True))
    (p, low, high), (q, least, most) = ((right / total, *wilson(right, total)) for right in (first, second))
    excess, spread = both * total - first * second, first * (total - first) * second * (total - second)
    excess = max(excess - total / 2, 0) if excess > 0 else excess
    together = excess / spread**0.5 if spread else 0.0  # the correlation of the verdicts, corrected for continuity
    below, above = (
        (mine**2 - 2 * together * mine * its + its**2) ** 0.5 for mine, its in ((p - low, most - q), (high - p, q - least))
    )
    return [round(p - q - below, 4), round(p - q + above, 4)]


def paired_difference(one: list[float], other: list[float]) -> list[float]:
    """Return the 95 % interval of the mean difference of two variants, seed by seed (Student's t). Both have 2 to 10 seeds."""
    return mean_interval([a - b for a, b in zip(one, other, strict=True)])


def mean_interval(values: list[float]) -> list[float]:
    """Return the 95 % interval of the mean of 2 to 10 values (Student's t)."""
    mean, reach = statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return [round(mean - reach, 4), round(mean + reach, 4)]


def intervals(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of each name in `summary`.

    Shares of clips are pooled over the seeds. Other values have the interval of the mean over the seeds, if there are two or
    more. Clips of one seed are not independent of each other where training differs by seed, so intervals of shares are narrow.
    """
    found: dict[str, list[float]] = {}
    for name, values in values_of(runs).items():
        pooled = [run["counts"][name] for run in runs if name in run.get("counts", {})]
        if pooled:
            found[name] = wilson(sum(right for right, _ in pooled), sum(total for _, total in pooled))
        elif len(values) in STUDENT:
            found[name] = mean_interval(values)
    return found
