"""Verdicts on the claims of an experiment: what the intervals of two variants say, and nothing more."""

from __future__ import annotations

import statistics
from typing import Any

from lumos.errors import UserError
from lumos.evaluation.experiments.intervals import paired_difference, same_clips_difference, share_difference, values_of

AGREES, DISAGREES, TOO_EARLY = "agrees", "does not agree", "too early to tell"


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the claims of an experiment, each with what was found.

    result: the content of the JSON file. The keys that are added: values, the means of the two sides; difference, of the
    first and the second; interval, its 95 % interval; at_chance, the figures that do not exceed their floor; verdict. UserError for
    a figure that some run has not.
    """
    trained = result["train"]["config"] is not None
    variants, losses = result["variants"], {field for row in result["variants"].values() for field in curves_of(row["runs"])}
    found = []
    for claim in result["claims"]:
        one, other = (runs_of(variants, claim[name]) for name in ("better", "than"))
        figure = claim["figure"]
        pairs = {name: (mean_of(one, name), mean_of(other, name)) for name in (figure, *claim["floor"])}
        interval = difference_of(one, other, figure, trained)
        gain = [-interval[1], -interval[0]] if figure in losses or figure.startswith("frechet") else interval
        low = at_chance(figure, pairs, claim["floor"])
        found.append({
            **claim, "values": [round(value, 4) for value in pairs[figure]],
            "difference": round(pairs[figure][0] - pairs[figure][1], 4), "interval": interval, "at_chance": low,
            "verdict": TOO_EARLY if low else verdict(gain, claim["margin"]),
        })  # fmt: skip
    return found


def runs_of(variants: dict[str, Any], names: str | list[str]) -> list[dict[str, Any]]:
    """Return the runs of a variant, or of several as one: of each seed, the means of their figures and the sums of their counts."""
    rows = [variants[name]["runs"] for name in ([names] if isinstance(names, str) else names)]
    return rows[0] if len(rows) == 1 else [mean_run(runs) for runs in zip(*rows, strict=True)]


def mean_run(runs: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the means of the figures that all runs have, and the sums of their counts of clips."""
    figures, counts = [values_of([run]) for run in runs], [run.get("counts", {}) for run in runs]
    return {
        "shares": {name: statistics.mean(found[name][0] for found in figures) for name in in_all(figures)},
        "counts": {name: [sum(parts) for parts in zip(*(found[name] for found in counts), strict=True)] for name in in_all(counts)},
    }


def in_all(tables: list[dict[str, Any]]) -> list[str]:
    return [name for name in tables[0] if all(name in found for found in tables)]


def verdict(gain: list[float], margin: float) -> str:
    """Return whether a gain exceeds a margin, by its 95 % interval [low, high]."""
    low, high = gain
    return AGREES if low > margin else DISAGREES if high < margin else TOO_EARLY


def at_chance(figure: str, pairs: dict[str, tuple[float, float]], floor: dict[str, float]) -> list[str]:
    """Return the figures whose values in the two variants, `pairs`, are too near to chance for a verdict on `figure`.

    One of the variants must exceed the floor of `figure` itself, so that it may be the finding that the other one does not.
    Both must exceed the floors of other figures.
    """
    return [name for name, least in floor.items() if (max if name == figure else min)(pairs[name]) <= least]


def difference_of(one: list[dict], other: list[dict], figure: str, trained: bool) -> list[float]:
    """Return the 95 % interval of the difference of a figure in the runs of two variants.

    A share of clips of models that are not trained here has the interval of the clips of all seeds, prompt by prompt if the runs
    hold a verdict on each clip. Where each seed trains a model of its own, the interval holds that one and the one of paired
    seeds. Other figures have that of paired seeds.
    """
    paired = paired_difference(*(measured(runs, figure) for runs in (one, other)))
    counts = [[run["counts"][figure] for run in runs if figure in run.get("counts", {})] for runs in (one, other)]
    if not all(counts):
        return paired
    sides = ["".join(run["verdicts"].get(figure, "") for run in runs if "verdicts" in run) for runs in (one, other)]
    by_prompt = len(sides[0]) == len(sides[1]) == sum(total for _, total in counts[0])
    pooled = same_clips_difference(*sides) if by_prompt else share_difference(*counts)
    return [min(pooled[0], paired[0]), max(pooled[1], paired[1])] if trained else pooled


def mean_of(runs: list[dict[str, Any]], figure: str) -> float:
    return statistics.mean(measured(runs, figure))


def measured(runs: list[dict[str, Any]], figure: str) -> list[float]:
    """Return the figure of each run."""
    found = values_of(runs).get(figure, [])
    if len(found) < len(runs):
        raise UserError(f"claims: {figure} was measured in {len(found)} of {len(runs)} runs of a variant; name another figure")
    return found


def curves_of(runs: list[dict[str, Any]]) -> set[str]:
    return {field for run in runs for field in run.get("curves", {})}
