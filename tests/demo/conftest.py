from __future__ import annotations

import pytest
from clip_requests import ALICE, BOB, client_of

from lumos import LumosPipeline
from lumos.demo.limits import Limits
from lumos.demo.service import Service


@pytest.fixture(scope="module")
def pipe(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder)


@pytest.fixture
def limits():
    return Limits(max_prompt_length=50, max_steps=1000, max_frames=257, max_upload_mb=1, queue_length=3, keep_results=4)


@pytest.fixture
def service(pipe, tmp_path, limits):
    service = Service(pipe, tmp_path / "root", limits, lambda prompt, seed: {"prompt": prompt, "seed": seed, "model": "micro"})
    yield service
    service.worker.close()


@pytest.fixture
def client(service):
    return client_of(service)


@pytest.fixture
def keyed(service, tmp_path):
    from lumos.demo.keys import read_keys

    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {ALICE}\nbob: {{key: {BOB}, queue_length: 2, clips_per_hour: 3}}\n")
    return client_of(service, read_keys(path))
