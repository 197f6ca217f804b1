"""`bench faults`: kill and restart trainings, ingests and lists of clips, and compare them with uninterrupted ones.

All data is made in a temporary folder: tokenizers with random weights, a decoder of two layers, eight
clips. A run is a forked process, so that it needs no time for imports. It is killed at a random moment,
or at a random call that changes files, and started again, up to MOST_KILLS times. Then it runs to its
end. Its result must be the same as that of a run without a kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError
from lumos.progress import LOGGER

DECODER = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128,
    "vocab_size": 2024, "visual_token_count": 1000,
}  # fmt: skip
SIDE, FRAMES, CLIPS = 32, 5, 8
MOST_KILLS = 6
"""The maximum number of kills of one run."""
MOST_CALLS = 150
"""A run is killed before one of its first so many calls that change files."""
SECONDS = 600.0
"""The time limit in seconds of a run that is not killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="time after which no new run starts; default: %(default)g")
    add("--kills", type=int, help="stop after this number of kills; default: only the time counts")
    add("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="kinds of runs to kill, in turn; default: all")
    add("--seed", type=int, default=0, help="seed of the random moments; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return the counts. Raises RunError if a result differs, an item is lost or a run failed."""
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes {args.minutes} is not allowed; give a number above 0")
    if args.kills is not None and args.kills < 1:
        raise UserError(f"--kills {args.kills} is not allowed; give at least 1")
    if not hasattr(os, "fork"):
        raise UserError("bench faults needs a system that can fork processes")
    import_all()
    with tempfile.TemporaryDirectory(prefix="lumos-faults-") as folder:
        result = measure(Path(folder), args.minutes * 60, args.kills, args.kinds, random.Random(args.seed))
    print("\n".join(f"{name:18}{value}" for name, value in result.items()), flush=True)
    if faults := [name for name in ("differing_losses", "lost_items", "failed_runs") if result[name]]:
        raise RunError(f"kills did harm: {', '.join(f'{name} {result[name]}' for name in faults)}")
    return {"bench": "faults", "seed": args.seed, **result}


def measure(folder: Path, seconds: float, most: int | None, kinds: Sequence[str], draw: random.Random) -> dict[str, Any]:
    """Kill runs of these kinds in turn and return the counts of kills and faults.

    Ends after `seconds` or after `most` kills, but not before the first kill.
    """
    started = time.monotonic()
    finish(lambda: make_material(folder), folder / "material")
    whole: dict[str, tuple[Path, float]] = {}
    for kind in dict.fromkeys(("training", *kinds)):  # the lists use the model that the training exports
        begun = time.monotonic()
        finish(lambda kind=kind: KINDS[kind].make(folder, folder / kind), folder / kind)
        whole[kind] = folder / kind, time.monotonic() - begun
        LOGGER.info(f"{kind} without kills: {whole[kind][1]:.1f} s")
    kills: Counter[str] = Counter()
    differing, lost, failed, number = 0, 0, 0, 0
    while not kills or (time.monotonic() - started < seconds and (most is None or kills.total() < most)):
        kind = kinds[number % len(kinds)]
        out, number = folder / f"{kind}-{number}", number + 1
        intact, duration = whole[kind]
        for _ in range(draw.randint(1, MOST_KILLS)):
            at_call = draw.randint(1, MOST_CALLS) if draw.random() < 0.5 else None
            code = forked(lambda out=out, kind=kind: KINDS[kind].make(folder, out), out, draw.uniform(0, duration), at_call)
            kills[kind] += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                failed += 1
                LOGGER.error(f"{kind} ended with exit code {code}: {told(out)}")
            if code == 0 or (most is not None and kills.total() >= most):
                break
        try:
            finish(lambda out=out, kind=kind: KINDS[kind].make(folder, out), out)
        except RunError as error:
            failed += 1
            LOGGER.error(str(error))
        differ, missing = KINDS[kind].compare(out, intact)
        differing, lost = differing + len(differ), lost + len(missing)
        harm = f"differing losses {differ or 'none'}; lost items {missing or 'none'}"
        LOGGER.info(f"{kind} {number}: {kills.total()} kills so far; {harm}")
    return {
        "kills": kills.total(), "differing_losses": differing, "lost_items": lost, "failed_runs": failed, "runs": number,
        "kills_of_each": dict(kills), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------------------


def import_all() -> None:
    """Import what the forked processes need. It must not compute anything, because threads do not survive a fork."""

    import lumos.commands.generate_list
    import lumos.data.ingest.ingest
    import lumos.data.shards.format
    import lumos.data.synthetic.digits
    import lumos.training.loop
    import lumos.training.samples
    from lumos import registry

    lumos.data.shards.format.parquet()
    generator = registry.generator()
    for part in (generator.model, generator.pipeline, generator.task):
        registry.load(part)


def forked(work: Callable[[], object], out: Path, seconds: float, at_call: int | None = None) -> int:
    """Run `work` in a forked process, kill it, and return its exit code.

    The process is killed after `seconds`, or before its call number `at_call` that changes files.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            become_a_run(out)
            if at_call is not None:
                kill_at_file_call(at_call)
            code = int(work() or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    deadline = time.monotonic() + (SECONDS if at_call is not None else seconds)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def become_a_run(out: Path) -> None:
    import torch

    null = os.open(os.devnull, os.O_RDWR)
    messages = os.open(messages_of(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number, descriptor in ((0, null), (1, messages), (2, messages)):
        os.dup2(descriptor, number)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)


def finish(work: Callable[[], object], out: Path) -> None:
    """Run `work` in a forked process without a kill. Raises RunError if it fails."""
    if (code := forked(work, out, SECONDS)) != 0:
        raise RunError(f"a run that was not killed ended with exit code {code}: {told(out)}")


def messages_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.messages")


def told(out: Path) -> str:
    """Return the last messages of a run."""
    return " | ".join(messages_of(out).read_text(errors="replace").splitlines()[-5:])[-600:]


def kill_at_file_call(number: int) -> None:
    """Make this process kill itself before its call number `number` that changes or synchronizes files."""
    from lumos import durable

    calls = 0
    names = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "link")
    for module, name in (*((os, name) for name in names), (durable, "_exchange")):
        function = getattr(module, name)

        def counted(*args: Any, function: Callable = function, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        setattr(module, name, counted)


# -- the kinds of runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunKind:
    """A kind of run.

    make     `make(folder, out)` starts or continues a run that writes into `out`
    compare  `compare(out, whole)` returns (losses that differ, items that are lost) against a run without kills
    """

    make: Callable[[Path, Path], int | None]
    compare: Callable[[Path, Path], tuple[list[str], list[str]]]


def make_material(folder: Path) -> None:
    """Write the tokenizers, the clips with captions and the list of prompts."""
    import numpy as np
    import torch

    from lumos.data.synthetic.sampling import captions
    from lumos.video.io import write_video
    from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

    torch.manual_seed(0)
    VideoTokenizer(VideoTokenizerConfig(
        channels=8, channels_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4, embedding_dim=4,
        levels=(8, 5, 5, 5),
    )).save_pretrained(folder / "video_tokenizer")  # fmt: skip
    symbols = [f"<special{i}>" for i in range(1, 255)]
    TextTokenizer.train(captions(0, 200), 900, reserved_symbols=symbols).save_pretrained(folder / "text_tokenizer")
    for n in range(CLIPS):
        picture = np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        write_video(folder / "clips" / f"{n}.mp4", np.stack([np.roll(picture, t, axis=1) for t in range(FRAMES)]), 8)
        (folder / "clips" / f"{n}.txt").write_text(f"a pattern of number {n} that moves")
    (folder / "prompts.txt").write_text("".join(f"a red circle moves, number {n}\n" for n in range(CLIPS)))


def training_settings(folder: Path, out: Path, **training: Any) -> Any:
    """Return the settings of a training that takes a second and writes checkpoints after steps 2, 4 and 6."""
    from lumos.training.settings import build_settings

    return build_settings({
        "model": {"preset": "tiny", "overrides": DECODER},
        "tokenizer": {"video": str(folder / "video_tokenizer"), "text": str(folder / "text_tokenizer")},
        "data": {"num_frames": FRAMES, "height": SIDE, "width": SIDE, "workers": 0, "processes": 1, "validation_clips": 2,
                 "options": {"kinds": ["shapes"]}},
        "training": {
            "max_steps": 6, "batch_size": 2, "warmup_steps": 1, "lr": 3e-3, "log_every": 1, "save_every_minutes": 0,
            "save_every_steps": 2, "ema_decay": 0.9, "eval_every": 3, "device": "cpu", "output_dir": str(out), **training,
        },
        "logging": {"peak_tflops": 0.1},
    })  # fmt: skip


def train(folder: Path, out: Path) -> None:
    from lumos.training.loop import train

    train(training_settings(folder, out))


def compare_training(out: Path, whole: Path) -> tuple[list[str], list[str]]:
    found, wanted = (_log_of(place) for place in (out, whole))
    differ = [f"{key} of step {step}" for (step, key), value in wanted.items() if found.get((step, key), value) != value]
    lost = [f"{key} of step {step}" for step, key in wanted if (step, key) not in found]
    weights = [place / "export" / "model.safetensors" for place in (out, whole)]
    if not weights[0].is_file() or weights[0].read_bytes() != weights[1].read_bytes():
        lost.append("export")
    return differ, lost + _left_over(out)


def _log_of(out: Path) -> dict[tuple[int, str], list[Any]]:
    """Return all values of losses and norms by step and name. The log of a resumed run may hold a step several times."""
    from lumos.training.logging import read_lines

    values: dict[tuple[int, str], list[Any]] = {}
    for line in read_lines(out / "log.jsonl") if (out / "log.jsonl").is_file() else ():
        for key, value in line.items():
            if "event" not in line and (key == "grad_norm" or "loss" in key):
                values.setdefault((line["step"], key), []).append(value)
    return values


def ingest_clips(folder: Path, out: Path) -> None:
    from lumos.data.ingest.encode import ClipSettings
    from lumos.data.ingest.ingest import ingest

    settings = ClipSettings(fps=8, size=f"{SIDE}x{SIDE}", num_frames=FRAMES)
    ingest([folder / "clips"], out, folder / "video_tokenizer", settings, shard_clips=3, workers=2)


def compare_ingest(out: Path, whole: Path) -> tuple[list[str], list[str]]:
    return [], _different_files(out, whole, (".parquet", ".jsonl")) + _left_over(out)


def make_list(folder: Path, out: Path) -> int:
    from lumos.cli import main

    return main([
        "generate", "--model", str(folder / "training" / "export"), "--prompts", str(folder / "prompts.txt"), "--batch-size", "2",
        "--num-inference-steps", "2", "--output-dir", str(out), "--device", "cpu",
    ])  # fmt: skip


def compare_list(out: Path, whole: Path) -> tuple[list[str], list[str]]:
    records = [f"{clip.name}.json" for clip in whole.glob("*.mp4") if not (out / f"{clip.name}.json").is_file()]
    return [], _different_files(out, whole, (".mp4",)) + records + [path.name for path in out.glob(".unfinished")]


def _different_files(out: Path, whole: Path, suffixes: tuple[str, ...]) -> list[str]:
    def files(place: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in place.glob("*") if path.suffix in suffixes}

    found, wanted = files(out), files(whole)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _left_over(out: Path) -> list[str]:
    """Return the names of all temporary files in a folder."""
    hidden = (".*.part", ".writing-*", ".removing-*", ".old-*")
    return sorted(path.relative_to(out).as_posix() for pattern in hidden for path in out.rglob(pattern))


KINDS = {
    "training": RunKind(train, compare_training),
    "ingest": RunKind(ingest_clips, compare_ingest),
    "list": RunKind(make_list, compare_list),
}
