"""Processes of this machine that do items, one at a time each, and may die or hang of one."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

import torch

from lumos.data.ingest.encode import Result, Skip
from lumos.data.ingest.item import OUT_OF_MEMORY, Item
from lumos.data.ingest.worker_memory import limit_memory
from lumos.errors import RunError

DIED, TIMEOUT = "worker died", "timeout"
AHEAD = 4
"""Items for each worker that may be begun before the oldest of them is done."""

Make = Callable[[], Callable[[Item], Result]]
"""Loads, in the worker, what does an item."""


@dataclass(eq=False)
class _Task:
    item: Item
    result: Result | None = None
    again: bool = False  # it has ended one worker


class _Worker:
    """A process that does items. `task` is what it does, `deadline` until when (`time.monotonic`)."""

    def __init__(self, make: Make, threads: int, folder: str):
        # A server without threads of torch that has imported everything is forked: a new worker costs no seconds.
        context = get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads, folder), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: _Task | None = None
        self.deadline = float("inf")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerPool:
    """Up to `workers` processes that do what `make` gives, each with `threads` threads and `seconds` for an item.

    They stay for the next `results` until `close`.
    """

    def __init__(self, make: Make, workers: int, threads: int, seconds: float):
        self.make, self.workers, self.threads, self.seconds = make, workers, threads, seconds
        self.pool: list[_Worker] = []
        self.begun: deque[_Task] = deque()
        self.again: deque[_Task] = deque()
        self.folder = tempfile.TemporaryDirectory(prefix="lumos-")  # a killed worker cannot tidy up

    def close(self) -> None:
        for worker in self.pool:
            worker.stop()
        self.folder.cleanup()

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """The results of `todo`, in its order. An item whose worker dies is tried again, alone, before it is skipped."""
        while True:
            while task := self._next(todo):
                self._give(task)
            if not self.begun:  # and nothing could be begun: `todo` is at its end
                return
            while self.begun and self.begun[0].result is not None:
                task = self.begun.popleft()
                yield task.item, task.result
            if any(worker.task for worker in self.pool):
                self._receive()

    def _next(self, todo: Iterator[Item]) -> _Task | None:
        """What can be begun now, if anything."""
        busy = [worker.task for worker in self.pool if worker.task]
        if any(task.again for task in busy) or len(busy) == self.workers:
            return None
        if self.again:
            return None if busy else self.again.popleft()
        if len(self.begun) >= AHEAD * self.workers or (item := next(todo, None)) is None:
            return None
        self.begun.append(_Task(item))
        return self.begun[-1]

    def _give(self, task: _Task) -> None:
        worker = next((worker for worker in self.pool if not worker.task), None)
        if worker is None:
            worker = _Worker(self.make, self.threads, self.folder.name)
            self.pool.append(worker)
        worker.task = task
        with suppress(OSError):  # it is dead, which is found when its answer is read
            worker.connection.send(task.item)
        if worker.ready:
            worker.deadline = time.monotonic() + self.seconds

    def _receive(self) -> None:
        """Wait for an answer, a death or a deadline."""
        busy = [worker for worker in self.pool if worker.task]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        heard = wait([worker.connection for worker in busy], None if left == float("inf") else max(left, 0))
        for worker in busy:
            if worker.connection in heard:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    self._died(worker)
                else:
                    self._take(worker, answer)
            elif time.monotonic() >= worker.deadline:
                worker.task.result = Skip(TIMEOUT, f"{worker.task.item.id} took more than {self.seconds:g} s")
                self._remove(worker)

    def _take(self, worker: _Worker, answer: Result | Exception | None) -> None:
        if isinstance(answer, Exception) and not isinstance(answer, Skip):
            raise answer
        if not worker.ready:
            worker.ready, worker.deadline = True, time.monotonic() + self.seconds
            return
        worker.task.result, worker.task, worker.deadline = answer, None, float("inf")

    def _died(self, worker: _Worker) -> None:
        task = worker.task
        self._remove(worker)
        how = f"exit code {worker.process.exitcode}"
        if not worker.ready:
            raise RunError(f"a worker process ended as it began ({how}; out of memory?); use fewer --workers")
        if task.again:
            task.result = Skip(DIED, f"{task.item.id} ended its worker twice ({how})")
        else:
            task.again = True
            self.again.append(task)

    def _remove(self, worker: _Worker) -> None:
        worker.stop()
        self.pool.remove(worker)


def _serve(connection: Connection, make: Make, threads: int, folder: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
    torch.set_num_threads(threads)
    tempfile.tempdir = folder
    memory = None
    try:
        do, answer = make(), None
        memory = limit_memory()
    except Exception as error:
        do, answer = None, error
    while True:
        try:
            connection.send(answer)
            item = connection.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        try:
            answer = do(item)
        except Exception as error:
            answer = error
        if memory and isinstance(answer, Skip) and answer.reason == OUT_OF_MEMORY:
            limit = f"an item may take {memory / 2**30:.0f} GiB in a worker; --workers 0 has no such limit"
            answer = Skip(OUT_OF_MEMORY, f"{answer.detail}; {limit}")


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers: they would go on with their item, and hold memory."""
    parent_process().join()
    os._exit(1)
