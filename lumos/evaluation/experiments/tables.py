"""Markdown tables of the JSON files of experiments, for the pages of docs/findings."""

from __future__ import annotations

from typing import Any

from lumos.evaluation.experiments.words import in_words


def claims_table(results: list[dict[str, Any]]) -> str:
    """Return the claims of experiments and the verdicts on them: claim, paper, here, verdict."""
    rows = [
        [claim["text"], claim["paper"] or "-", found(claim, result["names"]), claim["verdict"]]
        for result in results for claim in result["claims"]
    ]  # fmt: skip
    return table(["claim", "paper", "here: difference and its 95 % interval", "verdict"], rows)


def found(claim: dict[str, Any], names: dict[str, str]) -> str:
    """Return what was found about a claim, in words and figures."""
    words = in_words(claim["figure"], names)
    figures = digits(claim["figure"])
    one, other = (number(value, figures) for value in claim["values"])
    difference, low, high = (number(value, figures, sign=True) for value in (claim["difference"], *claim["interval"]))
    text = f"{words} {one} against {other}: {difference} ({low}, {high})"
    chance = ", ".join(in_words(name, names) for name in claim["at_chance"])
    return text + (f"; {chance} at chance" if chance else "")


def figures_table(result: dict[str, Any], figures: list[str]) -> str:
    """Return the figures of all variants: the mean over seeds, and its 95 % interval where there is one."""
    names = result["names"]
    rows = [[name, *(cell(row, figure) for figure in figures)] for name, row in result["variants"].items()]
    return table(["variant", *(in_words(figure, names) for figure in figures)], rows)


def cell(row: dict[str, Any], figure: str) -> str:
    if figure not in row["summary"]:
        return "-"
    places, (low, high) = digits(figure), row.get("intervals", {}).get(figure, (0, 0))
    interval = f" ({number(low, places)}, {number(high, places)})" if low < high else ""
    return number(row["summary"][figure][0], places) + interval


def digits(figure: str) -> int:
    """Return the decimals of a figure; those of distances and losses differ less than shares do."""
    return 3 if figure.startswith(("frechet", "val_")) else 2


def number(value: float, places: int, sign: bool = False) -> str:
    """Return a number with so many decimals, or none from 100 on."""
    places = 0 if abs(value) >= 100 else places
    text = f"{value:+,.{places}f}" if sign else f"{value:,.{places}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in lines)
