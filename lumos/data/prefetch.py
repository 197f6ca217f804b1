"""Prefetching of batches: they are made by threads or processes before the step that needs them.

Processes are for sources that draw their clips, which keeps a core busy in Python.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from lumos.errors import RunError, UserError

GRACE = 10.0
"""Seconds that processes have to finish their batches before they are killed."""
T_co = TypeVar("T_co")
_make: Callable[[int], Any]
"""The function `make` of :func:`in_processes`; set in each process when it starts."""


def prefetched(make: Callable[[int], T_co], steps: range, *, workers: int, depth: int) -> Iterator[T_co]:
    """Yield `make(step)` for each step in order; `workers` threads make up to `depth` batches ahead.

    Each of the threads computes alone. Otherwise each would start as many threads of torch as the
    training step has, for the same cores.

    With 0 workers each batch is made when the iterator is advanced. An error in `make` is raised at
    its step. When the iterator is closed, the threads stop after the batches that they are making.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    count = torch.get_num_threads()  # from now on, this thread keeps its number in spite of `_compute_alone`
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches", initializer=_compute_alone)
    try:
        yield from _in_order(lambda step: pool.submit(make, step), steps, depth)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(count)  # for threads that begin later


def in_processes(make: Callable[[int], T_co], steps: range, *, processes: int) -> Iterator[T_co]:
    """Yield `make(step)` for each step in order; `processes` processes make the batches ahead.

    The processes are forked at the first step and use one thread each. The result of `make` is
    pickled, and its tensors go through shared memory. `make` must not use a GPU.

    An error in `make` is raised at its step. Raise RunError if a process is killed or shared memory is
    too small. When the iterator is closed, the processes stop after the batches that they are making.
    They also end when this process ends for any reason, because a lock or connection that they
    inherited from it must not outlive it.
    """
    check_processes(processes)
    context = multiprocessing.get_context("fork")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start_process, (make, watched, held))
    try:
        yield from _in_order(lambda step: pool.submit(_make_in_process, step), steps, 2 * processes)
    except BrokenProcessPool as error:
        held.close()  # the other processes ignore SIGTERM, with which the pool would end them
        raise RunError(
            "a process that makes batches ahead was killed, perhaps by the system because memory ran out; start the same "
            "command again, or use fewer processes"
        ) from error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise RunError(
            f"the batches of {processes} processes do not fit into shared memory ({str(error).splitlines()[0]}); enlarge "
            "/dev/shm (in a container with --shm-size), or use fewer processes"
        ) from error
    finally:
        # If a process hangs, or one was killed after the last result was taken, shutdown would wait forever.
        late = threading.Timer(GRACE, held.close)
        late.start()
        pool.shutdown(wait=True, cancel_futures=True)
        late.cancel()
        held.close()
        watched.close()


def check_processes(processes: int) -> None:
    """Raise UserError if `processes` is above 0 and the system cannot fork."""
    if processes and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError(
            f"processes is {processes}, but this system cannot fork processes; leave it out to make batches with threads"
        )


def _in_order(submit: Callable[[int], Future[T_co]], steps: range, depth: int) -> Iterator[T_co]:
    """Yield the results of all steps in order; up to `depth` steps are submitted ahead."""
    waiting = deque(map(submit, steps[:depth]))
    for step in steps[depth:]:
        done = waiting.popleft().result()
        waiting.append(submit(step))
        yield done
    while waiting:
        yield waiting.popleft().result()


def _compute_alone() -> None:
    """Make torch use one thread for what this thread computes. Threads that have computed before keep their numbers."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # else the first product would set the number again


def _make_in_process(step: int) -> Any:
    return _make(step)


def _start_process(make: Callable[[int], Any], watched: Connection, held: Connection) -> None:
    """Set up a new process of the pool.

    The process ignores SIGINT and SIGTERM, which may be sent to the whole process group: the training
    run handles them, and its processes end with it. The run ends its processes by closing `held`.
    """
    global _make
    _make = make
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    held.close()
    threading.Thread(target=_end_when_let_go, args=(watched,), daemon=True).start()


def _end_when_let_go(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent, so this returns when the other end is closed or its process ends
    os._exit(1)
