"""Writes the tables of docs/findings from docs/results: `python docs/site/tables.py`.

The claims of configs/experiments are judged anew by the results of the same name, so a claim can be worded or added without running
anything again. Then the text between `<!-- claims: NAME ... -->` or `<!-- figures: NAME | figure | ... -->` and `<!-- end -->`
becomes the table of these results. `NAME:1,3` stands for the first and the third claim of a study.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lumos.evaluation.experiments.claims import judged
from lumos.evaluation.experiments.settings import load
from lumos.evaluation.experiments.tables import claims_table, figures_table
from lumos.files import read_json, write_bytes, write_json

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- (claims|figures): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def judge(name: str, root: Path) -> dict[str, Any]:
    """Return the results of an experiment with the claims of its YAML file, judged."""
    result = read_json(root / "docs" / "results" / f"{name}.json", "the result of an experiment")
    study = load(root / "configs" / "experiments" / f"{name}.yaml")
    result |= {"claims": list(map(vars, study.claims)), "names": study.names}
    return result | {"claims": judged(result)}


def chosen(words: str, root: Path) -> dict[str, Any]:
    """Return the results of an experiment, NAME, with all claims, or of NAME:1,3 with the first and the third one."""
    name, _, numbers = words.partition(":")
    result = judge(name, root)
    return result | {"claims": [result["claims"][int(number) - 1] for number in numbers.split(",")]} if numbers else result


def filled(page: str, root: Path) -> str:
    """Return the text of a page with its tables."""

    def block(match: re.Match[str]) -> str:
        head, kind, what, end = match.groups()
        if kind == "claims":
            made = claims_table([chosen(words, root) for words in what.split()])
        else:
            name, *figures = map(str.strip, what.split("|"))
            made = figures_table(judge(name, root), figures)
        return f"{head}{made}\n{end}"

    return BLOCK.sub(block, page)


def main(root: Path = ROOT) -> None:
    for study in sorted((root / "configs" / "experiments").glob("*.yaml")):
        result = root / "docs" / "results" / f"{study.stem}.json"
        if result.is_file() and load(study).claims:
            write_json(result, judge(study.stem, root))
    for page in sorted((root / "docs" / "findings").glob("*.md")):
        write_bytes(page, filled(page.read_text(encoding="utf-8"), root).encode())


if __name__ == "__main__":
    main()
