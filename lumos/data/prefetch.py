"""Batches made ahead of the step that needs them: by threads, or by processes where drawing clips is the work."""

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
"""Seconds in which processes may end what they are at, before they are ended."""
T_co = TypeVar("T_co")
_make: Callable[[int], Any]
"""What a process does, as it was when the process was forked."""


def prefetched(make: Callable[[int], T_co], steps: range, *, workers: int, depth: int) -> Iterator[T_co]:
    """`make(step)` for each step in order, up to `depth` of them made ahead by `workers` threads; 0 workers: made when
    asked for.

    An error in `make` is raised at its step. Closing the iterator stops the threads after the batches they are at.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    try:
        yield from _in_order(lambda step: pool.submit(make, step), steps, depth)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_processes(make: Callable[[int], T_co], steps: range, *, processes: int) -> Iterator[T_co]:
    """`make(step)` for each step in order, made ahead by `processes` with one thread each, which are forked at the first step.

    What `make` gives is pickled, its tensors go through shared memory. It must not touch a GPU. An error in `make` is raised at
    its step; RunError if a process is killed or shared memory is short. Closing the iterator stops the processes after the
    batches they are at; they also end with this one, however that ends: a lock or connection that they share with it must not
    outlive it.
    """
    check_processes(processes)
    context = multiprocessing.get_context("fork")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start_process, (make, watched, held))
    try:
        yield from _in_order(lambda step: pool.submit(_make_in_process, step), steps, 2 * processes)
    except BrokenProcessPool as error:
        held.close()  # the others ignore the signal with which the pool would end them
        raise RunError(
            "a process that makes batches ahead was killed, by the system if memory ran out; start the same command again, or "
            "with fewer processes"
        ) from error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise RunError(
            f"the batches of {processes} processes have no room in shared memory ({str(error).splitlines()[0]}); enlarge /dev/shm, "
            "in a container by --shm-size, or use fewer processes"
        ) from error
    finally:
        late = threading.Timer(GRACE, held.close)  # one was killed after the last result that was needed, or hangs
        late.start()
        pool.shutdown(wait=True, cancel_futures=True)
        late.cancel()
        held.close()
        watched.close()


def check_processes(processes: int) -> None:
    """UserError where the system cannot fork."""
    if processes and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError(f"processes is {processes}, but this system cannot fork processes; leave it out: threads make batches then")


def _in_order(submit: Callable[[int], Future[T_co]], steps: range, depth: int) -> Iterator[T_co]:
    """The results of all steps, of which `depth` are begun before the first is taken."""
    waiting = deque(map(submit, steps[:depth]))
    for step in steps[depth:]:
        done = waiting.popleft().result()
        waiting.append(submit(step))
        yield done
    while waiting:
        yield waiting.popleft().result()


def _make_in_process(step: int) -> Any:
    return _make(step)


def _start_process(make: Callable[[int], Any], watched: Connection, held: Connection) -> None:
    """In a new process. Signals to the whole group are the run's to answer, which ends its processes when it ends."""
    global _make
    _make = make
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    held.close()
    threading.Thread(target=_end_when_let_go, args=(watched,), daemon=True).start()


def _end_when_let_go(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent: true when the other end is closed, as by the end of its process
    os._exit(1)
