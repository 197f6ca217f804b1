"""Lists of clips (`generate --prompts`) that are killed and resumed; writes a folder for each, which the tests compare.

usage: killed_lists.py folder model calls times
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import kills
import torch

from lumos.cli import main


def run(folder: Path, model: str, out: Path) -> int:
    prompts = str(folder / "list.jsonl")
    return main(["generate", "--model", model, "--prompts", prompts, "--batch-size", "2", "--output-dir", str(out)])


def killed_lists(folder: Path, model: str, calls: int, times: int) -> None:
    rows = [{"prompt": f"x {n}", "output": f"{n}.webp" if n % 2 else f"in/{n}.mp4"} for n in range(5)]
    (folder / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    started = time.monotonic()
    assert kills.forked(partial(run, folder, model, folder / "whole")) == 0
    whole, draw = time.monotonic() - started, random.Random(0)
    found = kills.file_calls(partial(run, folder, model, folder / "counted"), folder / "counted")
    for number in kills.spread(kills.first_of_each(found), calls):
        out = folder / f"call-{number}"
        print(f"{found[number]}: ended with {kills.killed_at(partial(run, folder, model, out), out, number)}", flush=True)
        resumed(folder, model, out)
    for number in range(times):
        out = folder / f"time-{number}"
        seconds = draw.uniform(0.3, 0.9) * whole
        print(f"ended with {kills.forked(partial(run, folder, model, out), seconds=seconds)}", flush=True)
        resumed(folder, model, out)


def resumed(folder: Path, model: str, out: Path) -> None:
    """Keep a copy of the files that the kill left, and resume the list."""
    out.mkdir(exist_ok=True)
    shutil.copytree(out, out.with_name(f"{out.name}.killed"))
    assert kills.forked(partial(run, folder, model, out)) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed_lists(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
