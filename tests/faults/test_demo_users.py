"""Fifty users of the demo at once: some polite, some in a hurry, some hostile."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from forks import Process
from hostile_media import lying_avi
from PIL import Image

from lumos.video.io import read_video

pytest.importorskip("gradio", reason="the page needs the extra [demo]")
httpx = pytest.importorskip("httpx", reason="gradio brings it")
pytestmark = pytest.mark.slow

PROMPTS = ("a red circle", "a small blue square grows", "the digit 7 moves up")
PATH = re.compile(r"/(root|home|tmp|work|usr|var)/")
LIMIT = 300  # seconds that anybody waits at most


def picture(side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class Site:
    """A server process, with all of its answers."""

    def __init__(self, url: str, server: Process, root: Path):
        self.url, self.server, self.process, self.root = url, server, psutil.Process(server.pid), root
        self.host, self.port = "127.0.0.1", int(url.rpartition(":")[2])
        self.answers: list[str] = []

    async def raw(self, request: bytes, wait: bool = True) -> bytes:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), LIMIT) if wait else b""
        finally:
            writer.close()


@pytest.fixture
def site(repo, micro_folder, tmp_path, forks):
    flags = ["--port", "0", "--root", "files", "--queue-length", "60", "--keep-results", "2", "--max-upload-mb", "1",
             "--keep-uploads-mb", "30", "--max-frames", "257", "--max-reading-seconds", "90", "--max-steps", "1000"]  # fmt: skip
    command = ["-m", "lumos", "demo", "--model", micro_folder, *flags]
    server = forks.start(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo)})
    try:
        url = server.first_line().split(" ")[0]
        assert url.startswith("http://127.0.0.1:"), server.stderr
        yield Site(url, server, tmp_path / "files")
        server.send_signal(signal.SIGINT)
        assert server.wait(LIMIT) == 0
        assert list((tmp_path / "files" / "visitors-uploads").iterdir()) == []
    finally:
        server.kill()


async def api_user(site: Site, client, number: int) -> None:
    """Make a clip through the API and read its record; every second clip begins with a picture."""
    prompt = PROMPTS[number % 3]
    files = {"image": (f"photo-{number}.png", picture(20 + number))} if number % 2 else None
    data = {"prompt": prompt, "seed": str(number), "num_frames": "5"}
    answer = await client.post("/api/generate", data=data, files=files)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    record = await client.get("/api/" + answer.headers["x-lumos-record"])
    site.answers.append(record.text)
    made = record.json()
    assert (made["prompt"], made["seed"], made["image"]) == (prompt, number, f"photo-{number}.png" if files else None)
    path = site.root.parent / f"{number}.mp4"
    path.write_bytes(answer.content)
    assert read_video(path)[0].shape == (5, 16, 24, 3)


async def page_user(site: Site, client, number: int, config: dict) -> None:
    """Do what the page does: upload, message, events and result; then close the session."""
    session, prompt = uuid.uuid4().hex, PROMPTS[number % 3]
    parts = {part["id"]: part for part in config["components"]}
    (event,) = [event for event in config["dependencies"] if len(event["inputs"]) > 5]
    async with client.stream("GET", f"/gradio_api/heartbeat/{session}") as heartbeat:
        assert heartbeat.status_code == 200
        answer = await client.post("/gradio_api/upload", files={"files": ("photo.png", picture(30 + number))})
        site.answers.append(answer.text)
        file = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
        values = {"prompt": prompt, "seed": str(1000 + number)}
        data = [file if parts[i]["type"] == "file" else values.get(parts[i]["props"].get("elem_id"), parts[i]["props"].get("value"))
                for i in event["inputs"]]  # fmt: skip
        joined = await client.post(
            "/gradio_api/queue/join", json={"data": data, "fn_index": event["id"], "session_hash": session, "event_data": None}
        )
        assert joined.status_code == 200, joined.text
        async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            events = "".join([text async for text in stream.aiter_text()])
        site.answers.append(events)
        assert f"Seed {1000 + number}," in events, events[-2000:]
        name = re.findall(rf"api/results/([a-z0-9-]+-{1000 + number}-[0-9a-f]{{12}}\.mp4)", events)[-1]
        result, record = [await client.get(f"/api/results/{each}") for each in (name, f"{name}.json")]
        assert result.content[4:8] == b"ftyp"
        assert (record.json()["prompt"], record.json()["seed"], record.json()["image"]) == (prompt, 1000 + number, "photo.png")
        site.answers.append(record.text)


async def leaver(site: Site, client, number: int) -> None:
    """Ask for a long clip and close the connection."""
    body = f"prompt=x&num_frames=257&num_inference_steps=1000&seed={number}".encode()
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    _, writer = await asyncio.open_connection(site.host, site.port)
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    await asyncio.sleep(0.5)
    writer.transport.abort()


async def stranger(site: Site, client, number: int) -> None:
    """Send a request with a foreign host name."""
    for host in (b"evil.example", b"localhost.evil.example", b"", b"localhost\r\nHost: evil.example"):
        answer = await site.raw(b"GET /config HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert b" 400 " in answer.split(b"\r\n")[0], answer[:200]
    answer = await site.raw(b"GET http://evil.example/config HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b" 404 " in answer.split(b"\r\n")[0]


async def idler(site: Site, client, number: int) -> None:
    """Send only the beginning of a request; the server closes the connection."""
    begun = time.monotonic()
    post = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    post += b"Content-Length: 99\r\n\r\nprom"
    await site.raw((b"", b"GET / HTTP/1.1\r\nHost: lo", post)[number % 3])
    assert time.monotonic() - begun > 10


async def meddler(site: Site, client, number: int) -> None:
    """Send messages that no page sends, and files that are not of the kind that they state."""
    good = {"data": [], "fn_index": 0, "session_hash": "x"}
    changes = [{"fn_index": n} for n in (999, -1, None, "0", 1.5, [0], 10**30)]
    changes += [{"data": None}, {"data": [1] * 99}, {"session_hash": {}}, {"session_hash": "../x"}, {"session_hash": "x" * 999}]
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        for change in changes:
            answer = await client.post(path, json={**good, **change})
            assert 400 <= answer.status_code < 500, (path, change, answer.status_code)
            site.answers.append(answer.text)
        for body in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"data": NaN}'):
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            site.answers.append(answer.text)
    for path in ("queue/data?session_hash=nobody", "queue/data", "heartbeat/%00", "file=x"):
        assert (await client.get(f"/gradio_api/{path}")).status_code == 404
    for path in ("/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/upload"):
        assert 400 <= (await client.post(path, json={"x": 1})).status_code < 500
    lie = lying_avi(site.root.parent / f"lie-{number}.avi", 8000, 6000, 8).read_bytes()
    answer = await client.post("/api/generate", data={"prompt": "x"}, files={"video": ("lie.avi", lie)})
    assert (answer.status_code, "megapixels" in answer.text) == (400, True), answer.text
    site.answers.append(answer.text)


async def quitter(site: Site, client, number: int) -> None:
    """Send half of an upload in chunks, and close the connection."""
    _, writer = await asyncio.open_connection(site.host, site.port)
    writer.write(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
                 b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")  # fmt: skip
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(200_000)
    writer.write(b"%x\r\n" % len(part) + part + b"\r\n")
    await writer.drain()
    await asyncio.sleep(0.3)
    writer.transport.abort()


async def everybody(site: Site) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=site.url, timeout=LIMIT, limits=limits) as client:
        answer = await client.get("/config")
        site.answers.append(answer.text)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors" in answer.headers["content-security-policy"]
        kinds = [(api_user, 16), (page_user, 12), (leaver, 6), (stranger, 4), (idler, 6), (meddler, 2), (quitter, 4)]
        users = [(kind, number) for kind, count in kinds for number in range(count)]
        assert len(users) == 50
        config = answer.json()
        tasks = [kind(site, client, number, *([config] if kind is page_user else [])) for kind, number in users]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [(kind.__name__, number, repr(error)) for (kind, number), error in zip(users, results, strict=True) if error]
        assert wrong == []
        deadline = time.monotonic() + LIMIT
        while (await client.get("/api/status")).json()["state"] != "idle" or list((site.root / "visitors-uploads").iterdir()):
            assert time.monotonic() < deadline, list((site.root / "visitors-uploads").rglob("*"))
            await asyncio.sleep(0.1)
        site.answers.append((await client.get("/api/status")).text)


def test_fifty_users_are_served_or_refused(site):
    before = site.process.memory_info().rss
    asyncio.run(everybody(site))
    assert site.process.memory_info().rss - before < 300 * 2**20
    assert "Traceback" not in site.server.stderr, site.server.stderr
    told = json.dumps(site.answers)
    assert str(site.root.parent) not in told
    assert PATH.search(told) is None, PATH.search(told).group()
