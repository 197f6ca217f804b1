"""The plots of an experiment, in one picture.

There is a panel for each curve, one for all shares of `evaluate prompts`, one for each figure that
is no share and one for the time. Up to four stand in a row; more of them stand in rows of three.
Lines are means over seeds. Bands and error bars show one standard deviation.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from lumos.errors import drawable, needing_matplotlib
from lumos.evaluation.experiments.words import in_words
from lumos.files import replacing

PANELS = ("moved", "frechet", "psnr", "clip_gflops", "clip_seconds", "memory_mb")
"""Figures that are not shares and may be above 1, which have panels of their own."""
LONGEST_ROW, ROW = 4, 3
"""The most panels that stand in one row, and the panels of each row where there are more."""
OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
"""A legend on the right of a panel."""
OVER = {"step": "training steps", "flops": "training FLOPs"}
Points = list[tuple[float, float, float]]  # x, mean, standard deviation


def draw(result: dict[str, Any], figures: list[str], path: Path, *, seconds: bool = True) -> None:
    """Write the picture of an experiment as PNG. UserError if matplotlib is not installed.

    result: the return value of `experiments.gather`. figures: names of the shares to draw. seconds:
    whether to draw the time panel.
    """
    with needing_matplotlib("experiment"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    variants, words = result["variants"], result.get("names", {})
    fields = list(dict.fromkeys(field for row in variants.values() for run in row["runs"] for field in run.get("curves", {})))
    shown = [figure for figure in figures if any(figure in row["summary"] for row in variants.values())]
    own = {in_words(figure, words): [name for name in shown if name.partition(" of ")[0] == figure] for figure in PANELS}
    shares = {"share of prompts": [name for name in shown if name.partition(" of ")[0] not in PANELS], **own}
    shares = {title: names for title, names in shares.items() if names}
    judged = [row for row in variants.values() if seconds and row["x"] is not None and "seconds" in row["runs"][0]]
    times, clock = times_of(judged)
    panels = len(fields) + len(shares) + bool(times)
    columns = max(1, panels) if panels <= LONGEST_ROW else ROW
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(6.0 * columns, 4.2 * rows), layout="constrained")
    figure.suptitle(result["question"], fontsize=11)
    for n, field in enumerate(fields, 1):
        axes = figure.add_subplot(rows, columns, n)
        trained = {name: row for name, row in variants.items() if "curves" in row["runs"][0]}
        for k, (name, row) in enumerate(trained.items()):
            _band(axes, curve(row["runs"], field), f"C{k}", name)
        per_place = any(isinstance(run["curves"][field][-1][1], list) for row in trained.values() for run in row["runs"])
        if per_place:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif result["over"] == "flops":
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        title = words.get(field, field) + (", last value" if per_place else "")
        _finish(axes, title, "latent frame" if per_place else OVER[result["over"]])
    for n, (title, names) in enumerate(shares.items(), len(fields) + 1):
        named = {name: in_words(name, words) for name in names}
        _shares(figure.add_subplot(rows, columns, n), variants, named, title, result["axis"])
    if times:
        axes = figure.add_subplot(rows, columns, panels)
        _band(axes, times, "C0", "a clip, median of the seeds", "-o")
        axes.set_ylim(bottom=0)
        _finish(axes, clock, result["axis"])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def times_of(rows: list[dict[str, Any]]) -> tuple[Points, str]:
    """Return the median time of a clip for each variant, as points over x, and what kind of time it is.

    A median does not follow a seed that ran beside other work. Nor do CPU seconds, which older results do not have.
    """
    known = all("cpu_seconds" in run for row in rows for run in row["runs"])
    name, title = ("cpu_seconds", "CPU seconds") if known else ("seconds", "seconds")
    return sorted((row["x"], statistics.median(run[name] / run["clips"] for run in row["runs"]), 0.0) for row in rows), title


def curve(runs: list[dict[str, Any]], field: str) -> Points:
    """Return the points of a field of the log over training steps or FLOPs.

    Runs of equal length are averaged point by point, x as well: the FLOPs of the same steps differ a little by the seed, whose
    captions have other lengths. Others are averaged where they have the same x.
    The values of some fields are lists, for example with one value per latent frame. For such a
    field, return the last list over the positions in it.
    """
    lines = [run["curves"][field] for run in runs]
    lines = [list(enumerate(points[-1][1])) if isinstance(points[-1][1], list) else points for points in lines]
    places: dict[float, list[tuple[float, float]]] = {}
    has_one_length = len({len(points) for points in lines}) == 1
    for points in lines:
        for number, (x, y) in enumerate(points):
            if y is not None:
                places.setdefault(number if has_one_length else x, []).append((x, y))
    return [
        (statistics.mean(x), statistics.mean(y), statistics.stdev(y) if len(y) > 1 else 0.0)
        for x, y in (zip(*found, strict=True) for _, found in sorted(places.items()))
    ]


def _shares(axes: Any, variants: dict[str, Any], shown: dict[str, str], title: str, axis: str) -> None:
    """Draw the figures, {name: words}, as lines over x if every variant has an x, else as bars over the names of the variants."""
    numeric = all(row["x"] is not None for row in variants.values())
    for k, (name, words) in enumerate(shown.items()):
        rows = [(n if not numeric else row["x"], row) for n, row in enumerate(variants.values()) if name in row["summary"]]
        points = sorted((x, *row["summary"][name]) for x, row in rows)
        if numeric:
            _band(axes, points, f"C{k}", words, "-o")
        else:  # the bars of a variant stand side by side
            x, mean, spread = zip(*points, strict=True)
            places = [place + 0.8 * ((k + 0.5) / len(shown) - 0.5) for place in x]
            axes.bar(places, mean, 0.8 / len(shown), yerr=spread if any(spread) else None, color=f"C{k}", label=drawable(words))
    if not numeric:
        axes.set_xticks(range(len(variants)), [drawable(name) for name in variants], rotation=20, ha="right", fontsize=8)
    axes.set_ylim(bottom=0)
    _finish(axes, title, axis, None if numeric else OUTSIDE)  # bars leave no room inside


def _band(axes: Any, points: Points, colour: str, label: str, style: str = "-") -> None:
    x, mean, spread = zip(*points, strict=True)
    axes.plot(x, mean, style, color=colour, lw=1.3, ms=4, label=drawable(label))
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _finish(axes: Any, title: str, x: str, legend: dict[str, Any] | None = None) -> None:
    axes.set_title(drawable(title), fontsize=10)
    axes.set_xlabel(drawable(x), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, **(legend or {}))
