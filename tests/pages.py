"""Commands, code blocks and tables of the README and the pages of docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from lumos.pipeline.options import Option

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a language; `page` is a path in the repository."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def command_lines(page: str) -> list[str]:
    """Return the commands of the bash blocks, without comments; `a && b` is two commands, a trailing backslash joins lines."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    parts = [part.strip() for line in text.splitlines() for part in line.split(" #")[0].split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def option_rows(options: Iterable[Option]) -> dict[str, str]:
    """Return the rows of a table of sampling options: flag -> meaning, as Markdown."""
    return {f"`{option.flag}`": option.meaning for option in options}


def verbs(page: str) -> list[list[str]]:
    """Return the words of each `python generate.py`, `python train.py` and `python -m lumos` command, from the verb on."""
    found = []
    for words in map(shlex.split, command_lines(page)):
        if words[:3] == ["python", "-m", "lumos"]:
            found.append(words[3:])
        elif words[0] == "python" and words[1] in ("generate.py", "train.py"):
            found.append([words[1].removesuffix(".py"), *words[2:]])
    return found
