"""Reading a run's log."""

from __future__ import annotations

import json
import math
from pathlib import Path


def read_log(folder: str | Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of every log line of a step that has the key, at least one."""
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    found = {line["step"]: line[key] for line in lines if key in line and "event" not in line}
    assert found, f"no line of {folder} has {key}"
    return found


def flat(values: dict[int, float | list]) -> dict[str, float]:
    """The same with the places of lists as keys of their own, as pytest.approx wants it."""
    lists = {step: value if isinstance(value, list) else [value] for step, value in values.items()}
    return {f"{step}/{k}": math.nan if v is None else v for step, places in lists.items() for k, v in enumerate(places)}
