"""Ingest on a Ray cluster: Ray Data distributes the items over actors, and the results come back in order.

Each actor runs its items in a worker process, as the local executor does, so an item that crashes or
hangs is skipped and affects no other item. Only an item's path and caption and its codes are sent over
the network. The process that called `ingest` writes all shards. The guarantees are therefore the same
as on one machine: no item is lost or comes twice, and the ingest stops if too many items fail. Sources and
tokenizer must be readable under the same path on every node.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np

from lumos.data.ingest.encode import EncoderSpec, ItemEncoder, Result, Skip
from lumos.data.ingest.executors import ITEM_TIMEOUT
from lumos.data.ingest.item import Item
from lumos.data.ingest.workers import Make, WorkerPool
from lumos.data.shards.format import FRAME_CODES
from lumos.errors import RunError, UserError, shown
from lumos.threads import given_count

DEVICES = (None, "auto", "cpu", "cuda")
ITEMS_A_WORKER = 1000
"""Items per worker in one Ray data set. Each data set starts its own actors, which takes seconds."""
ITEMS_IN_BLOCK = 4
"""Items in one block; Ray gives an actor one block at a time."""
ATTEMPTS = 3
"""The number of times that Ray retries items of an actor that dies, for example with its node. The default of Ray has no limit."""


class RayExecutor:
    """Runs items in up to `workers` Ray actors.

    Each actor has one CPU, and also one GPU if the cluster has GPUs and `device` is not "cpu".
    """

    def __init__(self, spec: EncoderSpec, workers: int, item_timeout: float | None):
        _ray()
        if not workers:
            raise UserError("workers 0 is not allowed with --engine ray; give at least 1")
        if spec.device not in DEVICES:
            raise UserError(
                f"device '{spec.device}' is not allowed with --engine ray, which assigns the GPUs itself; allowed: auto, cpu, cuda"
            )
        self.spec, self.workers, self.item_timeout = spec, workers, item_timeout or ITEM_TIMEOUT

    def results(self, todo: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        ray = _ray()
        own = connect_to_ray(ray)
        item = None
        try:
            while some := list(islice(todo, ITEMS_A_WORKER * self.workers)):
                with closing(self._map(ray, some)) as results:
                    for number, item in enumerate(some):
                        found, result = next(results, (None, None))
                        if found != number:
                            what = "no result" if found is None else f"the result of {shown(some[found].id)}"
                            raise RunError(f"Ray gave {what} for {shown(item.id)}; run the same command again to continue")
                        yield item, result
                    if next(results, None) is not None:
                        raise RunError(f"Ray gave more than {len(some)} results for {len(some)} items; run the same command again")
        except ray.exceptions.RayError as error:
            near = f"near {item.id}" if item else "at the start"
            raise RunError(f"a Ray worker failed {near}: {_cause(error)}; run the same command again to continue") from error
        finally:
            if own:
                ray.shutdown()

    def _map(self, ray: ModuleType, some: list[Item]) -> Iterator[tuple[int, Result]]:
        """Yield (index of the item in `some`, its result) for each item, in order."""
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        rows = [{"number": number, "item": json.dumps(asdict(item))} for number, item in enumerate(some)]
        data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // ITEMS_IN_BLOCK))
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        data = data.map(
            _Actor,
            fn_constructor_args=(partial(ItemEncoder, self.spec), self.item_timeout, os.getcwd()),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.workers),
            num_cpus=1,
            num_gpus=gpus_of_each(ray, self.spec.device),
            max_restarts=ATTEMPTS,
            max_task_retries=ATTEMPTS,
        )
        for row in data.iter_rows():
            yield int(row["number"]), from_text(row["result"])


class _Actor:
    """A Ray actor with one worker process."""

    def __init__(self, make: Make, seconds: float, folder: str):
        os.chdir(folder)  # relative paths start from the folder of the main process
        self.pool = WorkerPool(make, 1, 1, seconds)  # one thread, because Ray reserves one CPU for the actor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        fields = json.loads(row["item"])
        fields["problem"] = fields["problem"] and tuple(fields["problem"])
        [(_, result)] = self.pool.results(iter([Item(**fields)]))
        return {"number": row["number"], "result": to_text(result)}


def to_text(result: Result) -> str:
    """Return a result as JSON, which works with all versions of Ray, Arrow and Python; pickled objects do not."""
    if isinstance(result, Skip):
        return json.dumps({"skip": [result.reason, result.detail]})
    rows = []
    for row in result:
        packed = {
            name: [base64.b64encode(codes.astype("<u2").tobytes()).decode("ascii"), *codes.shape]
            for name, codes in row.items()
            if isinstance(codes, np.ndarray)
        }
        rows.append({**row, **packed})
    return json.dumps({"rows": rows})


def from_text(text: str) -> Result:
    """Return the result that `to_text` made into this text."""
    fields = json.loads(text)
    if "skip" in fields:
        return Skip(*fields["skip"])
    for row in fields["rows"]:
        for name in ("codes", FRAME_CODES):
            if name in row:
                packed, *shape = row[name]
                row[name] = np.frombuffer(base64.b64decode(packed), "<u2").astype(np.uint16).reshape(shape)
    return fields["rows"]


def connect_to_ray(ray: ModuleType) -> bool:
    """Connect to the Ray cluster, or start one on this machine, unless this process has one; return whether it was done now.

    Whoever connects calls ray.shutdown. Raise RunError if the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except OSError as error:
        raise RunError(f"cannot reach the Ray cluster: {error}; unset RAY_ADDRESS to use this machine") from error
    return True


def gpus_of_each(ray: ModuleType, device: str | None) -> int:
    """Return how many GPUs a task or an actor gets: 1 if the cluster has GPUs and `device` is not "cpu", else 0.

    Raise UserError if `device` is "cuda" and the cluster has no GPU.
    """
    available = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not available:
        raise UserError("device 'cuda' is not available: the Ray cluster has no GPU; give auto or cpu")
    return int(device != "cpu" and available > 0)


def cores_of_each(ray: ModuleType, asked: int | None) -> int:
    """Return how many CPU cores and threads a task gets: `asked` (--threads), else LUMOS_THREADS, else 1.

    A Ray that this process starts hands on OMP_NUM_THREADS, which is for the whole machine, so a task sets its own number. Raise
    UserError if this machine lacks the cores: Ray would wait for them. A cluster may grow.
    """
    count, cores = given_count(asked) or 1, int(ray.cluster_resources().get("CPU", 0))
    if "RAY_ADDRESS" not in os.environ and count > cores:
        raise UserError(f"--threads {count} needs as many CPU cores, and Ray has {cores} here; give at most {cores}")
    return count


def _ray() -> ModuleType:
    """Import ray with ray.data and ray.exceptions; raise UserError if Ray is not installed."""
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}); pip install 'lumos-video[ray]', or use --engine local") from error
    return ray


def _cause(error: BaseException) -> str:
    """Return the last line of the message of a Ray error, which can be a page long."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(cause).__name__
