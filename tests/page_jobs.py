"""A job of the page beside a call of its pipeline, for tests."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np

from lumos import VideoPipeline
from lumos.demo.limits import Limits
from lumos.demo.service import Service
from lumos.demo.worker import ClipJob
from lumos.pipeline.request import Request
from lumos.video.io import read_video, write_video


def job_and_call(model: Path, folder: Path) -> tuple[ClipJob, np.ndarray, np.ndarray]:
    """Return a job that has ended, the frames of its file, and those of a call with the same seed, both int [T, H, W, 3].

    model: a model folder. folder: an empty folder for the results.
    """
    pipe = VideoPipeline.from_pretrained(model, device="cpu")
    service = Service(pipe, folder / "demo", Limits(), lambda prompt, seed: {"prompt": prompt, "seed": seed})
    ended = Event()
    job = service.submit(ClipJob(Request.of("a red circle", seed=3), clean=ended.set))
    assert ended.wait(120)
    service.worker.close()
    assert job.state == "done", job.error
    write_video(folder / "call.mp4", pipe("a red circle", seed=3, output_type="uint8").frames[0], job.fps)
    files = (service.store.results / job.record["file"], folder / "call.mp4")
    made, called = (read_video(file)[0].astype(int) for file in files)
    return job, made, called
