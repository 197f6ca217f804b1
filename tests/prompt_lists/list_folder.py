"""Lists of prompts, the command that makes their clips, and the clips in a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch


def write_list(*rows, name="list.jsonl"):
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def clips_in(folder):
    """Return the bytes of the clips by name. Records hold times, so they differ from run to run."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command(micro_folder, *args):
    return [sys.executable, "-m", "lumos", "generate", "--model", str(micro_folder), *map(str, args)]


def environment(repo):
    return {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": str(torch.get_num_threads())}
