"""Requests of clips over HTTP, and the clients that send them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SMALL = {"prompt": "a red circle", "num_frames": 1, "num_inference_steps": 1}
LONG = {"prompt": "x", "num_frames": 257, "num_inference_steps": 1000}
ALICE, BOB = "alice-0123456789ab", "bob-0123456789abcdef"


def client_of(service, keys=None, hosts=None):
    from fastapi.testclient import TestClient

    from lumos.demo.hosts import Hosts
    from lumos.demo.server import build_app

    app = build_app(service, None, hosts or Hosts(), keys)
    return TestClient(app, raise_server_exceptions=False, base_url="http://localhost")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def png(side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
