"""The clips that clients of the API have asked for, by id: what a request for them holds, and what is told of them."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.exceptions import HTTPException

from lumos.demo.keys import Key, Keys
from lumos.demo.limits import TooLarge
from lumos.demo.schema import check_types, request_schema, with_whole_numbers
from lumos.demo.service import FILES, Service
from lumos.demo.worker import INTERRUPTED, ClipJob
from lumos.errors import RunError, UserError, shown
from lumos.pipeline.request import Request, needs_words
from lumos.prompt_lists.clips import record_path

DATA_URL = re.compile(r"data:(?P<type>[\w/+.-]*)(;[^,;]*)*;base64,", re.ASCII | re.IGNORECASE)
AS_USUAL = str.maketrans("-_", "+/", " \t\r\n")
"""Turns base64 as some programs write it, in lines or with the two characters for addresses, into the usual form."""
STOPPED = "the server was stopped before the clip was made; ask for it again"
LOCAL = "local"
"""The owner of the clips on a server without keys."""


class Clips:
    """The jobs of the API by id, in the order in which they were asked for.

    Of those that have ended, as many are kept as the server keeps results. The journal has them from one start of the server to
    the next.
    """

    def __init__(self, service: Service):
        self.service, self.schema = service, request_schema(service.pipe, service.limits)
        self._jobs = {job.id: job for job in service.journal.jobs()}
        self._lock = threading.Lock()
        service.when_ended.append(self._ended)

    def add(self, bodies: Sequence[Any], client: Key, keys: Keys) -> list[ClipJob]:
        """Put a job for each JSON object into the queue, all or none, and return the jobs.

        UserError if a request is not allowed, ServerBusy if the queue or the client's limits do not allow them.
        """
        most = self.service.limits.queue_length + 1
        if not 1 <= len(bodies) <= most:
            raise UserError(f"the list has {len(bodies)} clips; give 1 to {most}")
        jobs: list[ClipJob] = []
        try:
            for number, body in enumerate(bodies, start=1):
                try:
                    jobs.append(job := self._job(body, client))
                    self.service.check(job)
                except UserError as error:
                    raise type(error)(f"clip {number}: {error}" if len(bodies) > 1 else str(error)) from error
            with keys.counted(client, len(jobs)):
                self.service.worker.submit(*jobs, most=client.queue_length)
            self._keep(jobs)
            return jobs
        except BaseException:
            for job in jobs:
                job.clean()
            raise

    def _keep(self, jobs: Sequence[ClipJob]) -> None:
        with self._lock:
            for job in jobs:
                self._jobs[job.id] = job
                self.service.journal.save(job)
            ended = [job for job in self._jobs.values() if job.ended]
            for old in ended[: max(0, len(ended) - self.service.limits.keep_results)]:
                self._forget(old)

    def _forget(self, job: ClipJob) -> None:
        self._jobs.pop(job.id, None)
        self.service.journal.forget(job)

    def _ended(self, job: ClipJob) -> None:
        with self._lock:
            if job.id in self._jobs:
                self.service.journal.save(job)

    def _job(self, body: Any, client: Key) -> ClipJob:
        if not isinstance(body, dict):
            raise UserError(f"the clip is {shown(body, 40)}; give an object, for example {{\"prompt\": \"a red circle\"}}")
        values = with_whole_numbers({name: value for name, value in body.items() if value is not None}, self.schema)
        check_types(values, self.schema)
        if "prompt" not in values and needs_words(values.get("interpolate"), values.get("views")):
            raise UserError("prompt is missing; say in words what the clip shows")
        folders: list[Path] = []

        def clean() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        try:
            for name in set(values) & set(FILES):
                values[name] = self._file(name, values[name])
                folders.append(values[name].parent)
            request = Request.of(**{"prompt": "", **values})
        except BaseException:
            clean()
            raise
        return ClipJob(request, owner=client.name or LOCAL, clean=clean)

    def _file(self, name: str, text: str) -> Path:
        """Write a file that is in a request as base64 into the store, and return its path."""
        head = DATA_URL.match(text[:200])
        text = text[head.end() if head else 0 :].translate(AS_USUAL)
        if len(text) > 4 * self.service.limits.upload_bytes // 3 + 200:
            raise TooLarge(f"{name} is larger than {self.service.limits.max_upload_mb:g} MB; make it smaller")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{name} is not base64; send the bytes of a file in base64, or a data: URL of them") from None
        if not data:
            raise UserError(f"{name} is empty; send the bytes of a file")
        path = self.service.store.new_upload(f"{name}.{head['type'].rpartition('/')[2]}" if head and head["type"] else name)
        try:
            path.write_bytes(data)
        except OSError as error:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise RunError(f"the server cannot keep the {name} ({error.strerror}); try again later") from error
        return path

    def find(self, called: str, client: Key) -> ClipJob:
        """Return the job of an id; HTTPException with status 404 if the client has none of it."""
        job = self._jobs.get(called)
        if job is None or job.owner != (client.name or LOCAL):
            kept = f"the last {self.service.limits.keep_results} that have ended"
            raise HTTPException(404, f"there is no clip {shown(called, 40)}; the server keeps {kept}")
        return job

    def page(self, client: Key, limit: int, before: str | None) -> dict[str, Any]:
        """Return the last clips of a client, the newest first, as `lumos.demo.schema.CLIPS` has it.

        before: the id of a clip; the page then begins behind it.
        """
        with self._lock:
            jobs = [job for job in reversed(self._jobs.values()) if job.owner == (client.name or LOCAL)]
        if before is not None:
            jobs = jobs[jobs.index(self.find(before, client)) + 1 :]
        found = jobs[:limit]
        return {"clips": [self.told(job) for job in found], "next": found[-1].id if len(jobs) > limit else None}

    def cancel(self, job: ClipJob) -> None:
        """Cancel a job; HTTPException with status 409 if it has ended."""
        if job.ended:
            raise HTTPException(409, f"the clip has ended ({job.state}) and cannot be cancelled; DELETE removes it")
        self.service.worker.cancel(job)

    def remove(self, job: ClipJob) -> None:
        """Cancel a job if it has not ended, and forget it with its files."""
        with self._lock:
            self._forget(job)
        job.is_unwanted = True  # a job that ends from here on loses its result when it ends
        self.service.worker.cancel(job)
        if job.ended and job.record is not None:
            self.service.store.remove(job.record["file"])

    def result(self, job: ClipJob) -> Path:
        """Return the file of a job that is done; HTTPException with status 409 or 410 if there is none."""
        if job.state != "done" or job.record is None:
            why = f" ({job.error})" if job.error else ""
            raise HTTPException(409, f"the clip is {job.state}{why}; a clip has content when its status is done")
        path = self.service.store.find(job.record["file"])
        if path is None:
            raise HTTPException(410, "the clip was removed to make room for new ones; ask for it again with the same seed")
        return path

    def told(self, job: ClipJob) -> dict[str, Any]:
        """Return the status of a job, as `lumos.demo.schema.CLIP` has it."""
        state, record = job.state, job.record  # the state first: it is written last
        done = state == "done" and record is not None
        seed = record["seed"] if record else job.request.seed
        return {
            "id": job.id, "status": state, "progress": 1.0 if done else round(min(job.progress, 1.0), 4),
            "ahead": self.service.worker.ahead(job), "frames": job.made or len(job.frames), "prompt": job.request.prompt,
            "created": datetime.fromtimestamp(job.created, UTC).isoformat(timespec="seconds"), "seed": seed,
            "seconds": record["seconds"] if done else None, "notes": list(job.notes),
            "error": str(job.error) if job.error else STOPPED if state == INTERRUPTED else None,
            "content": f"/api/clips/{job.id}/content" if done else None,
            "record": f"/api/results/{quote(record_path(Path(record['file'])).name)}" if done else None,
        }  # fmt: skip


def bodies_of(document: Any) -> tuple[list[Mapping[str, Any]], bool]:
    """Return the requests in a JSON document, one object or a list of objects, and whether it is a list."""
    return (document, True) if isinstance(document, list) else ([document], False)
