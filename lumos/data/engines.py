"""How ingest spreads its items over processes of this machine; `ray_engine` does it over a cluster.

An engine yields the items that are left with their results in their own order, whoever is done first, so that every engine
writes the same shards.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Protocol

import torch

from lumos.data.encode import ClipSettings, Result, ingest_item
from lumos.data.manifest import Item
from lumos.errors import RunError
from lumos.runtime import pick_device
from tokenizer import VideoTokenizer


@dataclass(frozen=True)
class Work:
    """What a worker needs to know to do :func:`ingest_item`; `device` None is a GPU if the worker has one."""

    tokenizer: str
    settings: ClipSettings
    device: str | None


class Engine(Protocol):
    def __init__(self, work: Work, workers: int):
        """UserError for what cannot work here, before anything is written."""

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """The results of `todo`, in its order. Closing the iterator stops the workers."""


class Encoder:
    """`ingest_item` with its tokenizer loaded: what each worker holds."""

    def __init__(self, work: Work):
        self.settings = work.settings
        self.tokenizer = VideoTokenizer.from_pretrained(work.tokenizer, device=str(pick_device(work.device)))

    def __call__(self, item: Item) -> Result:
        return ingest_item(item, self.settings, self.tokenizer)


class LocalEngine:
    """This process with one worker, else so many processes."""

    def __init__(self, work: Work, workers: int):
        pick_device(work.device)
        self.work, self.workers = work, workers

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        if self.workers == 1:
            encoder = Encoder(self.work)
            for item in todo:
                yield item, encoder(item)
            return
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        pool = ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_start_worker, initargs=(self.work, threads)
        )
        waiting: deque = deque()
        try:
            for item in todo:
                waiting.append((item, pool.submit(_do_in_worker, item)))
                if len(waiting) >= 4 * self.workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        except BrokenProcessPool as error:
            near = waiting[0][0].id if waiting else "the last item"
            raise RunError(
                f"a worker process ended unexpectedly near {near} (out of memory?); run the same command again, or with fewer "
                "--workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Encoder


def _start_worker(work: Work, threads: int) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    _worker = Encoder(work)


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot stop its workers: they wait for work for ever, and hold memory."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _do_in_worker(item: Item) -> Result:
    return _worker(item)
