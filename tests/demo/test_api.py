"""`POST /api/generate` of the whole app without gradio: a clip, and every mistake as JSON with a fitting status."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lumos.demo import views
from lumos.demo.limits import Limits
from lumos.demo.worker import ClipJob
from lumos.pipeline.request import Request
from lumos.prompt_lists.clips import default_name
from lumos.video.io import read_image, read_video, write_video

fastapi = pytest.importorskip("fastapi", reason="the API needs the extra [demo]")
testclient = pytest.importorskip("fastapi.testclient")

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def limits():
    return Limits(max_prompt_length=50, max_steps=1000, max_frames=257, max_upload_mb=1, max_upload_seconds=3, queue_length=1)


@pytest.fixture
def site(service):
    from lumos.demo.api import add_api
    from lumos.demo.middleware import Middleware

    app = fastapi.FastAPI()
    add_api(app, service)
    return Middleware(app, service.store, service.limits)


@pytest.fixture
def client(site):
    return testclient.TestClient(site, raise_server_exceptions=False)


def png(picture: np.ndarray = PICTURE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def uploads(service) -> list:
    return [path for path in service.store.uploads.rglob("*") if path.is_file()]


def test_a_call_ends_in_an_mp4_whose_record_makes_it_again(client, service, pipe, tmp_path):
    answer = client.post("/api/generate", data={"prompt": "a red circle", "seed": "3", "num_frames": "9"})
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-lumos-seed"]) == (200, "video/mp4", "3")
    (tmp_path / "clip.mp4").write_bytes(answer.content)
    frames, fps = read_video(tmp_path / "clip.mp4")
    assert (frames.shape, fps) == ((9, 16, 24, 3), 8)
    write_video(tmp_path / "same.mp4", pipe("a red circle", seed=3, num_frames=9, output_type="uint8").frames[0], 8)
    assert np.abs(frames.astype(int) - read_video(tmp_path / "same.mp4")[0]).max() <= 4
    record = client.get(f"/api/{answer.headers['x-lumos-record']}").json()
    assert (record["prompt"], record["seed"], record["model"]) == ("a red circle", 3, "micro")
    assert (record["settings"]["num_frames"], record["settings"]["num_inference_steps"]) == (9, 2)
    assert client.get(f"/api/results/{record['file']}").content == answer.content
    assert json.loads((service.store.results / f"{record['file']}.json").read_text()) == record
    assert client.get("/api/status").json()["state"] == "idle"


def test_a_picture_notes_options_without_effect(client, tmp_path):
    answer = client.post("/api/generate", data={"prompt": "x", "num_frames": "1", "history_mask_ratio": "0.5"})
    assert answer.headers["content-type"] == "image/png"
    (tmp_path / "a.png").write_bytes(answer.content)
    assert read_image(tmp_path / "a.png").shape == (16, 24, 3)
    notes = client.get(f"/api/{answer.headers['x-lumos-record']}").json()["notes"]
    assert notes == ["history_mask_ratio=0.5 has no effect on a picture (num_frames 1)"]


@pytest.mark.parametrize("prompt", ["красный круг", "红色的圆", "a red circle", "हिन्दी है", "!?"])
def test_a_prompt_of_any_script_names_a_result_that_can_be_had(client, service, prompt):
    answer = client.post("/api/generate", data={"prompt": prompt, "num_frames": "1", "seed": "7"})
    assert answer.status_code == 200, answer.text
    record = client.get(f"/api/{answer.headers['x-lumos-record']}").json()
    assert record["prompt"] == prompt
    assert record["file"].startswith(default_name(prompt, True, after="-7").removesuffix(".png"))
    assert client.get(f"/api/results/{record['file']}").content == answer.content
    html = views.card({**record, "settings": dict(record["settings"])})
    assert client.get("/" + re.search(r'src="(.*?)"', html)[1]).content == answer.content
    service.store._stays.clear()
    service.store._keep_results = 1  # the next result removes this one, whatever its script
    service.store.new_result("b.png")
    assert list(service.store.results.iterdir()) == []


@pytest.mark.parametrize("kind", ["image", "video"])
def test_uploads_begin_the_clip_and_are_gone_afterwards(client, service, tmp_path, kind):
    if kind == "image":
        file = ("my photo.png", png())
    else:
        file = ("clip.mp4", write_video(tmp_path / "c.mp4", np.stack([PICTURE] * 16), 8).read_bytes())
    answer = client.post("/api/generate", data={"prompt": "x", "num_frames": "9"}, files={kind: file})
    assert answer.status_code == 200, answer.text
    record = client.get(f"/api/{answer.headers['x-lumos-record']}").json()
    assert record["settings"]["num_given_frames"] == {"image": 1, "video": 5}[kind]
    assert record[kind] == {"image": "my_photo.png", "video": "clip.mp4"}[kind]
    assert uploads(service) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 51}, "prompt has 51 characters; at most 50"),
        ({"prompt": "x", "num_frames": "many"}, "num_frames 'many' is not allowed; give a whole number"),
        ({"prompt": "x", "num_frames": "258"}, "num_frames 258 is not allowed here; give 1 to 257"),
        ({"prompt": "x", "num_frames": "6"}, "for example 5 or 9"),
        ({"prompt": "x", "height": "48"}, "height 48 is not allowed here; give 1 to 24"),
        ({"prompt": "x", "num_inference_steps": "1001"}, "give 1 to 1000"),
        ({"prompt": "x", "guidance_scale": "0"}, "guidance_scale 0.0 is not allowed"),
        ({"prompt": "x", "guidance_scale": "nan"}, "guidance_scale nan is not allowed"),
        ({"prompt": "x", "guidance_scale": "1", "negative_prompt": "y"}, "negative_prompt has no effect"),
        ({"prompt": "x", "seed": "-1"}, "seed -1 is not allowed"),
        ({"prompt": "x", "device": "cpu"}, "unknown field 'device'; known are prompt, negative_prompt"),
        ({"prompt": ["x", "y"]}, "a field is given twice"),
        ({"prompt": "x", "image": "/etc/passwd"}, "image is text; send a file"),
    ],
)
def test_a_mistake_is_json_with_status_400(client, service, data, message):
    answer = client.post("/api/generate", data=data or {"seed": "1"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert list(service.store.results.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        ("notes.png", b"no picture", 400, "notes.png"),
        ("large.png", bytes(2**20 + 9), 413, "large.png has 1 MB; at most 1 MB are allowed"),
        ("huge.png", bytes(3 * 2**20), 413, "the request is too large; at most 1 MB are allowed"),
    ],
)
def test_bad_uploads(client, service, name, content, status, message):
    answer = client.post("/api/generate", data={"prompt": "x"}, files={"image": (name, content)})
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert str(service.store.uploads) not in answer.text
    assert uploads(service) == []


def test_a_long_clip_and_both_kinds_at_once(client, tmp_path):
    long = write_video(tmp_path / "c.mp4", np.stack([PICTURE] * 40), 8).read_bytes()
    answer = client.post("/api/generate", data={"prompt": "x"}, files={"video": ("long.mp4", long)})
    assert (answer.status_code, answer.json()["error"]) == (400, "long.mp4 lasts 5.0 s; at most 3 s are allowed: cut it")
    answer = client.post("/api/generate", data={"prompt": "x"}, files={"video": ("c.mp4", long), "image": ("a.png", png())})
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_a_body_that_hides_its_length_is_bounded_too(client):
    def body():
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(5):
            yield bytes(2**20)
        yield b"\r\n--b--\r\n"

    answer = client.post("/api/generate", content=body(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413
    assert "too large" in answer.json()["error"]


def test_other_bodies_are_small(client):
    answer = client.post("/api/status", content=bytes(2 * 2**20))
    assert answer.status_code == 413


def test_pages_of_other_sites_start_nothing(client, service):
    """A browser names the origin of a request; it would send a form from any site to an address of its own machine."""
    ask = lambda site: client.post("/api/generate", data={"prompt": "x"}, headers={"sec-fetch-site": site})  # noqa: E731
    answer = ask("cross-site")
    assert (answer.status_code, "another site" in answer.json()["error"]) == (403, True)
    assert list(service.store.results.iterdir()) == []
    assert ask("same-origin").status_code == 200
    assert client.get("/api/status", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to it


@pytest.mark.parametrize(("headers", "status"), [
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://testserver:3000", "sec-fetch-site": "same-site"}, 403),
    ({"origin": "http://testserver"}, 200),
    ({"origin": "https://lumos.example", "sec-fetch-site": "same-origin"}, 200),  # what no page can say that is not
    ({"origin": "https://lumos.example", "x-forwarded-host": "lumos.example"}, 200),  # a proxy with a name of its own
])  # fmt: skip
def test_the_origin_header_decides_without_fetch_metadata(client, headers, status):
    assert client.post("/api/generate", data={"prompt": "x", "num_frames": "1"}, headers=headers).status_code == status


def test_other_content_is_refused(client):
    answer = client.post("/api/generate", json={"prompt": "x"})
    assert (answer.status_code, "send a form" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    "path", ["/api/results/..%2f..%2f..%2fetc%2fpasswd", "/api/results/none-0123456789ab.mp4", "/api/nothing", "/docs",
             "/openapi.json", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/etc/passwd"],
)  # fmt: skip
def test_other_paths_are_404(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "error" in answer.json()


LONG = Request.of("x", num_frames=257, num_inference_steps=1000)


def test_a_full_queue_is_status_429_for_page_and_api_alike(client, service):
    jobs = [service.submit(ClipJob(LONG)) for _ in range(2)]
    answer = client.post("/api/generate", data={"prompt": "x"})
    assert (answer.status_code, "try again later" in answer.json()["error"]) == (429, True)
    status = client.get("/api/status").json()
    assert (status["state"], status["limits"]["queue_length"], status["defaults"]["num_frames"]) == ("working", 1, 5)
    service.worker.close()
    assert {job.state for job in jobs} == {"interrupted"}


@pytest.mark.parametrize("what", ["clip", "record", "image"])
def test_a_full_disk_is_status_500_and_leaves_nothing(client, service, monkeypatch, what):
    """No answer names a folder of the server."""
    replace = os.replace

    def full(source, target=""):
        if what == "image" or str(target).endswith(".json") == (what == "record"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    if what == "image":
        monkeypatch.setattr(service.store, "new_upload", full)
    else:
        monkeypatch.setattr("lumos.files.os.replace", full)
    files = {"image": ("a.png", b"no picture")} if what == "image" else None
    answer = client.post("/api/generate", data={"prompt": "x"}, files=files)
    kept = "image" if what == "image" else "clip"
    message = f"the server cannot keep the {kept} (No space left on device); try again later"
    assert (answer.status_code, answer.json()) == (500, {"error": message})
    assert list(service.store.results.iterdir()) == []


@pytest.mark.parametrize("data", [
    {"guidance_scale": "0"}, {"history_mask_ratio": "1"}, {"seed": "-1"}, {"num_frames": "6"}, {"width": "20"},
    {"guidance_scale": "1", "negative_prompt": "y"},
])  # fmt: skip
def test_a_mistake_is_told_before_it_waits(client, service, data):
    """Everything but the content of an upload is checked first, also if the queue is full."""
    for _ in range(2):
        service.submit(ClipJob(LONG))
    assert client.post("/api/generate", data={"prompt": "x"}).status_code == 429
    answer = client.post("/api/generate", data={"prompt": "x", **data})
    assert answer.status_code == 400, answer.text


def test_hanging_up_ends_the_work(site, service):
    """A request as a server passes it on: its body and, once the work has begun, a message that the client has gone."""
    body = b"prompt=x&num_frames=257&num_inference_steps=1000"
    begun, sent, messages = threading.Event(), [], [{"type": "http.request", "body": body}]
    make = service.worker._make
    service.worker._make = lambda job: (begun.set(), make(job))

    async def receive():
        if messages:
            return messages.pop()
        if not begun.is_set():
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/x-www-form-urlencoded"), (b"content-length", b"%d" % len(body)),
               (b"host", b"localhost")]  # fmt: skip
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "raw_path": b"/api/generate", "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
    asyncio.run(asyncio.wait_for(site(scope, receive, send), 60))
    assert begun.is_set()
    deadline = time.monotonic() + 60
    while service.worker.status()["state"] != "idle":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(service.store.results.iterdir()) == []
