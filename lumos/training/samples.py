"""Sample clips that a run generates while it trains, to show what the model has learned so far.

    <output_dir>/samples/step-00000100/
        00-a-red-circle-moves-left.mp4    one clip for each prompt (.png if it has one frame)
        sheet.png                         all clips on one page
        samples.json                      prompts, seeds, settings, seconds, versions

The folder appears only when it is complete. Samples do not change the training: they use a copy of
the weights, and the states of the random generators are restored afterwards.
"""

from __future__ import annotations

import logging
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
from lumos.training.sections import SampleSettings
from lumos.video.frames import contact_sheet
from lumos.video.io import write_video


@dataclass(frozen=True)
class Sampler:
    """A function that generates clips, with the facts that are written beside them.

    `draw(prompt, seed, on_step)` returns frames uint8 [T, H, W, 3]. It calls `on_step` often
    while it generates; an exception of `on_step` ends the clip early.
    """

    draw: Callable[[str, int, Callable[..., None]], np.ndarray]
    fps: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class FinishedSample:
    """A finished clip: frames uint8 [T, H, W, 3], and the seconds that it took."""

    prompt: str
    seed: int
    frames: np.ndarray
    seconds: float

    def file(self, number: int) -> str:
        """Return the file name of the clip, which begins with `number`."""
        name = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].strip("-") or "clip"
        return f"{number:02d}-{name}{'.png' if len(self.frames) == 1 else '.mp4'}"


class Ended(Exception):
    """The time for samples is over, or the run was told to stop."""


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
    """Generate a clip for each prompt and write the clips into `folder`.

    Clips that are unfinished after `max_seconds`, or when `stop()` becomes true, are left out.
    samples.json holds `facts` too. A failure, for example a full disk or too little memory, is
    printed and logged, and the training goes on.
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
        log.say(f"warning: there are no samples of step {step} ({error}); the training goes on", logging.WARNING)
        log.write(event="samples", step=step, error=str(error))
        return
    log.write(event="samples", step=step, folder=str(folder), clips=len(samples), seconds=seconds)
    if len(samples) < len(settings.prompts):
        log.say(
            f"warning: {len(samples)} of {len(settings.prompts)} samples of step {step} were finished in {seconds} s; "
            "raise samples.max_seconds, or name fewer prompts or a lower num_inference_steps in samples.options",
            logging.WARNING,
        )


def draw(settings: SampleSettings, sampler: Sampler, until: float, stop: Callable[[], bool]) -> list[FinishedSample]:
    """Return the samples that are finished by `until`, a time of time.monotonic, in the order of prompts.

    Prompt i of `settings.prompts` has the seed `settings.seed` + i.
    """

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
        samples.append(FinishedSample(prompt, seed, frames, round(time.monotonic() - started, 2)))
    return samples


def write(folder: Path, samples: list[FinishedSample], fps: float, record: dict[str, Any]) -> None:
    """Write all files of one step; an older folder of the same step is replaced."""
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
    """Restore the states of the global random generators of torch, numpy and Python at the end of the block."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
