"""Reading a run's log."""

from __future__ import annotations

import json
from pathlib import Path


def read_log(folder: str | Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of every log line of a step that has the key."""
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line and "event" not in line}
