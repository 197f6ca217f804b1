"""The service that turns a job into a written result, with its pipeline, limits, store and worker."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumos.demo.journal import Journal
from lumos.demo.limits import Limits
from lumos.demo.metrics import Metrics
from lumos.demo.reading import holds_still, read_upload
from lumos.demo.store import Store
from lumos.demo.worker import ClipJob, Worker
from lumos.errors import RunError, UserError
from lumos.files import write_json
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.request import Request, Resolved
from lumos.prompt_lists.clips import default_name, record_path
from lumos.video.io import write_video

if TYPE_CHECKING:
    from lumos.demo.replicas import Replicas

FILES = ("image", "video", "last_image")
"""The arguments of a request that may be uploaded files."""
STAND_IN_FRAMES = 1000
"""Frames of the blank clip that stands for an uploaded one before it is read; it takes the memory of one frame."""


class Service:
    """The pipeline, limits, store and worker that the page and the API share.

    metadata(prompt, seed) returns what is written into the file of a result. circumstances()
    returns what is added to the record, the JSON file beside the result. replicas: make the clips in
    place of the pipeline, which then only checks the requests.
    """

    def __init__(
        self,
        pipe: VideoPipeline,
        root: Path,
        limits: Limits,
        metadata: Callable[[str, int], dict[str, Any]],
        circumstances: Callable[[], dict[str, Any]] = dict,
        replicas: Replicas | None = None,
    ):
        self.pipe, self.metadata, self.circumstances, self.replicas = pipe, metadata, circumstances, replicas
        self.limits = limits.of_model(pipe.clip, pipe.settings)
        self.store, self.journal = Store(root, self.limits), Journal(root)
        self.when_ended: list[Callable[[ClipJob], None]] = []  # called with each job that has ended
        self.resolving = threading.Lock()
        self.worker = Worker(self.make, self.limits.queue_length, self._ended, replicas.at_once if replicas else 1)
        self.metrics = Metrics({
            "lumos_queue_waiting": ("clips that wait", lambda: self.worker.status()["waiting"]),
            "lumos_working": ("1 while a clip is made, else 0", lambda: self.worker.status()["state"] == "working"),
        })  # fmt: skip

    @property
    def defaults(self) -> dict[str, Any]:
        """The model's default sampling options and shape of a clip, by name."""
        return {**vars(self.pipe.settings), **vars(self.pipe.clip)}

    def submit(self, *jobs: ClipJob, most: int | None = 1) -> ClipJob:
        """Check the requests of jobs of one owner, put the jobs into the queue, all or none, and return the first.

        most: how many jobs that have not ended the owner may have. UserError if a request is not
        allowed, ServerBusy if the queue does not take the jobs.
        """
        self.check(*jobs)
        return self.worker.submit(*jobs, most=most)

    def check(self, *jobs: ClipJob) -> None:
        """Raise UserError if a request is not allowed. The content of an upload is checked later, in `make`."""
        for job in jobs:
            self.limits.check(job.request)
            self._resolve(self._without_files(job.request))

    def _ended(self, job: ClipJob) -> None:
        seconds = job.record["seconds"] if job.record else None
        self.metrics.clip(job.state, seconds, job.made if job.record else 0)
        if job.is_unwanted and job.record:
            self.store.remove(job.record["file"])
        for tell in self.when_ended:
            tell(job)

    def _without_files(self, request: Request) -> Request:
        """Return the request with blank frames in place of its files.

        The length of a clip is not known yet: it is taken to have more frames than are needed, and a last image beside it
        or its interpolation are left out.
        """
        height, width = request.height or self.pipe.clip.height, request.width or self.pipe.clip.width
        blank = np.zeros((height, width, 3), np.uint8)
        pictures = {name: blank for name in ("image", "last_image") if getattr(request, name) is not None}
        if request.video is None or request.image is not None:  # both are an error, which `resolve` tells
            return replace(request, video=request.video and blank[None], **pictures)
        if request.interpolate is None:
            clip = np.broadcast_to(blank, (STAND_IN_FRAMES, *blank.shape))
            return replace(request, video=clip, last_image=None)
        options = self.pipe.sampling.declared()
        kept = {name: value for name, value in request.options.items()
                if name not in options or not options[name].for_given_frames}  # fmt: skip
        return replace(request, prompt=request.prompt or "a clip", video=None, interpolate=None, last_image=None, options=kept)

    def make(self, job: ClipJob) -> None:
        """Make and write the clip of a job; `job.frames` and `job.progress` grow meanwhile."""
        began = time.perf_counter()
        request = self._read_uploads(job)
        resolved, job.notes = self._resolve(request, self.pipe.check_pictures)
        job.fps = resolved.clip.fps
        if self.replicas is not None:
            frames, about = self.replicas.make(replace(request, seed=resolved.seeds[0]), job.check_stop)
            job.frames.extend(frames)
        else:
            self._stream(job, resolved)
            about = self.circumstances()
        job.record = self._write(job, resolved, about, time.perf_counter() - began)

    def _stream(self, job: ClipJob, resolved: Resolved) -> None:
        """Make the frames of a job in this process."""

        def on_step(frame: int, frames: int, step: int, steps: int) -> None:
            job.progress = (frame + (step + 1) / steps) / frames
            job.check_stop()

        for (frames,) in self.pipe.stream_encoded(self.pipe.encoded(resolved), on_step):
            job.frames.extend(frames)
            job.check_stop()

    def _resolve(
        self, request: Request, check: Callable[[Resolved], None] = lambda resolved: None
    ) -> tuple[Resolved, list[str]]:
        """Return the resolved request and the warnings about it, those of `check` included.

        A lock keeps other threads out, because `warnings.catch_warnings` acts on the whole process.
        """
        with self.resolving, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resolved = self.pipe.resolve(request)
            check(resolved)
        return resolved, [str(warning.message) for warning in caught if warning.category is UserWarning]

    def _read_uploads(self, job: ClipJob) -> Request:
        """Return the request with frames in place of its files; of a clip, only the last frames that the pipeline can use.

        UserError for a clip to interpolate that has more frames than can be doubled within the limits.
        """
        request, allowed, own = job.request, self.limits.of_reading, self.pipe.clip
        frames = {name: read_upload(Path(path), job.check_stop, allowed)
                  for name in ("image", "last_image") if (path := getattr(request, name)) is not None}  # fmt: skip
        if request.video is not None:
            most = (self.limits.max_frames + 1) // 2
            count = request.num_frames or own.num_frames if request.interpolate is None else most + 1
            shape = request.fps or own.fps, count, request.height or own.height, request.width or own.width
            frames["video"] = read_upload(Path(request.video), job.check_stop, allowed, shape)
            if request.interpolate is not None and len(frames["video"]) > most:
                raise UserError(f"a clip to interpolate has at most {most} frames here, at {own.fps} a second; this one has more")
        return replace(request, **frames)

    def kind_of(self, path: Path) -> str:
        """Return "image" or "video", the argument that takes an upload, by its content; errors as of `read_upload`."""
        return "image" if holds_still(path, lambda: None, self.limits.of_reading) else "video"

    def look(self, path: Path) -> np.ndarray:
        """Return the picture of an upload, or the last frame of a clip, as uint8 [H, W, 3]; errors as of `read_upload`."""
        own, is_picture = self.pipe.clip, self.kind_of(path) == "image"
        clip = None if is_picture else (own.fps, 1, own.height, own.width)
        frames = read_upload(path, lambda: None, self.limits.of_reading, clip)
        return frames if is_picture else frames[-1]

    def _write(self, job: ClipJob, resolved: Resolved, circumstances: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write the result and its record as `generate` does, and return the record."""
        request, seed = job.request, resolved.seeds[0]
        path = self.store.new_result(default_name(request.prompt, len(job.frames) == 1, after=f"-{seed}"))
        about = self.metadata(request.prompt, seed)
        record = {
            **about, "file": path.name, "negative_prompt": request.negative_prompt,
            **{name: Path(getattr(request, name)).name if getattr(request, name) else None for name in FILES},
            "settings": resolved.settings, "notes": job.notes, **circumstances, "seconds": round(seconds, 2),
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
