"""Reading a run's log."""

from __future__ import annotations

import json
import math
from pathlib import Path

KEYS = ("loss", "grad_norm", "val_loss_video", "val_loss_video_ema", "frame_loss_video")


def read_log(folder: str | Path, key: str = "loss") -> dict[int, float]:
    """Return {step: value} of all log lines that have the key; there must be one."""
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    found = {line["step"]: line[key] for line in lines if key in line and "event" not in line}
    assert found, f"no line of {folder} has {key}"
    return found


def flat(values: dict[int, float | list]) -> dict[str, float]:
    """Return the same values with the places of lists as separate keys, in the form that pytest.approx needs."""
    lists = {step: value if isinstance(value, list) else [value] for step, value in values.items()}
    return {f"{step}/{k}": math.nan if v is None else v for step, places in lists.items() for k, v in enumerate(places)}


def assert_same_run(folder: Path, whole: Path) -> None:
    """Assert that two runs have the same numbers bit by bit, and that no file is left over."""
    for key in KEYS:
        assert read_log(folder, key) == read_log(whole, key), key
    assert not list((folder / "checkpoints").glob(".*"))
