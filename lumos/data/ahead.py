"""Batches made ahead of the step that needs them: by threads, or by processes where drawing clips is the work."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T_co = TypeVar("T_co")


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
        waiting = deque(pool.submit(make, step) for step in steps[:depth])
        for step in steps[depth:]:
            done = waiting.popleft().result()
            waiting.append(pool.submit(make, step))
            yield done
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Made(Dataset):
    """What DataLoader reads: item `step` is `make(step)`."""

    def __init__(self, make: Callable[[int], T_co]):
        self.make = make

    def __getitem__(self, step: int) -> T_co:
        return self.make(step)


def in_processes(make: Callable[[int], T_co], steps: range, *, processes: int) -> Iterator[T_co]:
    """`make(step)` for each step in order, made ahead by `processes` (torch's DataLoader), each with one thread.

    What `make` gives is pickled, its tensors go through shared memory. It must not touch a GPU: processes are forked, so that
    they have what this one has read. An error in `make` is raised at its step.
    """
    loader = DataLoader(
        _Made(make), sampler=steps, batch_size=None, collate_fn=_as_it_is, num_workers=processes, prefetch_factor=2,
        worker_init_fn=_settle, multiprocessing_context="fork",
    )  # fmt: skip
    return iter(loader)


def _as_it_is(item: T_co) -> T_co:
    return item


def _settle(_: int) -> None:
    """In a new process. Signals to the whole group are the run's to answer, which ends its processes when it ends."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
