"""Waits for clips of the HTTP API, and checks each status against the schema."""

from __future__ import annotations

import time

import jsonschema

from lumos.demo.schema import CLIP


def ended(client, clip: dict, **options) -> dict:
    """Return the last status of a clip."""
    deadline = time.monotonic() + 600
    while clip["status"] in ("waiting", "working"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        clip = client.get(f"/api/clips/{clip['id']}", **options).json()
        jsonschema.validate(clip, CLIP)
    return clip
