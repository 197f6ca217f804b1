"""`bench ingest`: clips a second of an ingest of short clips, and seconds for two seconds of a short and of a long film."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lumos.commands.counts import MAX_CLIPS, check_counts
from lumos.pipeline.defaults import SHIPPED_MODEL

RATE, HEIGHT, WIDTH, SECONDS = 24, 240, 320, 3
"""The short clips: frames a second, pixels, seconds."""
FILMS = {"10 s": (10, 120), "60 s": (60, 620)}
"""Seconds of each film, and the frame at which its two seconds start: 120 frames behind a key frame (one in 250 frames)."""
FPS, FRAMES, SIZE = 8, 17, "128x128"
"""The settings of each ingest: frames per second, frames and size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokenizer", help=f"folder of the video tokenizer, or a model folder; default: {SHIPPED_MODEL}")
    add("--clips", type=int, default=200, help="short clips to ingest; default: %(default)s")
    add("--workers", type=int, nargs="+", help="numbers of worker processes to compare; default: 1 and one for each thread")
    add("--repetitions", type=int, default=3, help="readings of each film, of which the median counts; default: %(default)s")
    add("--output", help="also write the result to this JSON file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.benchmarks.measure import hardware, render_table, rounded, shown
    from lumos.commands.ingest import usual_workers
    from lumos.files import check_writable, write_json
    from lumos.pipeline.defaults import shipped_model
    from lumos.runtime import versions

    check_counts(args, clips=(1, MAX_CLIPS), workers=(0, 1024), repetitions=(1, MAX_CLIPS))
    if args.output:
        check_writable(args.output)
    tokenizer = str(shipped_model() if args.tokenizer is None else args.tokenizer)
    workers = args.workers or list(dict.fromkeys((1, usual_workers("cpu"))))
    with tempfile.TemporaryDirectory(prefix="lumos-ingest-") as name:
        folder = Path(name)
        write_clips(folder / "clips", args.clips)
        rates = {count: clips_per_second(folder, tokenizer, count, args.clips) for count in workers}
        films = {length: film_seconds(folder, *film, args.repetitions) for length, film in FILMS.items()}
    table = [["workers", "clips/s"], *([str(count), shown(rate)] for count, rate in rates.items())]
    print(render_table(table), end="\n\n")
    print(render_table([["2 s of a film of", "s"], *([length, shown(seconds)] for length, seconds in films.items())]))
    result: dict[str, Any] = {
        "bench": "ingest", "hardware": hardware("cpu"), "versions": versions(), "clips": args.clips,
        "clips_per_second": {str(count): rounded(rate) for count, rate in rates.items()},
        "film_seconds": {length: rounded(seconds) for length, seconds in films.items()},
    }  # fmt: skip
    if args.output:
        write_json(args.output, result)
    return result


def write_clips(folder: Path, count: int) -> None:
    """Write short clips of moving blocks with captions; every clip differs from the others."""
    folder.mkdir()
    for number in range(count):
        write_film(folder / f"{number}.mp4", SECONDS, seed=number)
        (folder / f"{number}.txt").write_text(f"clip {number}")


def write_film(path: Path, seconds: int, seed: int) -> None:
    import numpy as np

    from lumos.video.io import write_frames

    blocks = np.random.default_rng(seed).integers(0, 255, (HEIGHT // 20, WIDTH // 20, 3))
    picture = np.kron(blocks, np.ones((20, 20, 1))).astype(np.uint8)
    write_frames(path, (np.roll(picture, 3 * t, axis=1)[None] for t in range(seconds * RATE)), RATE, {})


def clips_per_second(folder: Path, tokenizer: str, workers: int, clips: int) -> float:
    """Return the clips a second of a whole ingest, in which the workers start too."""
    from lumos.data.ingest.encode import ClipSettings
    from lumos.data.ingest.ingest import ingest

    began = time.perf_counter()
    settings = ClipSettings(fps=FPS, size=SIZE, num_frames=FRAMES)
    report = ingest([folder / "clips"], folder / f"shards-{workers}", tokenizer, settings, workers=workers, device="cpu")
    assert report["clips"] == clips, report
    return clips / (time.perf_counter() - began)


def film_seconds(folder: Path, seconds: int, start: int, repetitions: int) -> float:
    """Return the seconds for counting the frames of a film and reading two seconds from the frame `start` on, as ingest does."""
    from lumos.video.reading import open_video

    path, spent = folder / f"film-{seconds}.mp4", []
    write_film(path, seconds, seed=0)
    for _ in range(repetitions):
        began = time.perf_counter()
        with open_video(path, threads=1) as video:
            assert video.count_frames(FPS) == seconds * FPS
            video.read(fps=FPS, num_frames=FRAMES, start=start / RATE, size=(128, 128))
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)
