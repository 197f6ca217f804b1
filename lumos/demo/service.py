"""The service that turns a job into a written result, with its pipeline, limits, store and worker."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lumos.demo.limits import Limits
from lumos.demo.reading import read_upload
from lumos.demo.store import Store
from lumos.demo.worker import Job, Worker
from lumos.errors import RunError
from lumos.files import write_json
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.request import Request, Resolved
from lumos.prompt_lists.clips import default_name, record_path
from lumos.video.io import write_video


class Service:
    """The pipeline, limits, store and worker that the page and the API share.

    metadata(prompt, seed) returns what is written into the file of a result. circumstances()
    returns what is added to the record, the JSON file beside the result.
    """

    def __init__(
        self,
        pipe: VideoPipeline,
        root: Path,
        limits: Limits,
        metadata: Callable[[str, int], dict[str, Any]],
        circumstances: Callable[[], dict[str, Any]] = dict,
    ):
        self.pipe, self.metadata, self.circumstances = pipe, metadata, circumstances
        self.limits = limits.of_model(pipe.clip, pipe.settings)
        self.store = Store(root, self.limits)
        self.resolving = threading.Lock()
        self.worker = Worker(self.make, self.limits.queue_length)

    @property
    def defaults(self) -> dict[str, Any]:
        """The model's default sampling options and shape of a clip, by name."""
        return {**vars(self.pipe.settings), **vars(self.pipe.clip)}

    def submit(self, job: Job) -> Job:
        """Check the request of a job and put the job into the queue.

        The content of an upload is checked later, in `make`. UserError if the request is not
        allowed, Busy if the queue does not take the job.
        """
        self.limits.check(job.request)
        options = self.pipe.sampling.declared()
        kept = {name: value for name, value in job.request.options.items()
                if name not in options or not options[name].for_given_frames}  # fmt: skip
        self._resolve(replace(job.request, image=None, video=None, options=kept))
        return self.worker.submit(job)

    def make(self, job: Job) -> None:
        """Make and write the clip of a job; `job.frames` and `job.progress` grow meanwhile."""
        began = time.perf_counter()
        request = self._read_uploads(job)
        resolved, job.notes = self._resolve(request)
        job.fps = resolved.clip.fps

        def on_step(frame: int, frames: int, step: int, steps: int) -> None:
            job.progress = (frame + (step + 1) / steps) / frames
            job.check_stop()

        for (frames,) in self.pipe.stream_encoded(self.pipe.encode(resolved), on_step):
            job.frames.extend(frames)
            job.check_stop()
        job.record = self._write(job, resolved, time.perf_counter() - began)

    def _resolve(self, request: Request) -> tuple[Resolved, list[str]]:
        """Return the resolved request and the warnings about it.

        A lock keeps other threads out, because `warnings.catch_warnings` acts on the whole process.
        """
        with self.resolving, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resolved = self.pipe.resolve(request)
        return resolved, [str(warning.message) for warning in caught if warning.category is UserWarning]

    def _read_uploads(self, job: Job) -> Request:
        """Return the request with frames in place of its files; of a clip, only the last frames that the pipeline can use."""
        request, allowed, own = job.request, self.limits.of_reading, self.pipe.clip
        if request.image is not None:
            return replace(request, image=read_upload(Path(request.image), job.check_stop, allowed))
        if request.video is not None:
            shape = own.fps, request.num_frames or own.num_frames, request.height or own.height, request.width or own.width
            return replace(request, video=read_upload(Path(request.video), job.check_stop, allowed, shape))
        return request

    def _write(self, job: Job, resolved: Resolved, seconds: float) -> dict[str, Any]:
        """Write the result and its record as `generate` does, and return the record."""
        request, seed = job.request, resolved.seeds[0]
        path = self.store.new_result(default_name(request.prompt, len(job.frames) == 1, after=f"-{seed}"))
        about = self.metadata(request.prompt, seed)
        record = {
            **about, "file": path.name, "negative_prompt": request.negative_prompt,
            **{name: getattr(request, name) and Path(getattr(request, name)).name for name in ("image", "video")},
            "settings": resolved.settings, "notes": job.notes, **self.circumstances(), "seconds": round(seconds, 2),
        }  # fmt: skip
        try:
            write_video(path, np.stack(job.frames), job.fps, about)
            write_json(record_path(path), record)
        except RunError as error:  # its message names a folder of the server, which a visitor must not see
            path.unlink(missing_ok=True)
            reason = getattr(error.__cause__, "strerror", None) or "writing failed"
            raise RunError(f"the server cannot keep the clip ({reason}); try again later") from error
        self.store.stay(path.name)
        return record
