"""Replicas of the pipeline on a Ray cluster: a Ray Serve deployment to which the server hands its clips.

The server keeps what it has without replicas: its queue, limits, keys, uploads, results and the status of clips. A replica gets a
checked request with its seed and returns the frames. If the replica dies, another one makes the same clip. Requests that wait at a
replica and differ in words and seed only are made as one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lumos.data.ingest.ray_executor import connect_to_ray, cores_of_each, gpus_of_each
from lumos.demo.worker import as_told
from lumos.errors import RunError, UserError, instead, reason_of, shown
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.request import ARGUMENTS, GIVE_FRAMES, Request

ATTEMPTS = 3  # how often a clip is begun whose replica has died
POLL_SECONDS = 0.1
DEVICES = (None, "auto", "cpu", "cuda")
OF_EACH = ("prompt", "negative_prompt", "seed")
"""The arguments in which the clips of a batch may differ."""
Start = Callable[[], tuple[VideoPipeline, Callable[[], dict[str, Any]]]]
"""Loads the pipeline of a replica; returns it and a function that returns what is added to the record of a clip."""


@dataclass(frozen=True)
class ReplicaSettings:
    """The number of replicas, and their batching.

    replicas     replicas, or the most of them if `autoscaling` is given
    batch_size   most clips of a batch
    batch_wait   seconds that a replica waits for more clips before it begins a batch that is not full
    device       None, "auto", "cpu" or "cuda"; each replica has a GPU if the cluster has GPUs and it is not "cpu"
    autoscaling  fields of Ray Serve's AutoscalingConfig, or None for a fixed number of replicas
    threads      CPU cores and threads of each replica
    """

    replicas: int
    batch_size: int = 4
    batch_wait: float = 0.05
    device: str | None = None
    autoscaling: Mapping[str, Any] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UserError(
                f"device '{self.device}' is not allowed with --replicas, for which Ray assigns the GPUs; allowed: auto, cpu, cuda"
            )
        if not self.batch_wait >= 0:
            raise UserError(f"--batch-wait {self.batch_wait} is not allowed; give seconds of at least 0")
        if self.autoscaling is not None and "max_replicas" in self.autoscaling:
            raise UserError("--autoscaling max_replicas is what --replicas says; leave it out")

    @property
    def at_once(self) -> int:
        """The clips that are handed out at a time."""
        return self.replicas * self.batch_size

    def check(self, ray: ModuleType) -> None:
        """Raise UserError if this machine lacks the cores for the replicas: Ray would wait for them. A cluster may grow."""
        cores = int(ray.cluster_resources().get("CPU", 0))
        most = cores // cores_of_each(ray, self.threads)
        if "RAY_ADDRESS" not in os.environ and self.autoscaling is None and self.replicas > most:
            all_of = f"{self.replicas * self.threads} CPU cores with --threads {self.threads}"
            needed = "as many CPU cores" if self.threads == 1 else all_of
            raise UserError(f"--replicas {self.replicas} needs {needed}, and Ray has {cores} here; give at most {most}")

    def options(self) -> dict[str, Any]:
        """Return the arguments of `serve.deployment` that say how many replicas there are."""
        if self.autoscaling is None:
            return {"num_replicas": self.replicas}
        return {"autoscaling_config": {"min_replicas": 1, **self.autoscaling, "max_replicas": self.replicas}}


class Maker:
    """The work of one replica."""

    def __init__(self, start: Start, folder: str, threads: int | None = None):
        os.chdir(folder)  # relative paths start from the folder of the server
        if threads is not None:
            torch.set_num_threads(threads)  # the environment may have the number of the server
        self.pipe, self.circumstances = start()

    def make(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return an answer for each request: {"frames": uint8 [T, H, W, 3], "about": ...}, or {"error": ..., "is_users": ...}.

        requests: arguments of a call of the pipeline by name. Those of one form are made in one call.
        """
        answers: dict[int, dict[str, Any]] = {}
        for numbers in batches(requests):
            answers |= zip(numbers, self._together([requests[number] for number in numbers]), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _together(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the server has told them
                made = [{"frames": frames} for frames in self._frames(requests)]
            return [{**answer, "about": self.circumstances()} for answer in made]
        except Exception as error:
            if len(requests) > 1:  # one clip may spoil its batch: make each alone
                return [answer for request in requests for answer in self._together([request])]
            told = as_told(error)
            return [{"error": str(told), "is_users": isinstance(told, UserError)}]

    def _frames(self, requests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        first = dict(requests[0])
        if len(requests) > 1:
            first |= {name: [request[name] for request in requests] for name in OF_EACH if name in first}
        return list(self.pipe(first.pop("prompt"), output_type="uint8", **first).frames)


def batches(requests: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the numbers of the requests of each batch, in order. Requests with given frames are made alone."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        form = {name: value for name, value in request.items() if name not in OF_EACH}
        alone = number if any(name in request for name in GIVE_FRAMES) else None
        key = str(alone) if alone is not None else json.dumps([form, "negative_prompt" in request], sort_keys=True)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def arguments_of(request: Request) -> dict[str, Any]:
    """Return the arguments of a call that makes this request, without those that are None."""
    own = {name: value for name in ("prompt", *ARGUMENTS) if (value := getattr(request, name)) is not None}
    return {**own, **request.options}


class Replicas:
    """The replicas as the server sees them.

    handle: the handle of the deployment. lost: the errors that mean that a replica has died.
    """

    def __init__(self, handle: Any, settings: ReplicaSettings, lost: tuple[type[BaseException], ...]):
        self.handle, self.at_once, self._lost = handle, settings.at_once, lost

    def make(self, request: Request, check_stop: Callable[[], None]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the frames of a request that has a seed, uint8 [T, H, W, 3], and what is added to its record.

        check_stop is called meanwhile and may raise. UserError and RunError are those of the pipeline; RunError too if ATTEMPTS
        replicas have died.
        """
        reason = ""
        for _ in range(ATTEMPTS):
            response = self.handle.remote(arguments_of(request))
            try:
                answer = self._answer(response, check_stop)
            except self._lost as error:
                reason = reason_of(error)
                continue
            if "error" in answer:
                raise (UserError if answer["is_users"] else RunError)(answer["error"])
            return answer["frames"], answer["about"]
        raise RunError(f"{ATTEMPTS} replicas ended while they made the clip ({reason}); ask for a smaller one")

    @staticmethod
    def _answer(response: Any, check_stop: Callable[[], None]) -> dict[str, Any]:
        try:
            while True:
                check_stop()
                with contextlib.suppress(TimeoutError):
                    return response.result(timeout_s=POLL_SECONDS)
        except BaseException:
            response.cancel()
            raise


@contextlib.contextmanager
def replicas(start: Start, settings: ReplicaSettings) -> Iterator[Replicas]:
    """Start the replicas, yield them when they are ready, and stop them at the end.

    UserError if Ray Serve is not installed, for a device that the cluster does not have and for autoscaling settings that Ray
    refuses; RunError if the replicas cannot be started.
    """
    ray, serve = import_serve()
    with contextlib.ExitStack() as started:
        if own := connect_to_ray(ray):
            started.callback(ray.shutdown)
        settings.check(ray)
        app, name = deployment(serve, start, settings, gpus_of_each(ray, settings.device)), f"lumos-{uuid.uuid4().hex[:8]}"
        serve.start(proxy_location="Disabled")  # the server itself speaks HTTP
        started.callback(serve.shutdown if own else partial(serve.delete, name))
        try:
            handle = serve.run(app, name=name, route_prefix=None)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise RunError(f"the replicas cannot be started ({reason_of(error)})") from error
        yield Replicas(handle, settings, (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError))


def deployment(serve: ModuleType, start: Start, settings: ReplicaSettings, gpus: int) -> Any:
    """Return the application of Ray Serve with the replicas; UserError if Ray refuses the settings."""

    class Replica:
        def __init__(self) -> None:
            self.maker = Maker(start, folder, settings.threads)
            self.pool = ThreadPoolExecutor(1)  # the event loop stays free for the checks of Ray Serve

        @serve.batch(max_batch_size=settings.batch_size, batch_wait_timeout_s=settings.batch_wait)
        async def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self.maker.make, requests)

    folder = os.getcwd()
    known = serve.config.AutoscalingConfig.model_fields
    if unknown := [name for name in settings.autoscaling or () if name not in known]:  # Ray would ignore them
        raise UserError(f"--autoscaling {shown(unknown[0])} is unknown{instead(unknown[0], known, 'known are')}")
    try:
        made = serve.deployment(
            name="lumos", ray_actor_options={"num_cpus": settings.threads, "num_gpus": gpus},
            max_ongoing_requests=settings.batch_size, **settings.options(),
        )(Replica)  # fmt: skip
    except (ValueError, TypeError) as error:
        reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)  # pydantic has an entry for each field
        raise UserError(f"--autoscaling is not allowed: {' '.join(reason.split())}") from error
    return made.bind()


def import_serve() -> tuple[ModuleType, ModuleType]:
    """Import ray and ray.serve; UserError if they are not installed."""
    try:
        import ray
        import ray.exceptions
        from ray import serve
    except ImportError as error:
        missing = f"--replicas needs Ray Serve ({error.name or error} is missing)"
        raise UserError(f"{missing}; pip install 'lumos-video[replicas]', or leave --replicas out") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return ray, serve
