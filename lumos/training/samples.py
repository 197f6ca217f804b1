"""Clips that a run draws on the way, so that one can see what it has learned.

    <output_dir>/samples/step-00000100/
        00-a-red-circle-moves-left.mp4    a clip a prompt (.png: a picture)
        sheet.png                         all of them
        samples.json                      prompts, seeds, settings, seconds, versions

The folder appears whole. Nothing here touches the training: the weights are a copy, and the random states are put back.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumos.errors import RunError, UserError
from lumos.files import replacing_folder, write_json
from lumos.runtime import versions
from lumos.training.logging import RunLog
from lumos.training.settings import SampleSettings
from lumos.video.frames import contact_sheet
from lumos.video.io import write_video


@dataclass(frozen=True)
class Sampler:
    """`draw(prompt, seed, on_step)` -> frames uint8 [T, H, W, 3]; it calls `on_step` often, which may raise to end it."""

    draw: Callable[[str, int, Callable[..., None]], np.ndarray]
    fps: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    prompt: str
    seed: int
    frames: np.ndarray
    seconds: float

    def file(self, number: int) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].strip("-") or "clip"
        return f"{number:02d}-{name}{'.png' if len(self.frames) == 1 else '.mp4'}"


class Ended(Exception):
    """Time is up, or the run was told to stop."""


def render(
    settings: SampleSettings,
    make_sampler: Callable[[], Sampler],
    folder: Path,
    *,
    step: int,
    log: RunLog,
    stop: Callable[[], bool],
    facts: dict[str, Any],
) -> None:
    """Draw the prompts and write them into `folder`; what is not done after max_seconds, or at `stop()`, is left out.

    `facts` go into samples.json. A failure (a full disk, no memory) is said and logged, and the training goes on.
    """
    started = time.monotonic()
    try:
        with random_states_kept():
            sampler = make_sampler()
            samples = draw(settings, sampler, started + settings.max_seconds, stop)
            seconds = round(time.monotonic() - started, 2)
            record = {"step": step, **facts, "settings": sampler.settings, "fps": sampler.fps, "seconds": seconds}
            write(folder, samples, sampler.fps, {**record, "left_out": settings.prompts[len(samples) :], **versions()})
        for number, sample in enumerate(samples):
            file = sample.file(number)
            log.clip(step, f"samples/{Path(file).stem}", folder / file, sample.frames, sampler.fps)
    except (UserError, RunError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        log.say(f"warning: there are no samples of step {step} ({error}); the training goes on")
        log.write(event="samples", step=step, error=str(error))
        return
    log.write(event="samples", step=step, folder=str(folder), clips=len(samples), seconds=seconds)
    if len(samples) < len(settings.prompts):
        log.say(
            f"warning: {len(samples)} of {len(settings.prompts)} samples of step {step} were done in {seconds} s; "
            "raise samples.max_seconds, or name fewer prompts or a lower num_inference_steps in samples.options"
        )


def draw(settings: SampleSettings, sampler: Sampler, until: float, stop: Callable[[], bool]) -> list[Sample]:
    """The first samples, as many as are done by `until`, on the clock of time.monotonic."""

    def on_step(*_: Any) -> None:
        if stop() or time.monotonic() > until:
            raise Ended

    samples = []
    for seed, prompt in enumerate(settings.prompts, settings.seed):
        started = time.monotonic()
        try:
            on_step()
            frames = sampler.draw(prompt, seed, on_step)
        except Ended:
            break
        samples.append(Sample(prompt, seed, frames, round(time.monotonic() - started, 2)))
    return samples


def write(folder: Path, samples: list[Sample], fps: float, record: dict[str, Any]) -> None:
    """All files of one step, in place of an older folder."""
    with replacing_folder(folder) as writing:
        clips = []
        for number, sample in enumerate(samples):
            clip = {"file": sample.file(number), "prompt": sample.prompt, "seed": sample.seed, "seconds": sample.seconds}
            write_video(writing / clip["file"], sample.frames, fps, {"step": record["step"], **clip})
            clips.append(clip)
        if samples:
            contact_sheet([sample.frames for sample in samples], [sample.prompt for sample in samples], writing / "sheet.png")
        write_json(writing / "samples.json", {**record, "clips": clips})


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What is drawn inside from the global generators of torch, numpy and Python is as if it had not been."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
