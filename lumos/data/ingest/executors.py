"""How ingest spreads its items over processes of this machine; `ray_engine` does it over a cluster.

An engine yields the items that are left with their results in their own order, whoever is done first, so that every engine
writes the same shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Protocol

from lumos.data.ingest.encode import Encoder, EncoderSpec, Result
from lumos.data.ingest.item import Item
from lumos.data.ingest.workers import WorkerPool
from lumos.errors import UserError
from lumos.runtime import pick_device

ITEM_TIMEOUT = 1800.0
"""Seconds for an item if nothing else is said: hours of video take minutes."""


class Executor(Protocol):
    def __init__(self, spec: EncoderSpec, workers: int, item_timeout: float | None):
        """UserError for what cannot work here, before anything is written."""

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """The results of `todo`, in its order. Closing the iterator stops the workers."""


class LocalExecutor:
    """So many processes; with 0 workers this one, where an item that crashes or hangs takes the ingest with it."""

    def __init__(self, spec: EncoderSpec, workers: int, item_timeout: float | None):
        pick_device(spec.device)
        if item_timeout is not None and not workers:
            raise UserError("item_timeout needs processes that can be ended; give at least 1 worker, or leave it out")
        self.spec, self.workers, self.item_timeout = spec, workers, item_timeout or ITEM_TIMEOUT

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        if self.workers:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            with closing(WorkerPool(partial(Encoder, self.spec), self.workers, threads, self.item_timeout)) as pool:
                yield from pool.results(todo)
        else:
            encoder = Encoder(self.spec)
            for item in todo:
                yield item, encoder(item)
