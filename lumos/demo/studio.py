"""From a job to a written result: the pipeline, the uploads and the folder in one place."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from lumos import __version__
from lumos.commands.generate import default_output, record_path
from lumos.demo.limits import Limits
from lumos.demo.reading import read_upload
from lumos.demo.store import Store
from lumos.demo.worker import Job, Worker
from lumos.files import write_json
from lumos.pipeline import LumosPipeline
from lumos.pipeline_call import Request
from lumos.runtime import versions
from lumos.video_io import write_video


class Studio:
    """What page and API share. `model`: what the model is called in records."""

    def __init__(self, pipe: LumosPipeline, root: Path, limits: Limits, model: str):
        self.pipe, self.model = pipe, model
        self.limits = limits.of_model(pipe.clip, pipe.settings)
        self.store = Store(root, self.limits)
        self.worker = Worker(self.make, self.limits.queue_length)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the model makes when not told otherwise."""
        return {**vars(self.pipe.settings), **vars(self.pipe.clip)}

    def submit(self, job: Job) -> Job:
        """Check a job's request against the bounds and queue it; UserError or Busy."""
        self.limits.check(job.request, self.pipe.model.config)
        return self.worker.submit(job)

    def make(self, job: Job) -> None:
        """Make and write the clip of a job; its frames appear in it on the way."""
        began = time.perf_counter()
        request = self._read_uploads(job)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ready = self.pipe.prepare(request)
        job.notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
        job.fps = ready.clip.fps

        def on_step(frame: int, frames: int, step: int, steps: int) -> None:
            job.progress = (frame + (step + 1) / steps) / frames
            job.check_stop()

        for (frames,) in self.pipe.stream_prepared(ready, on_step):
            job.frames.extend(frames)
            job.check_stop()
        stride = self.pipe.model.config.temporal_compression
        settings = ready.settled(1 + (len(job.frames) - 1) // stride, stride)
        job.record = self._write(job, ready.seeds[0], settings, time.perf_counter() - began)

    def _read_uploads(self, job: Job) -> Request:
        """The request with its files read; a clip's rest is cut to what the pipeline may use of it."""
        request, limits, own = job.request, self.limits, self.pipe.clip
        if request.image is not None:
            return replace(request, image=read_upload(Path(request.image), limits.max_reading_seconds, job.check_stop))
        if request.video is not None:
            shape = own.fps, request.num_frames or own.num_frames, request.height or own.height, request.width or own.width
            video = read_upload(
                Path(request.video), limits.max_reading_seconds, job.check_stop, shape, limits.max_upload_seconds
            )
            return replace(request, video=video)
        return request

    def _write(self, job: Job, seed: int, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write the result with its record beside it, as `generate` does; returns the record."""
        request = job.request
        name = Path(default_output(request.prompt, seed, len(job.frames))).name
        path = self.store.new_result(name)
        metadata = {"prompt": request.prompt, "seed": seed, "model": self.model, "lumos": __version__}
        write_video(path, np.stack(job.frames), settings["fps"], metadata)
        record = {
            **metadata, "file": path.name, "negative_prompt": request.negative_prompt,
            **{name: getattr(request, name) and Path(getattr(request, name)).name for name in ("image", "video")},
            "settings": settings, "notes": job.notes,
            "dtype": str(self.pipe.dtype).removeprefix("torch."), "device": str(self.pipe.device),
            "created": datetime.now().astimezone().isoformat(timespec="seconds"), "seconds": round(seconds, 2),
            "versions": versions(),
        }  # fmt: skip
        write_json(record_path(path), record)
        return record
