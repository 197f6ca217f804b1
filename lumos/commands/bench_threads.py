"""`bench threads`: a clip and a training step with each choice of threads, alone and beside busy processes.

Every figure comes from processes of its own that run `lumos generate` or `lumos train` as a user does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lumos.commands.counts import MAX_CLIPS, check_counts
from lumos.errors import UserError
from lumos.pipeline.defaults import SHIPPED_MODEL
from lumos.threads import Machine

GCC_SPINS = "300000"
"""Rounds that GCC's OpenMP spins by default before a thread sleeps. As the variable is set, Lumos does not change waiting."""
MAX_BUSY = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help=f"model folder of Lumos-1; default: {SHIPPED_MODEL}")
    add("--prompt", default="a large red circle moves left on a gray background", help="what the clip shows; default: %(default)s")
    add("--num-frames", type=int, help="frames of the clip; default: the model's")
    add("--num-inference-steps", type=int, help="decoding steps; default: the model's")
    add("--steps", type=int, default=4, help="training steps of a run; the first one does not count; default: %(default)s")
    add("--batch-size", type=int, default=4, help="clips of a training step; default: %(default)s")
    add("--busy", type=int, help="busy processes beside it; default: one for each core; 0: measure alone only")
    add("--repetitions", type=int, default=3, help="processes of each figure, of which the median counts; default: %(default)s")
    add("--output", help="also write the result to this JSON file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.benchmarks.measure import hardware, render_table, rounded, shown
    from lumos.files import check_writable, write_json
    from lumos.pipeline.defaults import shipped_model
    from lumos.progress import progress_bar
    from lumos.runtime import versions

    check_counts(args, repetitions=(1, MAX_CLIPS), steps=(2, MAX_CLIPS), batch_size=(1, MAX_CLIPS), busy=(0, MAX_BUSY))
    if args.output:
        check_writable(args.output)
    model = Path(args.model) if args.model is not None else shipped_model()
    if not (model / "pipeline.json").is_file():
        raise UserError(f"{model} is no model folder with a pipeline.json; give the folder of a saved model")
    cores = args.threads or Machine.now().allowed
    busy = cores if args.busy is None else args.busy
    ways = choices(cores)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    states = {"alone": 0, **({"busy": busy} if busy else {})}
    bar = progress_bar(desc="threads", total=len(states) * len(ways) * args.repetitions, leave=False)
    with tempfile.TemporaryDirectory(prefix="lumos-threads-") as folder, bar:
        for state, others in states.items():
            made: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for _ in range(args.repetitions):
                for name, variables in ways.items():  # in turn, so that a disturbance of the machine affects all
                    made[name].append(measure(args, model, Path(folder), variables, others))
                    bar.update()
            found[state] = {name: medians(runs) for name, runs in made.items()}
    headers = ["threads", *(f"{what}, {state}" for state in found for what in ("clip s", "training step s"))]
    rows = [[name, *(shown(of[name][key]) for of in found.values() for key in ("clip_seconds", "step_seconds"))] for name in ways]
    print(render_table([headers, *rows]))
    result = {
        "bench": "threads", "hardware": hardware("cpu"), "versions": versions(), "busy_processes": busy,
        "repetitions": args.repetitions, "batch_size": args.batch_size, "seconds": {
            state: {name: {key: rounded(value) for key, value in of.items()} for name, of in ways_of.items()}
            for state, ways_of in found.items()
        },
    }  # fmt: skip
    if args.output:
        write_json(args.output, result)
    return result


def choices(cores: int) -> dict[str, dict[str, str]]:
    """Return the environment variables of each choice. The last one sets none, so that Lumos chooses."""
    every = {"OMP_NUM_THREADS": str(cores)}
    return {
        "1": {"OMP_NUM_THREADS": "1"},
        f"{cores}, spinning": every | {"GOMP_SPINCOUNT": GCC_SPINS},
        f"{cores}, passive": every | {"OMP_WAIT_POLICY": "PASSIVE"},
        "chosen by Lumos": {},
    }


def measure(args: argparse.Namespace, model: Path, folder: Path, variables: dict[str, str], others: int) -> dict[str, Any]:
    """Make a clip and train a few steps beside `others` busy processes; return the seconds and the numbers of threads."""
    from lumos.benchmarks.processes import busy_processes, environment, timed_process
    from lumos.files import read_json

    env = environment(**variables)
    clip, config = folder / "clip.mp4", folder / "train.yaml"
    sizes = {"--num-frames": args.num_frames, "--num-inference-steps": args.num_inference_steps}
    options = [word for name, value in sizes.items() if value is not None for word in (name, str(value))]
    config.write_text(json.dumps(training(model, folder / "run", args)))
    with busy_processes(others) if others else nullcontext():
        generate = ["-m", "lumos", "generate", "--model", str(model), "--prompt", args.prompt, "--seed", "0", "--device", "cpu"]
        timed_process([*generate, *options, "--output", str(clip)], env, "a clip")
        timed_process(["-m", "lumos", "train", "--config", str(config)], env, "training steps")
    record = read_json(Path(f"{clip}.json"), "the record of a clip")
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / "run")  # the next run would continue this one
    steps = [line["seconds"] for line in lines if "event" not in line and "seconds" in line][1:]
    return {
        "clip_seconds": record["seconds"]["generate"], "step_seconds": statistics.median(steps), "clip_threads": record["threads"],
        "step_threads": next(line["threads"] for line in lines if line.get("event") == "start"),
    }  # fmt: skip


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median([run[key] for run in runs]) for key in runs[0]}


def training(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a training of the model on synthetic scenes of the size of its clips.

    A thread makes the batches ahead.
    """
    from lumos.files import read_json

    defaults = read_json(model / "pipeline.json", "a model's defaults")
    clip = {name: defaults[name] for name in ("num_frames", "height", "width", "fps")}
    if args.num_frames is not None:
        clip["num_frames"] = args.num_frames
    return {
        "model": {"from": str(model)}, "data": {"source": "worlds", "workers": 1, **clip},
        "training": {
            "max_steps": args.steps, "batch_size": args.batch_size, "warmup_steps": 1, "log_every": 1, "save_every_minutes": 0,
            "device": "cpu", "output_dir": str(folder),
        },
    }  # fmt: skip
