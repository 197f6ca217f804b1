"""Clips by id over HTTP: JSON, progress, content in parts, lists, keys and their limits, health, metrics, the schema."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro_stiv import micro_pipeline
from pages import blocks
from PIL import Image

from lumos import LumosPipeline
from lumos.cli import main
from lumos.demo.limits import Limits, ServerBusy
from lumos.demo.service import Service
from lumos.errors import UserError
from lumos.pipeline.options import CHOICE, Option, all_options
from lumos.video.io import read_video

fastapi = pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
testclient = pytest.importorskip("fastapi.testclient")

from clip_status import ended  # noqa: E402

from lumos.demo.keys import HOUR, Key, Keys, read_keys  # noqa: E402
from lumos.demo.metrics import Metrics  # noqa: E402
from lumos.demo.schema import CLIP, CLIPS, ERROR, option_schema, request_schema  # noqa: E402
from lumos.demo.server import build_app  # noqa: E402

SMALL = {"prompt": "a red circle", "num_frames": 1, "num_inference_steps": 1}
LONG = {"prompt": "x", "num_frames": 257, "num_inference_steps": 1000}
ALICE, BOB = "alice-0123456789ab", "bob-0123456789abcdef"


@pytest.fixture(scope="module")
def pipe(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder)


@pytest.fixture
def service(pipe, tmp_path):
    limits = Limits(max_prompt_length=50, max_steps=1000, max_frames=257, max_upload_mb=1, queue_length=3, keep_results=4)
    service = Service(pipe, tmp_path / "root", limits, lambda prompt, seed: {"prompt": prompt, "seed": seed, "model": "micro"})
    yield service
    service.worker.close()


def client_of(service, keys=None, hosts=None):
    from lumos.demo.hosts import Hosts

    app = build_app(service, None, hosts or Hosts(), keys)
    return testclient.TestClient(app, raise_server_exceptions=False, base_url="http://localhost")


@pytest.fixture
def client(service):
    return client_of(service)


@pytest.fixture
def keyed(service, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {ALICE}\nbob: {{key: {BOB}, queue_length: 2, clips_per_hour: 3}}\n")
    return client_of(service, read_keys(path))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def png(side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


# ---- a clip from its request to its removal


def test_a_clip_from_request_to_content(client, service, pipe):
    answer = client.post("/api/clips", json={"prompt": "a red circle", "seed": 2**40, "num_frames": 5, "num_inference_steps": 1})
    assert answer.status_code == 202, answer.text
    clip = answer.json()
    jsonschema.validate(clip, CLIP)
    assert answer.headers["location"] == f"/api/clips/{clip['id']}"
    assert (clip["seed"], clip["content"]) == (2**40, None)
    clip = ended(client, clip)
    assert (clip["status"], clip["progress"], clip["frames"], clip["error"]) == ("done", 1.0, 5, None)
    record = client.get(clip["record"]).json()
    assert (record["seed"], record["settings"]["num_inference_steps"]) == (2**40, 1)
    whole = client.get(clip["content"])
    assert whole.headers["content-type"] == "video/mp4"
    assert "immutable" in whole.headers["cache-control"]
    assert whole.content == (service.store.results / record["file"]).read_bytes()
    head = client.head(clip["content"])
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole.content)))
    assert head.headers["accept-ranges"] == "bytes"
    part = client.get(clip["content"], headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert client.get(clip["content"], headers={"Range": "bytes=99999999-"}).status_code == 416
    assert client.get(f"/api/results/{record['file']}", headers={"Range": "bytes=0-3"}).content == whole.content[:4]
    assert client.delete(f"/api/clips/{clip['id']}").status_code == 204
    assert client.get(f"/api/clips/{clip['id']}").status_code == 404
    assert list(service.store.results.iterdir()) == []


def test_a_range_that_cannot_be_sent(client):
    """RFC 9110, 14.2: a Range of another unit or form, and one for HEAD, is ignored."""
    url = ended(client, client.post("/api/clips", json=SMALL).json())["content"]
    whole = client.get(url).content
    for text in ("items=0-3", "bytes=abc", "bytes=9-3", "bytes=", "bytes=-", "bytes=0-3,x", "0-3"):
        answer = client.get(url, headers={"Range": text})
        assert (answer.status_code, answer.content) == (200, whole), text
    head = client.head(url, headers={"Range": "bytes=0-3"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole)))
    for text in ("bytes=99999999-", "bytes=-0", "bytes=99999999-999999999,-0"):
        answer = client.get(url, headers={"Range": text})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(whole)}")
        jsonschema.validate(answer.json(), ERROR)
    for text, part in (("bytes=-3", whole[-3:]), ("Bytes=2-", whole[2:]), ("bytes=99999999-, 1-2", whole[1:3])):
        answer = client.get(url, headers={"Range": text})
        assert (answer.status_code, answer.content) == (206, part), text


def test_whole_numbers_of_json_and_marks_of_editors(client):
    """JSON Schema takes 1.0 for a whole number, as the server does then."""
    body = {**SMALL, "num_frames": 1.0, "num_inference_steps": 1.0, "seed": 3.0, "prompt": "größer"}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        content = json.dumps(body, ensure_ascii=False).encode(encoding)
        answer = client.post("/api/clips", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["seed"], answer.json()["prompt"]) == (202, 3, "größer"), answer.text
        ended(client, answer.json())
    assert client.post("/api/clips", json={**SMALL, "num_frames": 1.5}).status_code == 422


def test_another_method_of_a_route_is_405(client):
    for method, path, allowed in (("HEAD", "/api/clips/x", "DELETE, GET"), ("PUT", "/api/clips", "GET, POST"),
                                  ("GET", "/api/clips/x/cancel", "POST"), ("OPTIONS", "/api/clips/x/content", "GET, HEAD"),
                                  ("PATCH", "/api/status", "GET"), ("GET", "/api/generate", "POST")):  # fmt: skip
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        if method != "HEAD":
            jsonschema.validate(answer.json(), ERROR)


def test_the_schema_names_the_statuses_of_errors(client):
    paths = client.get("/api/openapi.json").json()["paths"]
    for path, method, statuses in (
        ("/api/generate", "post", "400 401 403 413 429 500"), ("/api/results/{name}", "get", "401 404 416"),
        ("/api/clips/{clip_id}/content", "get", "401 404 409 410 416"), ("/health", "get", "503"), ("/metrics", "get", "401"),
        ("/api/clips", "post", "400 401 403 413 415 422 429 500"),
    ):  # fmt: skip
        assert set(statuses.split()) <= paths[path][method]["responses"].keys(), path


def test_every_option_of_the_generator_reaches_the_record(client, pipe):
    """The request has every declared field, each with a value other than the default."""
    chosen = {"guidance_scale": 2.5, "temperature": 0.5, "num_inference_steps": 2, "top_k": 7, "guidance_interval": [0.0, 0.5]}
    assert chosen.keys() <= pipe.sampling.declared().keys()
    clip = ended(client, client.post("/api/clips", json={"prompt": "x", "num_frames": 5, "fps": 3, **chosen}).json())
    settings = client.get(clip["record"]).json()["settings"]
    assert {name: settings[name] for name in chosen} == chosen
    assert settings["fps"] == 3


def test_an_upload_comes_as_base64_and_is_gone_afterwards(client, service):
    encoded = base64.b64encode(png()).decode()
    for image in (encoded, f"data:image/png;base64,{encoded}"):
        clip = ended(client, client.post("/api/clips", json={"prompt": "x", "num_frames": 5, "image": image}).json())
        assert clip["status"] == "done", clip
        assert client.get(clip["record"]).json()["settings"]["num_given_frames"] == 1
    assert list(service.store.uploads.iterdir()) == []
    clip = client.post("/api/clips", json={"prompt": "x", "image": base64.b64encode(b"no picture").decode()}).json()
    clip = ended(client, clip)
    assert clip["status"] == "failed"
    assert "cannot read the picture" in clip["error"]
    content = client.get(f"/api/clips/{clip['id']}/content")
    assert (content.status_code, "cannot read the picture" in content.json()["error"]) == (409, True)
    assert list(service.store.uploads.iterdir()) == []


def test_events_tell_each_change_and_end_with_the_clip(client):
    clip = client.post("/api/clips", json={"prompt": "x", "num_frames": 9, "num_inference_steps": 50}).json()
    with client.stream("GET", f"/api/clips/{clip['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    told = [json.loads(data) for _, data in events]
    for found in told:
        jsonschema.validate(found, CLIP)
    assert [kind for kind, _ in events] == [found["status"] for found in told]
    progress = [found["progress"] for found in told]
    assert progress == sorted(progress)
    assert (told[-1]["status"], told[-1]["progress"], told[-1]["frames"]) == ("done", 1.0, 9)
    assert len({json.dumps(found) for found in told}) == len(told)


def test_a_list_is_taken_whole_or_not_at_all(client, service):
    answer = client.post("/api/clips", json=[{**SMALL, "seed": seed} for seed in (1, 2, 3)])
    assert answer.status_code == 202
    jsonschema.validate(answer.json(), CLIPS)
    clips = [ended(client, clip) for clip in answer.json()["clips"]]
    assert [clip["seed"] for clip in clips] == [1, 2, 3]
    page = client.get("/api/clips", params={"limit": 2}).json()
    jsonschema.validate(page, CLIPS)
    assert [clip["seed"] for clip in page["clips"]] == [3, 2]
    rest = client.get("/api/clips", params={"limit": 2, "before": page["next"]}).json()
    assert ([clip["seed"] for clip in rest["clips"]], rest["next"]) == ([1], None)
    for bodies, status, message in (
        ([SMALL, {"prompt": "x", "num_frames": 6}], 422, "clip 2: num_frames 6"),
        ([SMALL] * 5, 422, "the list has 5 clips; give 1 to 4"),
        ([], 422, "the list has 0 clips"),
        ([SMALL, 3], 422, "clip 2: the clip is 3; give an object"),
    ):
        answer = client.post("/api/clips", json=bodies)
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert service.worker.status() == {"state": "idle", "waiting": 0}
    client.post("/api/clips", json=[LONG] * 2)
    answer = client.post("/api/clips", json=[SMALL] * 3)
    assert (answer.status_code, "has room for 2 now" in answer.json()["error"]) == (429, True)
    assert int(answer.headers["retry-after"]) >= 1
    assert len(client.get("/api/clips").json()["clips"]) == 5


def test_cancelling_and_removing(client, service):
    running, waiting = (client.post("/api/clips", json=LONG).json() for _ in range(2))
    answer = client.get(f"/api/clips/{running['id']}/content")
    assert (answer.status_code, "a clip has content when its status is done" in answer.json()["error"]) == (409, True)
    assert client.post(f"/api/clips/{waiting['id']}/cancel").json()["status"] == "cancelled"
    answer = client.post(f"/api/clips/{waiting['id']}/cancel")
    assert (answer.status_code, "the clip has ended (cancelled)" in answer.json()["error"]) == (409, True)
    assert client.delete(f"/api/clips/{running['id']}").status_code == 204
    deadline = time.monotonic() + 60
    while service.worker.status()["state"] != "idle":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(service.store.results.iterdir()) == []


def test_what_was_removed_to_make_room_is_gone(client, service):
    first = ended(client, client.post("/api/clips", json=SMALL).json())
    service.store._stays.clear()
    service.store.remove(client.get(first["record"]).json()["file"])
    answer = client.get(first["content"])
    assert (answer.status_code, "removed to make room" in answer.json()["error"]) == (410, True)
    for _ in range(6):
        last = ended(client, client.post("/api/clips", json=SMALL).json())
    assert client.get(f"/api/clips/{first['id']}").status_code == 404
    assert client.get(f"/api/clips/{last['id']}").status_code == 200
    assert len(client.get("/api/clips").json()["clips"]) <= 5


# ---- mistakes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt 3 is not allowed; give text"),
        ({"prompt": "x" * 51}, "prompt has 51 characters; at most 50"),
        ({"prompt": "x", "num_frames": "9"}, "num_frames '9' is not allowed; give a whole number"),
        ({"prompt": "x", "num_frames": True}, "num_frames True is not allowed; give a whole number"),
        ({"prompt": "x", "num_frames": 258}, "num_frames 258 is not allowed here; give 1 to 257"),
        ({"prompt": "x", "num_frames": 6}, "for example 5 or 9"),
        ({"prompt": "x", "seed": -1}, "seed -1 is not allowed"),
        ({"prompt": "x", "seed": 2**64}, "is not allowed"),
        ({"prompt": "x", "guidance_scale": 0}, "guidance_scale 0 is not allowed"),
        ({"prompt": "x", "guidance_interval": [1]}, "guidance_interval"),
        ({"prompt": "x", "guidance_scale": 1, "negative_prompt": "y"}, "negative_prompt has no effect"),
        ({"prompt": "x", "device": "cpu"}, "unknown field 'device'; known are prompt, negative_prompt"),
        ({"prompt": "x", "image": "/etc/passwd"}, "image is not base64"),
        ({"prompt": "x", "image": ""}, "image is empty"),
        ("x", "the clip is 'x'; give an object"),
    ],
)
def test_a_wrong_value_is_status_422(client, service, body, message):
    answer = client.post("/api/clips", json=body)
    assert answer.status_code == 422, answer.text
    jsonschema.validate(answer.json(), ERROR)
    assert message in answer.json()["error"]
    assert service.worker.status() == {"state": "idle", "waiting": 0}
    assert list(service.store.uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "the body is not valid JSON"),
        (b"\xff", "application/json", 400, "the body is not UTF-8"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "send application/json here, or a form to /api/generate"),
        (b'{"prompt": "x", "image": "' + b"A" * 3 * 2**20 + b'"}', "application/json", 413, "too large"),
        (b'{"prompt": "x", "image": "' + b"A" * (2**20 * 4 // 3 + 400) + b'"}', "application/json", 413, "larger than 1 MB"),
    ],
)
def test_a_wrong_body(client, service, content, kind, status, message):
    answer = client.post("/api/clips", content=content, headers={"content-type": kind})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert list(service.store.uploads.iterdir()) == []


@pytest.mark.parametrize("path", ["/api/clips/none", "/api/clips/none/content", "/api/clips/none/events", "/api/nothing"])
def test_what_there_is_not_is_404(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    jsonschema.validate(answer.json(), ERROR)


def test_a_wrong_query_is_status_422(client):
    for limit in ("0", "1000", "x"):
        answer = client.get("/api/clips", params={"limit": limit})
        assert (answer.status_code, answer.json()["error"].startswith("limit: ")) == (422, True)
    assert client.get("/api/clips", params={"before": "x"}).status_code == 404


# ---- keys


def test_every_route_but_health_needs_a_key(keyed):
    for path in ("/api/clips", "/api/clips/x", "/api/clips/x/content", "/api/clips/x/events", "/api/status", "/api/results/x-1.mp4",
                 "/metrics"):  # fmt: skip
        for headers in ({}, bearer("wrong-0123456789abc"), {"Authorization": f"Basic {ALICE}"}, bearer("")):
            answer = keyed.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            jsonschema.validate(answer.json(), ERROR)
        assert keyed.get(path, headers=bearer(ALICE)).status_code in (200, 404)
    assert keyed.post("/api/clips", json=SMALL).status_code == 401
    assert keyed.post("/api/generate", data={"prompt": "x"}).status_code == 401
    assert keyed.delete("/api/clips/x").status_code == 401
    assert keyed.get("/health").json()["status"] == "ok"
    answer = keyed.post("/api/generate", data={"prompt": "x", "num_frames": "1"}, headers=bearer(BOB))
    assert answer.status_code == 200


def test_clients_see_their_own_clips_only(keyed):
    clip = keyed.post("/api/clips", json=SMALL, headers=bearer(ALICE)).json()
    clip = ended(keyed, clip, headers=bearer(ALICE))
    for path in ("", "/content", "/events"):
        assert keyed.get(f"/api/clips/{clip['id']}{path}", headers=bearer(BOB)).status_code == 404
    assert keyed.delete(f"/api/clips/{clip['id']}", headers=bearer(BOB)).status_code == 404
    assert keyed.get("/api/clips", headers=bearer(BOB)).json()["clips"] == []
    assert len(keyed.get("/api/clips", headers=bearer(ALICE)).json()["clips"]) == 1


def test_the_limits_of_a_key(keyed):
    first = keyed.post("/api/clips", json=LONG, headers=bearer(BOB)).json()
    keyed.post("/api/clips", json=LONG, headers=bearer(BOB))
    answer = keyed.post("/api/clips", json=SMALL, headers=bearer(BOB))
    assert (answer.status_code, "you have 2 clips that wait or are being made" in answer.json()["error"]) == (429, True)
    assert keyed.post("/api/clips", json=SMALL, headers=bearer(ALICE)).status_code == 202  # the others are not concerned
    keyed.post(f"/api/clips/{first['id']}/cancel", headers=bearer(BOB))
    deadline = time.monotonic() + 60
    while keyed.get(f"/api/clips/{first['id']}", headers=bearer(BOB)).json()["status"] != "cancelled":
        assert time.monotonic() < deadline
    assert keyed.post("/api/clips", json=LONG, headers=bearer(BOB)).status_code == 202
    answer = keyed.post("/api/clips", json=SMALL, headers=bearer(BOB))
    assert (answer.status_code, "3 clips in an hour" in answer.json()["error"]) == (429, True)
    assert 3500 < int(answer.headers["retry-after"]) <= HOUR
    answer = keyed.post("/api/clips", json=[SMALL] * 4, headers=bearer(BOB))
    assert (answer.status_code, "more than this key may have in an hour" in answer.json()["error"]) == (422, True)


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 3)), max_size=30), st.integers(1, 5))
def test_no_hour_has_more_clips_than_a_key_may_have(asked, most):
    """Compares with the plain rule, which counts all accepted clips of the last hour anew each time."""
    now, taken = 0, []
    key = Key("a", b"", clips_per_hour=most)
    keys = Keys([key], clock=lambda: now)
    for pause, clips in asked:
        now += pause
        recent = sum(when > now - HOUR for when in taken)
        try:
            with keys.counted(key, clips):
                taken += [now] * clips
            assert recent + clips <= most
        except UserError:
            assert clips > most
        except ServerBusy as busy:
            assert recent + clips > most
            free = sum(when > now + busy.seconds - HOUR for when in taken)
            assert free + clips <= most  # as it says, there is room then


def test_clips_that_the_queue_refuses_do_not_count():
    key = Key("a", b"", clips_per_hour=1)
    keys = Keys([key])
    for _ in range(3):
        with pytest.raises(ServerBusy, match="full"), keys.counted(key, 1):
            raise ServerBusy("full")
    with keys.counted(key, 1):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"), ("- a", "holds no keys"), ("a: short", "the key is not allowed; give 16 to 256"),
        ("a: 1234567890123456", "in quotes if all are digits"), ("a b: 0123456789abcdef", "is no name of a client"),
        ("a: {key: x123456789abcdef, rate: 3}", "'rate' is unknown; known are key, queue_length, clips_per_hour"),
        ("a: {key: x123456789abcdef, queue_length: 0}", "queue_length 0 is not allowed"),
        ("a: x123456789abcdef\nb: x123456789abcdef", "two names have the same key"),
    ],
)  # fmt: skip
def test_files_of_keys_that_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "keys.yaml").write_text(text)
    assert main(["serve", "--api-keys", str(tmp_path / "keys.yaml"), "--root", str(tmp_path / "root")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "456789" not in said  # no key in a log


def test_a_server_that_others_reach_lists_clips_for_keys_only(service):
    from lumos.demo.hosts import Hosts

    for hosts, status in ((Hosts(listening="0.0.0.0"), 403), (Hosts(["lumos.example"]), 403), (Hosts(listening="127.0.0.1"), 200)):
        assert client_of(service, hosts=hosts).get("/api/clips").status_code == status
    open_to_all = client_of(service, hosts=Hosts(listening="0.0.0.0"))
    clip = open_to_all.post("/api/clips", json=SMALL).json()
    assert ended(open_to_all, clip)["status"] == "done"


# ---- health, metrics, schema


def test_health_follows_the_worker(client, service):
    assert client.get("/health").status_code == client.head("/health").status_code == 200
    service.worker.close()
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "closing")


SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="[^"\\\n]*",?)*)\})? ([0-9.e+-]+)')


def samples(text: str) -> dict[tuple[str, str], float]:
    """Return the samples of a text in the format of Prometheus; each must follow the HELP and TYPE of its family."""
    found, family = {}, None
    for line in text.splitlines():
        if line.startswith("# "):
            _, word, name, *rest = line.split(" ", 3)
            assert word in ("HELP", "TYPE")
            assert rest
            family = name
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert match[1].startswith(family)
        found[match[1], match[2] or ""] = float(match[3])
    return found


def test_metrics_count_clips_frames_seconds_and_answers(client):
    before = samples(client.get("/metrics").text)
    assert before["lumos_clips_total", 'state="done"'] == 0
    ended(client, client.post("/api/clips", json={**SMALL, "num_frames": 5}).json())
    bad = client.post("/api/clips", json={"prompt": "x", "image": base64.b64encode(b"x").decode()}).json()
    ended(client, bad)
    running = client.post("/api/clips", json=LONG).json()
    client.post("/api/clips", json=LONG)
    client.request("MADEUP", "/api/clips")
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(answer.text)
    assert [found["lumos_clips_total", f'state="{state}"'] for state in ("done", "failed", "cancelled")] == [1, 1, 0]
    assert found["lumos_frames_total", ""] == 5
    assert found["lumos_clip_seconds_count", ""] == found["lumos_clip_seconds_bucket", 'le="+Inf"'] == 1
    assert (found["lumos_working", ""], found["lumos_queue_waiting", ""]) == (1, 1)
    assert found["lumos_requests_total", 'method="POST",status="202"'] == 4
    assert found["lumos_requests_total", 'method="other",status="405"'] == 1
    client.delete(f"/api/clips/{running['id']}")


@given(st.lists(st.floats(0, 5000), max_size=20))
def test_buckets_hold_all_clips_up_to_their_bound(seconds):
    metrics = Metrics({})
    for value in seconds:
        metrics.clip("done", value, 3)
    found = samples(metrics.text())
    for (name, labels), count in found.items():
        if name == "lumos_clip_seconds_bucket":
            bound = float(labels.removeprefix('le="').removesuffix('"').replace("+Inf", "inf"))
            assert count == sum(value <= bound for value in seconds)
    assert found["lumos_clip_seconds_sum", ""] == pytest.approx(sum(seconds))


@pytest.fixture(scope="module")
def stiv():
    return micro_pipeline()


def test_the_schema_names_all_that_a_request_may_hold(client, service, pipe, stiv):
    document = client.get("/api/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/api/clips", "/api/clips/{clip_id}", "/api/clips/{clip_id}/content", "/api/clips/{clip_id}/events",
        "/api/clips/{clip_id}/cancel", "/api/generate", "/api/status", "/api/results/{name}", "/health", "/metrics",
    }  # fmt: skip
    assert set(document["paths"]["/api/clips/{clip_id}/content"]) == {"get", "head"}
    (body,) = document["paths"]["/api/clips"]["post"]["requestBody"]["content"].values()
    properties = body["schema"]["oneOf"][0]["properties"]
    assert properties.keys() >= {"prompt", "negative_prompt", "seed", "image", "video", *pipe.sampling.declared()}
    for model in (pipe, stiv):
        schema = request_schema(model, service.limits)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert ("last_image" in schema["properties"]) == ("last_image" in model.takes)
        jsonschema.validate(SMALL, schema)
        for name, option in model.sampling.declared().items():
            assert schema["properties"][name]["description"] == option.meaning


values = st.none() | st.booleans() | st.integers(-3, 2000) | st.floats(-2, 1200, allow_nan=False) | st.text(max_size=8) | st.lists(
    st.floats(-1, 2, allow_nan=False) | st.integers(0, 1), max_size=3
)  # fmt: skip


@given(option=st.sampled_from(list(all_options().values())), value=values, data=st.data())
def test_schema_and_server_agree_on_every_option(option: Option, value, data):
    """The schema allows and forbids the same values as the declarations."""
    if option.kind == CHOICE:
        value = data.draw(st.sampled_from([*option.choices, value]))
    limits = Limits(max_steps=10**6, max_frames=9, max_side=64)
    schema = {"properties": {"it": option_schema(option, option.default, limits)}, "required": ["it"]}
    schema["properties"]["it"]["type"] = [schema["properties"]["it"]["type"], "null"]
    if isinstance(value, float) and value.is_integer():
        value += 0.5  # JSON Schema takes 2.0 for a whole number, the declaration does not
    allowed = jsonschema.Draft202012Validator(schema).is_valid({"it": value})
    try:
        option.check(value if value is not None or option.is_optional else option.default)
        taken = True
    except UserError:
        taken = False
    is_reversed = isinstance(value, list) and len(value) == 2 and value[0] >= value[1]
    assert taken == (allowed and not is_reversed)


@pytest.mark.slow
def test_a_server_of_its_own_answers_without_gradio(repo, micro_folder, tmp_path, forks):
    """`serve` loads no gradio, and stops at once on a signal, although a client is connected."""
    program = (
        "import sys, threading, time, urllib.request, json, os, signal\n"
        "from lumos.cli import main\n"
        "import lumos.demo.server as server\n"
        "made = server.listen\n"
        "def listen(*args):\n"
        "    socket = made(*args); ports.append(socket.getsockname()[1]); return socket\n"
        "ports = []; server.listen = listen\n"
        "def use():\n"
        "    try: follow()\n"
        "    except BaseException: os.kill(os.getpid(), signal.SIGINT); raise\n"
        "def follow():\n"
        "    while True:\n"
        "        try: url = f'http://127.0.0.1:{ports[0]}'; urllib.request.urlopen(f'{url}/health', timeout=100); break\n"
        "        except (IndexError, OSError): time.sleep(0.01)  # the model is still being loaded\n"
        "    body = json.dumps({'prompt': 'x', 'num_frames': 257, 'num_inference_steps': 100}).encode()\n"
        "    ask = urllib.request.Request(f'{url}/api/clips', body, {'content-type': 'application/json'})\n"
        "    clip = json.load(urllib.request.urlopen(ask, timeout=100))\n"
        "    events = urllib.request.urlopen(f\"{url}/api/clips/{clip['id']}/events\", timeout=100)\n"
        "    print(events.readline().decode().strip(), 'gradio' in sys.modules, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(events.read().decode().count('event: interrupted'), flush=True)\n"
        "user = threading.Thread(target=use); user.start()\n"
        "code = main(['serve', '--model', sys.argv[1], '--port', '0', '--root', sys.argv[2], '--max-frames', '257'])\n"
        "user.join(); print(code)"
    )
    done = forks.run(["-c", program, micro_folder, tmp_path / "root"], cwd=repo)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("http://127.0.0.1:")
    assert re.fullmatch(r"event: (waiting|working) False", lines[1])
    assert lines[2:] == ["1", "0"]


@pytest.fixture
def address(service):
    """The address of a real server, which runs in a thread."""
    from lumos.demo.hosts import Hosts
    from lumos.demo.server import Server, listen

    uvicorn = pytest.importorskip("uvicorn")
    with listen("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(build_app(service, None, Hosts()), log_level="warning", ws="none"), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_documented_client(address, repo, tmp_path, monkeypatch):
    (block,) = blocks("docs/http-api.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(block.replace("http://127.0.0.1:8000", address), {})
    assert read_video(tmp_path / "clip.mp4")[0].shape == (5, 16, 24, 3)
    with pytest.raises(RuntimeError, match="prompt has 80 characters; at most 50 are allowed"):
        exec(block.replace("http://127.0.0.1:8000", address).replace("a large red circle moves left", "x" * 80), {})


def test_the_documented_curl_line(address, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "photo.png").write_bytes(png())
    command = next(block for block in blocks("docs/http-api.md", "bash") if block.startswith("curl"))
    done = subprocess.run(["bash", "-c", command.replace("http://127.0.0.1:8000", address)], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), CLIP)


def test_the_documented_keys_and_routes(client, tmp_path):
    (block,) = blocks("docs/http-api.md", "yaml")
    (tmp_path / "keys.yaml").write_text(block)
    assert [(key.name, key.queue_length, key.clips_per_hour) for key in read_keys(tmp_path / "keys.yaml").keys] == [
        ("alice", None, None), ("bob", 4, 100)
    ]  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    listed = {re.sub("ID", "{clip_id}", re.sub("NAME", "{name}", path)).partition("?")[0]
              for path in re.findall(r"^\| `.*?(/[\w/.]+[^`]*)` \|", text, re.MULTILINE)}  # fmt: skip
    assert listed - {"/api/openapi.json"} == set(client.get("/api/openapi.json").json()["paths"])
