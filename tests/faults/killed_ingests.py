"""Ingests with several processes that are killed and resumed; writes a folder for each, which the tests compare.

usage: killed_ingests.py source small folder tokenizer calls times workers

The small source is ingested by 2 workers, killed before `calls` different file calls (folder/calls) and at `times` random times
(folder/times). The other source has some slow items; it is ingested by `workers` numbers of workers, from 4 down
(folder/slow).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import kills
import torch

from lumos.data.ingest import executors as engines
from lumos.data.ingest.encode import ClipSettings, ItemEncoder
from lumos.data.ingest.ingest import ingest
from lumos.data.shards import format as shards

SETTINGS = ClipSettings(fps=12, size="16x24", num_frames=5)
SLOW = 0.25


class SlowEncoder(ItemEncoder):
    """An encoder that takes longer for items whose caption says so than for all items that may start meanwhile."""

    def begin(self, item):
        if item.caption == "slow":
            time.sleep(SLOW)
        return super().begin(item)


def run(source: str, tokenizer: str, out: Path, workers: int, last: int | None = None) -> None:
    """Run an ingest that is killed when that many items are done."""

    def on_item(done: int, skipped: int) -> None:
        if done + skipped == last:
            os.kill(os.getpid(), signal.SIGKILL)

    ingest([source], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5, workers=workers, on_item=on_item)


def resumed(out: Path, do: Callable[[], None]) -> None:
    """Keep a copy of what a kill has left in `out`, then do the ingest again to its end."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(out, out.with_name(f"{out.name}.killed"))
    assert kills.forked(do) == 0


def calls(source: str, folder: Path, tokenizer: str, count: int) -> None:
    assert kills.forked(partial(run, source, tokenizer, folder / "whole", 0)) == 0
    found = kills.file_calls(partial(run, source, tokenizer, folder / "counted", 2), folder / "counted")
    for number in kills.spread(kills.first_of_each(found), count):
        out = folder / f"call-{number}"
        do = partial(run, source, tokenizer, out, 2)
        print(f"call: {found[number]}: ended with {kills.killed_at(do, out, number)}", flush=True)
        resumed(out, do)


def times(source: str, folder: Path, tokenizer: str, count: int) -> None:
    started, draw = time.monotonic(), random.Random(0)
    assert kills.forked(partial(run, source, tokenizer, folder / "whole", 2)) == 0
    whole = time.monotonic() - started
    for number in range(count):
        out = folder / f"time-{number}"
        do = partial(run, source, tokenizer, out, 2)
        while (code := kills.forked(do, seconds=draw.uniform(0.3, 0.9) * whole)) == 0:  # it ended before its time came
            shutil.rmtree(out)
            whole *= 0.7
        print(f"time: ended with {code}", flush=True)
        resumed(out, do)


def slow(source: str, folder: Path, tokenizer: str, count: int) -> None:
    assert kills.forked(partial(run, source, tokenizer, folder / "whole", 0)) == 0
    engines.ItemEncoder = SlowEncoder  # last, for it stays
    for workers in range(4, 4 - count, -1):
        out = folder / f"workers-{workers}"
        last = 5 * workers + 2  # after the first slow item
        print(f"slow: ended with {kills.forked(partial(run, source, tokenizer, out, workers, last))}", flush=True)
        assert kills.forked(partial(run, source, tokenizer, out, workers)) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    shards.parquet()
    kills.share_forkserver("lumos.data.ingest.workers", "torch._dynamo")
    source, small, folder, tokenizer, *counts = sys.argv[1:]
    for drive, items, count in zip((calls, times, slow), (small, small, source), map(int, counts), strict=True):
        place = Path(folder, drive.__name__)
        place.mkdir()
        drive(items, place, tokenizer, count)
