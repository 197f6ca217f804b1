"""What a run says: one JSON object a line in <output_dir>/log.jsonl, and a tqdm line on the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lumos.files import write_bytes


class Meter:
    """Sums over the steps since the last log line. A checkpoint stores them, so a resumed run logs what it would have logged."""

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0], sums or {})

    def add(self, key: str, value: float, weight: float = 1.0) -> None:
        total = self.sums[key]
        self.sums[key] = [total[0] + value * weight, total[1] + weight]

    def means(self) -> dict[str, float]:
        return {key: total / weight for key, (total, weight) in self.sums.items() if weight}


class RunLog:
    """The log file and the progress line of one run; only the first process writes."""

    def __init__(self, folder: Path, *, first_step: int, max_steps: int, enabled: bool):
        self.path = folder / "log.jsonl"
        self.enabled = enabled
        self.bar = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _forget_after(self.path, first_step)
        self.bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=1.0)

    def write(self, **values: Any) -> None:
        """Append a line. Numbers that JSON has no word for are written as null."""
        if not self.enabled:
            return
        line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def progress(self, loss: float, lr: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
            self.bar.update()

    def say(self, text: str) -> None:
        """One line for people, above the progress line."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _forget_after(path: Path, step: int) -> None:
    """Remove lines of steps past `step`, which a resumed run does again, and a last line that a kill cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except ValueError:
            continue
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
