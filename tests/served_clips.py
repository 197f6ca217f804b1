"""Requests of clips, and their results from a service, with or without replicas."""

from __future__ import annotations

import time
from pathlib import Path

from lumos import LumosPipeline
from lumos.demo.limits import Limits
from lumos.demo.replicas import Replicas, arguments_of
from lumos.demo.service import Service
from lumos.demo.worker import ClipJob
from lumos.pipeline.request import Request

FORMS = ({"num_frames": 1}, {"num_frames": 5, "num_inference_steps": 2})


def asked(seed: int, **more) -> dict:
    return arguments_of(Request.of(f"clip {seed}", seed=seed, **FORMS[seed % 2], **more))


def made(pipe: LumosPipeline, root: Path, requests: list[Request], given: Replicas | None = None) -> dict[int, tuple[bytes, dict]]:
    """Make the clip of each request by a service, and return its file and record by its seed."""
    service = Service(pipe, root, Limits(queue_length=60), lambda prompt, seed: {"prompt": prompt, "seed": seed}, replicas=given)
    jobs = [ClipJob(request) for request in requests]
    try:
        for job in jobs:
            service.submit(job)
        deadline = time.monotonic() + 600
        while not all(job.ended for job in jobs):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        service.worker.close()
    assert [str(job.error) for job in jobs if job.error] == []
    files = {job.record["seed"]: service.store.results / job.record["file"] for job in jobs}
    return {job.record["seed"]: (files[job.record["seed"]].read_bytes(), job.record) for job in jobs}
