"""The output of a run: <output_dir>/log.jsonl with one JSON object per line, a progress line, dashboards.

The progress line is that of tqdm. `lumos.training.trackers` has the dashboards.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lumos.durable import make_folder, sync_file, sync_folder
from lumos.files import open_regular, write_bytes
from lumos.progress import LOGGER, progress_bar
from lumos.training.trackers import Writer


class Meter:
    """Sums of values over the steps since the last log line.

    A checkpoint stores the sums, so that a resumed run logs the same means as a run that was never
    interrupted.
    """

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0], sums or {})

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        """Add `total`, the sum of `weight` values, to the sum called `name`."""
        before = self.sums[name]
        self.sums[name] = [before[0] + total, before[1] + weight]

    def add_parts(self, parts: Iterable[tuple[str, Tensor]]) -> None:
        """Add sums and counts of values, as (name, table [2] or [2, places]).

        The first row of a table holds sums, the second the numbers of values. `LossSums` explains
        places.
        """
        for name, table in parts:
            if table.ndim == 1:
                self.add(name, *table.tolist())
                continue
            for place, (total, weight) in enumerate(table.T.tolist()):
                self.add(f"{name}/{place}", total, weight)

    def means(self) -> dict[str, float | list[float | None]]:
        """Return the means by name.

        A name with places has a list of means, with None for a place without values. A name without
        any value is left out.
        """
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
    """The log file, the progress line and the dashboards (`writers`) of one run.

    Only the first process of a run writes; `enabled` is False in the others. Lines of steps after
    `first_step`, which a resumed run repeats, are removed from the log file.
    """

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
        self.bar = progress_bar(total=max_steps, initial=first_step, **shown)

    def write(self, **values: Any) -> None:
        """Append a line to the log file, and send it to the dashboards unless it describes an event.

        Numbers that JSON cannot express (infinities and nan) are written as null.
        """
        if not self.enabled:
            return
        values = _finite(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if "event" not in values:
            for writer in self.writers:
                writer.scalars(values["step"], dict(scalars(values)))

    def sync(self) -> None:
        """Wait until the disk holds all lines.

        A save calls this first: a checkpoint that outlives its log would have steps without lines.
        """
        if self.enabled:
            if self.path.exists():
                sync_file(self.path)
                sync_folder(self.path.parent)
            for writer in self.writers:
                writer.sync()

    def clip(self, step: int, name: str, path: Path, frames: Any, fps: float) -> None:
        """Send a clip uint8 [T, H, W, 3], stored in the file `path`, to the dashboards.

        A clip of one frame is shown as a picture.
        """
        for writer in self.writers:
            writer.clip(step, name, path, frames, fps)

    def progress(self, loss: float, lr: float, expected_steps: int) -> None:
        """Advance the progress line by one step, of `expected_steps` at the end of the run."""
        if self.bar is not None:
            self.bar.total = expected_steps
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
            self.bar.update()

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Give a line of text to the logger "lumos"; the command line prints it above the progress line."""
        if self.enabled:
            LOGGER.log(level, text)

    def close(self) -> None:
        """Close the dashboards and the progress line."""
        for writer in self.writers:
            writer.close()
        if self.bar is not None:
            self.bar.close()


def scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a log line under the names by which dashboards group them.

    For example train/loss, val/loss_video and train/frame_loss_video/3.
    """
    for name, value in values.items():
        if name in ("step", "time"):
            continue
        name = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
        places = enumerate(value) if isinstance(value, list) else [(None, value)]
        yield from ((name if k is None else f"{name}/{k}", v) for k, v in places if v is not None)


MAX_LINE_BYTES = 1 << 24


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a log file.

    Other lines are skipped, because a kill, a power cut or a full disk may leave an incomplete line.
    """
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):  # a longer line arrives in pieces, which are no JSON
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
    """Remove the lines of steps after `step`, which a resumed run repeats, and incomplete lines."""
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if not _is_past(line.get("step"), step)]
    write_bytes(path, "".join(kept).encode())


def _is_past(found: Any, step: int) -> bool:
    return isinstance(found, int | float) and not found <= step
