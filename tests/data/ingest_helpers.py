"""What the tests of ingest share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lumos.data.encode import ClipSettings

SETTINGS = ClipSettings(fps=12, size="16x24", num_frames=5)
FLAGS = ["--fps", "12", "--size", "16x24", "--frames", "5"]


def moving(seed: int, num_frames: int) -> np.ndarray:
    start = np.random.default_rng(seed).integers(0, 255, (16, 24, 3))
    return np.stack([np.roll(start, t, axis=1) for t in range(num_frames)]).astype(np.uint8)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".parquet", ".jsonl")}
