"""Executors run the items of an ingest: here on this machine, in `ray_executor` on a Ray cluster.

An executor yields results in the order of the items, whichever worker finishes first. Every executor
therefore gives the same shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Protocol

from lumos.data.ingest.encode import EncoderSpec, ItemEncoder, Result
from lumos.data.ingest.item import Item
from lumos.data.ingest.workers import WorkerPool
from lumos.errors import UserError
from lumos.runtime import pick_device

ITEM_TIMEOUT = 1800.0
"""Default limit in seconds for one item. Reading hours of video takes minutes."""


class Executor(Protocol):
    """Runs the items of an ingest with `workers` workers and yields their results."""

    def __init__(self, spec: EncoderSpec, workers: int, item_timeout: float | None):
        """Raise UserError for arguments that this executor cannot work with, before ingest writes anything.

        `item_timeout` is the limit in seconds for one item; None: ITEM_TIMEOUT.
        """

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item of `todo` with its result, in order. Closing the iterator stops the workers."""


class LocalExecutor:
    """Runs items in `workers` processes of this machine. Each computes with one thread, so that codes do not depend on `workers`.

    With 0 workers the items run in this process, where an item that crashes or hangs does the same to
    the whole ingest.
    """

    def __init__(self, spec: EncoderSpec, workers: int, item_timeout: float | None):
        pick_device(spec.device)
        if item_timeout is not None and not workers:
            raise UserError("item_timeout needs processes that can be ended; give at least 1 worker, or leave it out")
        self.spec, self.workers, self.item_timeout = spec, workers, item_timeout or ITEM_TIMEOUT

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        if self.workers:
            with closing(WorkerPool(partial(ItemEncoder, self.spec), self.workers, 1, self.item_timeout)) as pool:
                yield from pool.results(todo)
        else:
            encoder = ItemEncoder(self.spec)
            for item in todo:
                yield item, encoder(item)
