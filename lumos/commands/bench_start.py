"""`bench start`: CPU seconds of the first command of the README, against a bare `import torch`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from lumos.commands.counts import MAX_CLIPS, check_counts
from lumos.pipeline.defaults import SHIPPED_MODEL

PROMPT = "a large red circle moves left on a gray background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help=f"model folder; default: {SHIPPED_MODEL}")
    add("--repetitions", type=int, default=3, help="processes of each figure, of which the median counts; default: %(default)s")
    add("--output", help="also write the result to this JSON file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.benchmarks.measure import hardware, ratio, render_table, rounded, shown
    from lumos.benchmarks.processes import environment, timed_process
    from lumos.files import check_writable, write_json
    from lumos.pipeline.defaults import shipped_model
    from lumos.progress import progress_bar
    from lumos.runtime import versions

    check_counts(args, repetitions=(1, MAX_CLIPS))
    if args.output:
        check_writable(args.output)
    model = str(shipped_model() if args.model is None else args.model)
    env = environment(**({} if args.threads is None else {"OMP_NUM_THREADS": str(args.threads)}))
    with tempfile.TemporaryDirectory(prefix="lumos-start-") as folder:
        generate = ["-m", "lumos", "generate", "--model", model, "--prompt", PROMPT, "--device", "cpu"]
        commands = {
            "import torch": ["-c", "import torch"],
            "import lumos": ["-c", "from lumos import VideoPipeline"],
            "generate --help": ["-m", "lumos", "generate", "--help"],
            "first command": [*generate, "--output", str(Path(folder) / "clip.mp4")],
        }
        spent = {name: [] for name in commands}
        for _ in progress_bar(range(args.repetitions), desc="start", leave=False):
            for name, command in commands.items():  # in turn, so that a disturbance of the machine affects all
                spent[name].append(timed_process(command, env, name))
    figures = {
        name: {key: rounded(statistics.median(getattr(run, key) for run in runs)) for key in ("cpu_seconds", "seconds")}
        for name, runs in spent.items()
    }
    bare = figures["import torch"]["cpu_seconds"]
    rows = [[name, *map(shown, of.values()), shown(ratio(of["cpu_seconds"], bare))] for name, of in figures.items()]
    print(render_table([["process", "CPU s", "s", "x import torch"], *rows]))
    result = {
        "bench": "start", "hardware": hardware("cpu"), "versions": versions(), "repetitions": args.repetitions,
        "processes": figures, "first_command_over_import_torch": ratio(figures["first command"]["cpu_seconds"], bare),
    }  # fmt: skip
    if args.output:
        write_json(args.output, result)
    return result
