"""The threads that make one clip after the other, and their bounded queue."""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lumos.demo.limits import ServerBusy
from lumos.errors import RunError, UserError, is_out_of_memory
from lumos.pipeline.request import Request

INTERRUPTED = "interrupted"
"""The state of a job that had not ended when the server stopped."""
ENDED = ("done", "failed", "cancelled", INTERRUPTED)


class Cancelled(Exception):
    """The job was cancelled while it was running."""


@dataclass(eq=False)
class ClipJob:
    """A request and its progress.

    `state` is "waiting" or "working", then one of ENDED. The thread of the worker writes the fields and
    other threads read them.
    """

    request: Request
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: str = "waiting"
    progress: float = 0.0  # share of all steps that are done, 0 to 1
    frames: list[np.ndarray] = field(default_factory=list)  # the frames made so far, uint8 [H, W, 3] each
    fps: int = 1
    notes: list[str] = field(default_factory=list)  # warnings, for example of settings without effect
    error: Exception | None = None
    record: dict[str, Any] | None = None  # the record of the written result; its "file" is the name of the result
    made: int = 0  # how many frames are made
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)  # seconds since 1970
    clean: Callable[[], None] = lambda: None  # removes what only this job needs; called when the job ends
    is_unwanted: bool = False  # the result is removed when the job ends
    stop: threading.Event = field(default_factory=threading.Event)  # set to cancel the job

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def check_stop(self) -> None:
        """Raise Cancelled if the job is to stop. The service calls this after every step."""
        if self.stop.is_set():
            raise Cancelled


class Worker:
    """Threads that run `make(job)` for one job after the other.

    `make` must raise Cancelled soon after `job.stop` is set. queue_length: the most jobs that may
    wait. `ended(job)` is called after each job, also after one that was cancelled while it waited.
    threads: how many jobs run at a time; more than one where `make` hands the work to other processes.
    """

    def __init__(
        self,
        make: Callable[[ClipJob], None],
        queue_length: int,
        ended: Callable[[ClipJob], None] = lambda job: None,
        threads: int = 1,
    ):
        self._make, self._queue_length, self._ended = make, queue_length, ended
        self._waiting: deque[ClipJob] = deque()
        self._running: list[ClipJob] = []
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f"lumos-demo-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, *jobs: ClipJob, most: int | None = 1) -> ClipJob:
        """Put jobs of one owner into the queue, all or none, and return the first.

        most: how many jobs that have not ended the owner may have; None is any number. ServerBusy if the
        queue is full, if the owner has too many jobs, or if the worker is closed; UserError for more jobs
        than the owner may ever have.
        """
        with self._changed:
            if self._closed:
                raise ServerBusy("the server is closing; try again later")
            if most is not None and len(jobs) > most:
                raise UserError(f"{len(jobs)} clips are more than you may have at a time ({most}); ask for fewer")
            others = sum(other.owner == jobs[0].owner for other in self._all())
            if most is not None and others + len(jobs) > most:
                if most == 1 and others:
                    raise ServerBusy("your last clip is still being made; wait for it or cancel it")
                raise ServerBusy(
                    f"you have {others} clips that wait or are being made, and may have {most}; wait for one or cancel one"
                )
            room = self._queue_length + len(self._threads) - len(self._all())  # each thread makes one more
            if room < 1:
                raise ServerBusy(f"{self._queue_length} requests are waiting already, no more are taken; try again later")
            if len(jobs) > room:
                raise ServerBusy(f"{len(jobs)} clips do not fit into the queue, which has room for {room} now; try again later")
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return jobs[0]

    def cancel(self, job: ClipJob) -> None:
        """Cancel a job: a waiting job at once, a running job after its current step.

        A job that has ended stays as it is.
        """
        with self._changed:
            job.stop.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, self._stopped())

    def cancel_of(self, owner: str) -> None:
        with self._changed:
            for job in [job for job in self._all() if job.owner == owner]:
                self.cancel(job)

    def ahead(self, job: ClipJob) -> int:
        """Return how many jobs come before this waiting job."""
        with self._changed:
            return self._all().index(job) if job in self._waiting else 0

    def status(self) -> dict[str, Any]:
        with self._changed:
            return {"state": "working" if self._all() else "idle", "waiting": len(self._waiting)}

    def close(self, wait: bool = True) -> None:
        """Interrupt all jobs and refuse new ones. wait: return only after the running job has ended."""
        with self._changed:
            self._closed = True
            for job in self._all():
                self.cancel(job)
            self._changed.notify_all()
        if wait:
            for thread in self._threads:
                thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the threads run and take jobs."""
        return all(thread.is_alive() for thread in self._threads) and not self._closed

    def _end(self, job: ClipJob, state: str) -> None:
        try:
            job.clean()
        finally:
            job.made, job.frames = len(job.frames), []  # a job that is kept for its status keeps no pixels
            job.state = state
            self._ended(job)

    def _stopped(self) -> str:
        """Return the state of a job that is stopped now."""
        return INTERRUPTED if self._closed else "cancelled"

    def _all(self) -> list[ClipJob]:
        return [*self._running, *self._waiting]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
                self._running.append(job)
                job.state = "working"
            state = self._outcome(job)
            with self._changed:
                self._running.remove(job)
                self._end(job, state)

    def _outcome(self, job: ClipJob) -> str:
        """Run a job and return its last state.

        An error is stored in `job.error`, so that the worker goes on.
        """
        try:
            self._make(job)
            return "done"
        except Cancelled:
            return self._stopped()
        except Exception as error:
            job.error = as_told(error)
        return "failed"


def as_told(error: Exception) -> UserError | RunError:
    """Return the error that a client is told of; what only the server may know goes to its log."""
    if isinstance(error, UserError | RunError):
        return error
    if is_out_of_memory(error):
        return RunError("out of memory; ask for a smaller size or fewer frames")
    traceback.print_exc()
    return RunError("the clip failed on the way; the server's log says why")
