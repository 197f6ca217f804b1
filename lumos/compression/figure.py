"""The figure of scores: importance against depth, with content and motion as two curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumos.errors import drawable, needing_matplotlib
from lumos.files import replacing

TITLES = {
    "content and motion": "error of the output without the unit", "motion_share": "share of motion in this error",
    "loss": "rise of the loss without the unit", "elbo": "rise of the loss, all levels alike",
    "bi": "change of direction (1 - cosine)",
    "magnitude": "mean square of the weights", "taylor": "mean of |weight times gradient|", "learned": "how often the gate is open",
    "frechet": "Fréchet distance without the unit", "history": "loss of the gain from history without the unit",
}  # fmt: skip


def draw(scores: Mapping[str, Mapping[str, Any]], measures: list[str], title: str, path: str | Path) -> None:
    """Write a picture (PNG, SVG or PDF by its suffix) of the scores of units by name, in the order of execution.

    The first two panels have the content and the motion of the output's error, and the share of motion in it, if the output
    was measured; the others a measure each. Bands are the intervals of the scores, if they have some.
    Raises UserError if matplotlib is not installed.
    """
    with needing_matplotlib("the picture"):
        from matplotlib.figure import Figure
    names = list(scores)
    panels = (["content and motion", "motion_share"] if "output" in measures else []) + [n for n in measures if n != "output"]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    figure.suptitle(drawable(title), fontsize=10)
    for n, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), n)
        curves = ("content", "motion") if panel == "content and motion" else (panel,)
        for k, curve in enumerate(curves):
            points = [(i, scores[name][curve]) for i, name in enumerate(names) if scores[name].get(curve) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "-o", color=f"C{k}", ms=3, lw=1, label=curve)
            bands = [(i, *found) for i, name in enumerate(names) if (found := scores[name].get(f"{curve}_interval"))]
            if bands:
                axes.fill_between(*zip(*bands, strict=True), color=f"C{k}", alpha=0.2, lw=0)
        axes.set_title(TITLES[panel], fontsize=9)
        axes.set_xticks(range(len(names)), map(drawable, names), fontsize=6, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_xlabel("unit, in the order of execution", fontsize=8)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=110)
