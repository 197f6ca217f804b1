"""What the tests of ingest share."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from lumos.data.encode import ClipSettings, Encoder

SETTINGS = ClipSettings(fps=12, size="16x24", num_frames=5)
FLAGS = ["--fps", "12", "--size", "16x24", "--frames", "5"]


def moving(seed: int, num_frames: int) -> np.ndarray:
    start = np.random.default_rng(seed).integers(0, 255, (16, 24, 3))
    return np.stack([np.roll(start, t, axis=1) for t in range(num_frames)]).astype(np.uint8)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".parquet", ".jsonl")}


class Fragile(Encoder):
    """Ends its process or hangs as the caption says."""

    def __call__(self, item):
        if item.caption.startswith("once "):
            flag = Path(item.caption.removeprefix("once "))
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if item.caption == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.caption == "hang":
            time.sleep(1000)
        if item.caption == "bug":
            raise OSError("a bug")
        return super().__call__(item)


class Unstartable:
    def __init__(self, work):
        os._exit(7)
