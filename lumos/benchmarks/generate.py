"""A whole model at its own default settings: how long it takes to be ready, how long for a clip, how much memory at most.

All of it in one fresh process that does nothing else; the peak is the whole process's (on CUDA: all that torch allocated).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lumos.benchmarks.apart import run_apart
from lumos.benchmarks.measure import MB, Bench, Report, ratio, rounded, shown, timed
from lumos.commands.generate import shipped_model
from lumos.errors import UserError
from lumos.runtime import peak_memory_bytes


@dataclass(frozen=True)
class Settings:
    """model: folder. Clips are made one at a time, with the seeds 0, 1, ..."""

    model: str
    prompt: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="model folder; default: the shipped model")
    add("--prompt", default="a large red circle moves left on a gray background", help="default: %(default)s")


def settings_from(args: argparse.Namespace) -> Settings:
    model = Path(args.model) if args.model else shipped_model()
    if not (model / "config.json").is_file():
        raise UserError(f"there is no model in {model} (no config.json); name its folder with --model")
    if not args.prompt.strip():
        raise UserError(f"the prompt is empty ({args.prompt!r}); say in words what the clip shows")
    return Settings(str(model), args.prompt)


def steps(settings: Settings, bench: Bench) -> int:
    return 1


def make_clips(model: str, prompt: str, clips: int, device: str, dtype: str) -> dict[str, Any]:
    """Load and generate; figures in seconds and bytes. Runs in a process of its own."""
    import torch
    import transformers

    from lumos.pipeline import LumosPipeline
    from lumos.runtime import seconds_since_start

    transformers.utils.logging.disable_progress_bar()
    started = seconds_since_start()
    begin = time.perf_counter()
    pipe = LumosPipeline.from_pretrained(model, dtype=getattr(torch, dtype), device=device)
    loaded = time.perf_counter() - begin
    seconds = []
    for seed in range(clips):
        spent, result = timed(lambda seed=seed: pipe(prompt, seed=seed), device)
        seconds.append(spent)
    return {
        "start": started, "load": loaded, "clips": seconds, "peak": peak_memory_bytes(torch.device(device)),
        "frames": len(result.frames[0]), "settings": result.settings,
    }  # fmt: skip


def run(settings: Settings, bench: Bench) -> Report:
    call = {**asdict(settings), "clips": bench.repetitions, **bench.place}
    made = run_apart("generate", "make_clips", call, threads=bench.threads, what=f"generation with {settings.model}")
    bench.step()
    clip = statistics.median(made["clips"])
    video = made["frames"] / made["settings"]["fps"]
    measured = {
        "start_seconds": rounded(made["start"]), "load_seconds": rounded(made["load"]),
        "first_clip_seconds": rounded(made["clips"][0]), "clip_seconds": rounded(clip),
        "all_clip_seconds": [rounded(s) for s in made["clips"]], "frames": made["frames"],
        "peak_memory_mb": rounded(made["peak"] / MB),
    }  # fmt: skip
    table = [
        ["start s", "load s", "first clip s", "clip s", "frames", "peak MB"],
        [shown(made["start"]), shown(made["load"]), shown(made["clips"][0]), shown(clip), str(made["frames"]),
         shown(made["peak"] / MB)],
    ]  # fmt: skip
    ratios = {"clip_seconds_per_second_of_video": ratio(clip, video)}
    return Report({**asdict(settings), "generation": made["settings"]}, measured, ratios, table)
