"""A pool of worker processes that are replaced if they die or hang. Each encodes one item while a thread reads the next."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from lumos.data.ingest.encode import Result, Skip
from lumos.data.ingest.item import OUT_OF_MEMORY, Item
from lumos.data.ingest.worker_memory import limit_memory
from lumos.errors import RunError

DIED, TIMEOUT = "worker died", "timeout"
AHEAD = 4
"""Largest number of items per worker that are started before the oldest of them is finished."""

EACH = 2
"""Items that a worker has at a time: one is encoded, the next one is read."""


class Work(Protocol):
    """The encoder of a worker, as `lumos.data.ingest.encode.Encoder`. `begin` runs in a thread."""

    def begin(self, item: Item) -> Any: ...
    def finish(self, begun: Any) -> Result: ...


Make = Callable[[], Work]
"""A function that is called once in each worker."""


@dataclass(eq=False)
class _Task:
    item: Item
    result: Result | None = None
    died: bool = False  # a worker already died while it had this item and no other
    alone: bool = False  # no other item may run meanwhile, so that its failure is its own
    shared: bool = False  # its worker had another item too


@dataclass(eq=False)
class _Waiting:
    """Tasks that are given again: those that must run alone, and those whose worker was ended because of another one."""

    alone: deque[_Task] = field(default_factory=deque)
    others: deque[_Task] = field(default_factory=deque)


class _Worker:
    """A worker process. It must finish the first of its `tasks` before `deadline` (a time of `time.monotonic`)."""

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
        self.tasks: deque[_Task] = deque()
        self.deadline = float("inf")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerPool:
    """A pool of up to `workers` processes that run items with what `make` returns.

    Each process uses `threads` threads of torch and has `seconds` for each item. The processes are kept
    for the next call of `results` until `close`.
    """

    def __init__(self, make: Make, workers: int, threads: int, seconds: float):
        self.make, self.workers, self.threads, self.seconds = make, workers, threads, seconds
        self.pool: list[_Worker] = []
        self.begun: deque[_Task] = deque()
        self.again = _Waiting()
        # The temporary files of all workers are in one folder, because a killed worker cannot delete its own files.
        self.folder = tempfile.TemporaryDirectory(prefix="lumos-")

    def close(self) -> None:
        for worker in self.pool:
            worker.stop()
        self.folder.cleanup()

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item of `todo` with its result, in order.

        If a worker dies, its items are tried again, each while no other item runs. An item is skipped if its worker dies twice
        while it has no other item. An item that lacks memory is tried alone too, because the other one needed memory as well.
        """
        while True:
            while task := self._next(todo):
                self._give(task)
            if not self.begun:  # and no task could be started, so `todo` has no more items
                return
            while self.begun and self.begun[0].result is not None:
                task = self.begun.popleft()
                yield task.item, task.result
            if any(worker.tasks for worker in self.pool):
                self._receive()

    def _next(self, todo: Iterator[Item]) -> _Task | None:
        """Return the task to start now, or None if no task can be started."""
        running = [task for worker in self.pool for task in worker.tasks]
        if any(task.alone for task in running):
            return None
        if self.again.alone:
            return None if running else self.again.alone.popleft()
        if len(running) == EACH * self.workers:
            return None
        if self.again.others:
            return self.again.others.popleft()
        if len(self.begun) >= AHEAD * self.workers or (item := next(todo, None)) is None:
            return None
        self.begun.append(_Task(item))
        return self.begun[-1]

    def _give(self, task: _Task) -> None:
        if len(self.pool) < self.workers and all(worker.tasks for worker in self.pool):
            self.pool.append(_Worker(self.make, self.threads, self.folder.name))
        worker = min(self.pool, key=lambda worker: len(worker.tasks))
        worker.tasks.append(task)
        if len(worker.tasks) > 1:
            for one in worker.tasks:
                one.shared = True
        elif worker.ready:
            worker.deadline = time.monotonic() + self.seconds
        with suppress(OSError):  # the worker is dead, which `_receive` notices
            worker.connection.send(task.item)

    def _receive(self) -> None:
        """Wait until a worker answers, dies or reaches its deadline, and handle it."""
        busy = [worker for worker in self.pool if worker.tasks]
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
                late = worker.tasks.popleft()
                late.result = Skip(TIMEOUT, f"{late.item.id} took more than {self.seconds:g} s")
                self.again.others.extend(worker.tasks)
                self._remove(worker)

    def _take(self, worker: _Worker, answer: Result | Exception | None) -> None:
        if isinstance(answer, Exception) and not isinstance(answer, Skip):
            raise answer
        if not worker.ready:
            worker.ready, worker.deadline = True, time.monotonic() + self.seconds
            return
        task = worker.tasks.popleft()
        if isinstance(answer, Skip) and answer.reason == OUT_OF_MEMORY and task.shared and not task.alone:
            task.alone = True
            self.again.alone.append(task)
        else:
            task.result = answer
        worker.deadline = time.monotonic() + self.seconds if worker.tasks else float("inf")

    def _died(self, worker: _Worker) -> None:
        self._remove(worker)
        how = f"exit code {worker.process.exitcode}"
        if not worker.ready:
            raise RunError(f"a worker process ended while it was starting ({how}; out of memory?); use fewer --workers")
        for task in worker.tasks:
            if task.died:
                task.result = Skip(DIED, f"{task.item.id} ended its worker twice ({how})")
            else:
                # Of two items, either may have ended the worker: each is tried alone, and only then it counts.
                task.died, task.alone = len(worker.tasks) == 1, True
                self.again.alone.append(task)

    def _remove(self, worker: _Worker) -> None:
        worker.stop()
        self.pool.remove(worker)


def _serve(connection: Connection, make: Make, threads: int, folder: str) -> None:
    """Run items in a worker: send None (or the error of `make`) when ready, then a result for each item received, in order.

    A thread receives and reads the next item while this one encodes. torch is used by this one alone.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    torch.set_num_threads(threads)
    tempfile.tempdir = folder
    try:
        work = make()
        memory = limit_memory()
    except Exception as error:
        connection.send(error)
        return

    def begun() -> Any:
        try:
            item = connection.recv()
        except (EOFError, OSError):  # the parent is gone
            return None
        try:
            return work.begin(item)
        except Exception as error:
            return error

    with suppress(OSError), ThreadPoolExecutor(1, thread_name_prefix="decode") as thread:  # OSError: the parent is gone
        connection.send(None)
        due = thread.submit(begun)
        while (found := due.result()) is not None:
            due = thread.submit(begun)
            try:
                answer = found if isinstance(found, Exception) else work.finish(found)
            except Exception as error:
                answer = error
            del found  # its frames, before the next item is waited for
            if memory and isinstance(answer, Skip) and answer.reason == OUT_OF_MEMORY:
                limit = f"an item may use {memory / 2**30:.0f} GiB in a worker; --workers 0 has no such limit"
                answer = Skip(OUT_OF_MEMORY, f"{answer.detail}; {limit}")
            connection.send(answer)


def _end_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot stop its workers, which would keep their memory."""
    parent_process().join()
    os._exit(1)
