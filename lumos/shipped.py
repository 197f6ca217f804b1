"""Files that come with Lumos beside its packages: recipes and models. They are in the repository, and in an installed wheel."""

from __future__ import annotations

import difflib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumos.errors import UserError

SHARE = Path("share", "lumos")
"""Where an installation has the files, below the folder of its scripts and data."""


def roots() -> Iterator[Path]:
    """Yield the folders that can hold `configs` and `checkpoints`: the working folder, the repository, and an installation."""
    packages = Path(__file__).parents[1]
    yield Path()
    yield packages
    yield packages / SHARE  # pip install --target
    yield Path(sysconfig.get_path("data")) / SHARE


def shipped_folder(name: str) -> Path:
    """Return a folder that comes with Lumos, such as checkpoints/lumos-tiny; the path in the repository if there is none."""
    places = [root / name for root in roots()]
    return next((place for place in places if place.is_dir()), places[1])


def shipped_path(path: str | Path) -> Path | None:
    """Return where a part of a shipped model is, for its path in the repository: checkpoints/NAME, or below it.

    None for another path, and for one that the working folder has.
    """
    parts = Path(path).parts
    if len(parts) < 2 or parts[0] != "checkpoints" or ".." in parts or os.path.lexists(path):
        return None
    return next((root / path for root in roots() if os.path.exists(root / path)), None)


def find_shipped_models(config: dict[str, Any]) -> None:
    """Replace the paths of shipped models in a config by the places where they are, so that recipes work in any folder."""
    waiting: list[Any] = [config]
    seen = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias of YAML
            continue
        seen.add(id(node))
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif isinstance(value, str) and (found := shipped_path(value)):
                node[key] = str(found)


def find_config(path: str | Path, kinds: Sequence[str]) -> Path:
    """Return the file of a config: `path` itself if there is such a file, else the shipped recipe of this name.

    Names are like those of files in configs, without suffix: "lumos1/tiny" and "tiny". `kinds` are the folders that are looked
    through for a name alone, in this order. UserError, with the names of the recipes, if there is no such file and no such recipe.
    """
    if Path(path).exists() and not Path(path).is_dir():  # a pipe will do
        return Path(path)
    name = Path(path).with_suffix("") if str(path).endswith(".yaml") else Path(path)
    parts = name.parts[1:] if name.parts[:1] == ("configs",) else name.parts
    folder = shipped_folder("configs")
    candidates = [folder.joinpath(*parts)] if len(parts) > 1 else [folder / kind / name.name for kind in kinds]
    files = [candidate.with_name(f"{candidate.name}.yaml") for candidate in candidates]
    for file in files:
        if file.is_file() and ".." not in parts:
            return file
    known = [f"{kind}/{file.stem}" for kind in kinds for file in sorted((folder / kind).glob("*.yaml"))]
    stems = difflib.get_close_matches(name.name, {Path(place).name for place in known}, 3)
    near = [place for place in known if Path(place).name in stems][:5] or known[:3]
    raise UserError(f"there is no config file {path}; the shipped ones are in configs/, for example {', '.join(near)}")
