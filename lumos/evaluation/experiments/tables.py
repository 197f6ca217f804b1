"""Markdown tables of the JSON files of experiments, for the pages of docs/findings."""

from __future__ import annotations

from typing import Any


def claims_table(results: list[dict[str, Any]]) -> str:
    """Return the claims of experiments and the verdicts on them: claim, paper, here, verdict."""
    rows = [
        [claim["text"], claim["paper"] or "-", found(claim, result["names"]), claim["verdict"]]
        for result in results for claim in result["claims"]
    ]  # fmt: skip
    return table(["claim", "paper", "here: difference and its 95 % interval", "verdict"], rows)


def found(claim: dict[str, Any], names: dict[str, str]) -> str:
    """Return what was found about a claim, in words and figures."""
    words = names.get(claim["figure"], claim["figure"])
    one, other = map(number, claim["values"])
    low, high = (number(value, sign=True) for value in claim["interval"])
    text = f"{words} {one} against {other}: {number(claim['difference'], sign=True)} ({low} to {high})"
    chance = ", ".join(names.get(name, name) for name in claim["at_chance"])
    return text + (f"; {chance} at chance" if chance else "")


def figures_table(result: dict[str, Any], figures: list[str]) -> str:
    """Return the figures of all variants: the mean over seeds, and its 95 % interval where there is one."""
    names = result["names"]
    rows = [[name, *(cell(row, figure) for figure in figures)] for name, row in result["variants"].items()]
    return table(["variant", *(names.get(figure, figure) for figure in figures)], rows)


def cell(row: dict[str, Any], figure: str) -> str:
    if figure not in row["summary"]:
        return "-"
    low, high = row.get("intervals", {}).get(figure, (0, 0))
    return number(row["summary"][figure][0]) + (f" ({number(low)} to {number(high)})" if low < high else "")


def number(value: float, sign: bool = False) -> str:
    """Return a number with two decimals, or none from 100 on."""
    digits = 0 if abs(value) >= 100 else 2
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in lines)
