"""A pool of worker processes that run items one at a time and are replaced if they die or hang."""

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
"""Largest number of items per worker that are started before the oldest of them is finished."""

Make = Callable[[], Callable[[Item], Result]]
"""A function that is called once in each worker and returns the function that runs an item."""


@dataclass(eq=False)
class _Task:
    item: Item
    result: Result | None = None
    again: bool = False  # a worker already died while it ran this item


class _Worker:
    """A worker process. It must finish its present `task` before `deadline` (a time of `time.monotonic`)."""

    def __init__(self, make: Make, threads: int, folder: str):
        # With "forkserver", workers are forked from a server that has imported all modules and started no
        # threads of torch. A new worker then starts at once; importing the modules takes seconds.
        context = get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([__name__, "torch._dynamo"])  # torch imports the second one at the first use
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
    """A pool of up to `workers` processes that run items with the function that `make` returns.

    Each process uses `threads` threads of torch and has `seconds` for each item. The processes are kept
    for the next call of `results` until `close`.
    """

    def __init__(self, make: Make, workers: int, threads: int, seconds: float):
        self.make, self.workers, self.threads, self.seconds = make, workers, threads, seconds
        self.pool: list[_Worker] = []
        self.begun: deque[_Task] = deque()
        self.again: deque[_Task] = deque()
        # The temporary files of all workers are in one folder, because a killed worker cannot delete its own files.
        self.folder = tempfile.TemporaryDirectory(prefix="lumos-")

    def close(self) -> None:
        for worker in self.pool:
            worker.stop()
        self.folder.cleanup()

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item of `todo` with its result, in order.

        If the worker of an item dies, the item is tried again while no other item runs. It is skipped if
        its worker dies again.
        """
        while True:
            while task := self._next(todo):
                self._give(task)
            if not self.begun:  # and no task could be started, so `todo` has no more items
                return
            while self.begun and self.begun[0].result is not None:
                task = self.begun.popleft()
                yield task.item, task.result
            if any(worker.task for worker in self.pool):
                self._receive()

    def _next(self, todo: Iterator[Item]) -> _Task | None:
        """Return the task to start now, or None if no task can be started."""
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
        with suppress(OSError):  # the worker is dead, which `_receive` notices
            worker.connection.send(task.item)
        if worker.ready:
            worker.deadline = time.monotonic() + self.seconds

    def _receive(self) -> None:
        """Wait until a worker answers, dies or reaches its deadline, and handle it."""
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
            raise RunError(f"a worker process ended while it was starting ({how}; out of memory?); use fewer --workers")
        if task.again:
            task.result = Skip(DIED, f"{task.item.id} ended its worker twice ({how})")
        else:
            task.again = True
            self.again.append(task)

    def _remove(self, worker: _Worker) -> None:
        worker.stop()
        self.pool.remove(worker)


def _serve(connection: Connection, make: Make, threads: int, folder: str) -> None:
    """Run items in a worker: send None (or the error of `make`) when ready, then a result for each item received."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
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
            limit = f"an item may use {memory / 2**30:.0f} GiB in a worker; --workers 0 has no such limit"
            answer = Skip(OUT_OF_MEMORY, f"{answer.detail}; {limit}")


def _end_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot stop its workers, which would keep their memory."""
    parent_process().join()
    os._exit(1)
