"""What a run says: one JSON object a line in <output_dir>/log.jsonl, a tqdm line on the terminal, and whoever else listens."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lumos.durable import make_folder, sync_file, sync_folder
from lumos.files import write_bytes
from lumos.training.trackers import Writer


class Meter:
    """Sums over the steps since the last log line. A checkpoint stores them, so a resumed run logs what it would have logged."""

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0], sums or {})

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        """Take in the sum of `weight` values."""
        before = self.sums[name]
        self.sums[name] = [before[0] + total, before[1] + weight]

    def add_parts(self, parts: Iterable[tuple[str, Tensor]]) -> None:
        """Take in (name, [2] or [2, places]: sums and numbers of values)."""
        for name, table in parts:
            if table.ndim == 1:
                self.add(name, *table.tolist())
                continue
            for place, (total, weight) in enumerate(table.T.tolist()):
                self.add(f"{name}/{place}", total, weight)

    def means(self) -> dict[str, float | list[float | None]]:
        """Means by name; with places a list, None where there is no value. A name without any value is left out."""
        means: dict[str, float] = {}
        lists: dict[str, list[float | None]] = defaultdict(list)
        for key, (total, weight) in self.sums.items():
            name, _, place = key.partition("/")
            if place:
                lists[name].append(total / weight if weight else None)
            elif weight:
                means[name] = total / weight
        return means | {name: values for name, values in lists.items() if any(value is not None for value in values)}


class RunLog:
    """The log file, the progress line and the writers of one run; only the first process writes."""

    def __init__(self, folder: Path, *, first_step: int, max_steps: int, enabled: bool, writers: Sequence[Writer] = ()):
        self.path = folder / "log.jsonl"
        self.enabled, self.writers = enabled, writers
        self.bar = None
        if not enabled:
            return
        make_folder(folder)
        if self.path.exists():
            _forget_after(self.path, first_step)
        shown = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "disable": max_steps == 0}
        self.bar = tqdm(total=max_steps, initial=first_step, **shown)

    def write(self, **values: Any) -> None:
        """Append a line; numbers that JSON has no word for are written as null. Lines that are no event go to the writers too."""
        if not self.enabled:
            return
        values = _finite(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if "event" not in values:
            for writer in self.writers:
                writer.scalars(values["step"], dict(scalars(values)))

    def sync(self) -> None:
        """Have the disk hold what was written so far. A checkpoint whose log is lost would have steps without lines."""
        if self.enabled:
            if self.path.exists():
                sync_file(self.path)
                sync_folder(self.path.parent)
            for writer in self.writers:
                writer.sync()

    def clip(self, step: int, name: str, path: Path, frames: Any, fps: float) -> None:
        """Show a clip uint8 [T, H, W, 3], which is in the file `path`, to the writers; one frame is a picture."""
        for writer in self.writers:
            writer.clip(step, name, path, frames, fps)

    def progress(self, loss: float, lr: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
            self.bar.update()

    def say(self, text: str) -> None:
        """One line for people, above the progress line."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        if self.bar is not None:
            self.bar.close()


def scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a log line under the names that dashboards group by: train/loss, val/loss_video, train/frame_loss_video/3."""
    for name, value in values.items():
        if name in ("step", "time"):
            continue
        name = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
        places = enumerate(value) if isinstance(value, list) else [(None, value)]
        yield from ((name if k is None else f"{name}/{k}", v) for k, v in places if v is not None)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log file. Other lines are passed over: a kill, a power cut or a full disk may leave part of one."""
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _forget_after(path: Path, step: int) -> None:
    """Remove lines of steps past `step`, which a resumed run does again, and what is no line."""
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if not _is_past(line.get("step"), step)]
    write_bytes(path, "".join(kept).encode())


def _is_past(found: Any, step: int) -> bool:
    return isinstance(found, int | float) and not found <= step
