"""Ingests that are killed at random lines of their code, each twice, and then left alone.

usage: killed_ingest.py source folder tokenizer seed rounds

Writes folder/ROUND/out, and folder/ROUND/killed-1 and killed-2, which are copies of it after each kill. Processes are forked
from this one, which has imported everything and done nothing, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

from lumos.data.ingest.encode import ClipSettings
from lumos.data.ingest.ingest import ingest
from lumos.data.shards import format as shards

SETTINGS = ClipSettings(fps=12, size="16x24", num_frames=5)
NAMES = ("ingest/ingest", "shards/format", "ingest/encode", "ingest/executors", "ingest/state", "ingest/manifest")
FILES = (*(f"data/{name}.py" for name in NAMES), "lumos/files.py", "lumos/durable.py")
WRITERS = ("write_shard", "replacing", "_remove", "write_bytes", "skip", "_write", "_append")
LINES = {"everywhere": 1800, "writing": 120}
"""The number of lines that a whole ingest executes in these files, or in these functions of them, or slightly fewer."""


def forked(source: str, out: str, tokenizer: str, where: str = "everywhere", last_line: int | None = None) -> int:
    """Ingest in a process that is killed at the `last_line`-th of these lines. Return its exit code."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        code = frame.f_code
        if not code.co_filename.endswith(FILES) or (where == "writing" and code.co_name not in WRITERS):
            return None
        if event == "line":
            lines += 1
            if lines == last_line:
                print(f"{code.co_name}, line {frame.f_lineno}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    ingest([source], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5)
    os._exit(0)


def main(source: str, folder: str, tokenizer: str, seed: str, rounds: str) -> None:
    draw = random.Random(int(seed))
    shards.parquet()
    for number in range(int(rounds)):
        out = Path(folder) / str(number) / "out"
        for kill, where in enumerate(draw.sample(list(LINES), 2), 1):
            line = draw.randrange(1, LINES[where])
            print(f"line {line} {where}: ", end="", flush=True)
            print(f"ended with {forked(source, str(out), tokenizer, where, line)}", flush=True)
            out.mkdir(parents=True, exist_ok=True)
            shutil.copytree(out, out.with_name(f"killed-{kill}"))
        assert forked(source, str(out), tokenizer) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
