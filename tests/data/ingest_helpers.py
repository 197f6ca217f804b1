"""Helpers of the tests of ingest."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from lumos.data.ingest.encode import ClipSettings, ItemEncoder, Skip
from lumos.data.ingest.item import OUT_OF_MEMORY

SETTINGS = ClipSettings(fps=12, size="16x24", num_frames=5)
FLAGS = ["--fps", "12", "--size", "16x24", "--frames", "5"]


def moving(seed: int, num_frames: int) -> np.ndarray:
    start = np.random.default_rng(seed).integers(0, 255, (16, 24, 3))
    return np.stack([np.roll(start, t, axis=1) for t in range(num_frames)]).astype(np.uint8)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".parquet", ".jsonl")}


class Fragile(ItemEncoder):
    """An encoder that ends its process or hangs if the caption says so."""

    def begin(self, item):
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
        return super().begin(item)


class Late:
    """An encoder that returns nothing for items, whose ids are numbers.

    Items in `slow` wait until all items that may start after them are done, except the next item of their own worker.
    """

    def __init__(self, flags: Path, slow: tuple[int, ...], begun: int, total: int):
        self.flags, self.slow, self.begun, self.total = flags, slow, begun, total

    def begin(self, item):
        return item

    def finish(self, item):
        number = int(item.id)
        later = range(number + 1, min(number + self.begun, self.total)) if number in self.slow else ()
        while sum(not (self.flags / str(other)).exists() for other in later) > 1:
            time.sleep(0.01)
        if number in self.slow:
            time.sleep(0.1)  # their results are on their way
        (self.flags / item.id).touch()
        return []


class Ahead:
    """An encoder that finishes an item only after another thread has begun the next one of `total`."""

    def __init__(self, flags: Path, total: int):
        self.flags, self.total = flags, total

    def begin(self, item):
        assert threading.current_thread() is not threading.main_thread()
        (self.flags / item.id).touch()
        return item

    def finish(self, item):
        following, deadline = int(item.id) + 1, time.monotonic() + 100
        while following < self.total and not (self.flags / str(following)).exists():
            assert time.monotonic() < deadline, "the next item was not begun"
            time.sleep(0.005)
        assert not (self.flags / str(following + 1)).exists()  # one ahead, not two
        return []


class Crowded:
    """An encoder that is out of memory for an item while its worker has another one, and always for the item "large"."""

    def __init__(self, flags: Path):
        self.flags = flags

    def begin(self, item):
        (self.flags / item.id).touch()
        return item

    def finish(self, item):
        time.sleep(0.2)  # the next one is begun
        others = [flag for flag in self.flags.iterdir() if flag.name != item.id]
        (self.flags / item.id).unlink()
        return Skip(OUT_OF_MEMORY, "no memory") if others or item.caption == "large" else []


class Greedy(ItemEncoder):
    """An encoder that allocates 64 TiB of address space if the caption says so; a system without a limit allows this."""

    def begin(self, item):
        if item.caption != "greedy":
            return super().begin(item)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        with patch("lumos.data.ingest.encode.OpenVideo.count_frames", lambda *file: mmap.mmap(-1, 1 << 46, flags=flags)):
            return super().begin(item)


class Unstartable:
    def __init__(self, work):
        os._exit(7)
