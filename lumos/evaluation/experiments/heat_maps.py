"""The heat maps of an experiment whose variants lie in a grid: one for each figure, and for each value of a third setting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import Any

from lumos.errors import drawable, needing_matplotlib
from lumos.evaluation.experiments.words import in_words
from lumos.files import replacing

SIDE = 2.9  # inches of a heat map
LETTERS = 30  # of the names of all columns that fit below a heat map


def draw_heat_maps(result: dict[str, Any], figures: list[str], path: Path) -> None:
    """Write the heat maps of an experiment as PNG. UserError if matplotlib is not installed.

    result: the return value of `results.gather`, with a grid. A figure has a column of heat maps with one scale of colours, the
    values of the third setting have the rows. Cells hold means over seeds.
    """
    with needing_matplotlib("experiment"):
        from matplotlib.figure import Figure
    grid, variants, names = result["grid"], result["variants"], result["names"]
    shown = [figure for figure in figures if any(figure in row["summary"] for row in variants.values())]
    maps = cells(variants)
    rows, columns = (in_order(place[axis] for places in maps.values() for place in places) for axis in (0, 1))
    labels = ["\n".join(wrap(drawable(str(value)), max(6, LETTERS // len(columns)))) for value in columns]
    size = (SIDE * len(shown) + 0.8, SIDE * len(maps) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(drawable(result["question"]), fontsize=11)
    places = figure.subplots(len(maps), len(shown), squeeze=False)
    for k, name in enumerate(shown):
        means = {panel: {place: row["summary"][name][0] for place, row in of.items() if name in row["summary"]}
                 for panel, of in maps.items()}  # fmt: skip
        known = [mean for of in means.values() for mean in of.values()]
        for axes, (panel, of) in zip(places[:, k], means.items(), strict=True):
            values = [[of.get((row, column), float("nan")) for column in columns] for row in rows]
            drawn = axes.imshow(values, vmin=min(known), vmax=max(known), cmap="viridis", origin="lower", aspect="auto")
            for y, line in enumerate(values):
                for x, mean in enumerate(line):
                    bright = mean > (min(known) + max(known)) / 2
                    axes.text(x, y, f"{mean:.2f}" if mean == mean else "", ha="center", va="center", fontsize=9,
                              color="black" if bright else "white")  # fmt: skip
            lines = [in_words(name, names), *([f"{grid['panels']}: {panel}"] if grid["panels"] else [])]
            axes.set_title("\n".join(map(drawable, lines)), fontsize=9)
            axes.set_xticks(range(len(columns)), labels, fontsize=8)
            axes.set_yticks(range(len(rows)), [drawable(str(value)) for value in rows], fontsize=8)
            axes.set_xlabel(drawable(grid["columns"]), fontsize=9)
            axes.set_ylabel(drawable(grid["rows"]), fontsize=9)
        figure.colorbar(drawn, ax=list(places[:, k]), shrink=0.6)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def cells(variants: dict[str, Any]) -> dict[Any, dict[tuple, Any]]:
    """Return {panel: {(row, column): variant}}; a variant that names no panel is in all of them."""
    panels = list(dict.fromkeys(panel for row in variants.values() for panel in row["at"][2:])) or [""]
    return {panel: {tuple(row["at"][:2]): row for row in variants.values() if row["at"][2:] in ([], [panel])} for panel in panels}


def in_order(values: Iterable[Any]) -> list[Any]:
    """Return the different values of a setting: numbers from the least on, then words in the order of the variants."""
    different = list(dict.fromkeys(values))
    return sorted(different, key=lambda value: (1, different.index(value)) if isinstance(value, str) else (0, value))
