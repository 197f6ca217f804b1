"""Clips by id over HTTP: JSON, progress, content in parts, lists, and mistakes."""

from __future__ import annotations

import base64
import json
import re
import time

import jsonschema
import numpy as np
import pytest
from clip_requests import LONG, SMALL, png

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
pytest.importorskip("fastapi.testclient")

from clip_status import ended

from lumos.demo.schema import CLIP, CLIPS, ERROR
from lumos.video.io import write_video


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
    for text in ("items=0-3", "bytes=abc", "bytes=9-3", "bytes=", "bytes=-", "bytes=0-3,x", "0-3", f"bytes=0-{'9' * 5000}",
                 f"bytes={'9' * 5000}-"):  # fmt: skip
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


def test_a_file_that_the_client_has_is_304(client):
    """RFC 9110, 13.1.2: one of the tags is enough, weak or not, and the header goes before Range."""
    clip = ended(client, client.post("/api/clips", json=SMALL).json())
    for url in (clip["content"], clip["record"]):
        whole = client.get(url)
        tag = whole.headers["etag"]
        for text in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            for method in ("GET", "HEAD"):
                answer = client.request(method, url, headers={"If-None-Match": text, "Range": "bytes=0-3"})
                assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag), text
                assert answer.headers["cache-control"] == whole.headers["cache-control"]
        for text in ('"other"', tag.strip('"'), ""):
            answer = client.get(url, headers={"If-None-Match": text})
            assert (answer.status_code, answer.content) == (200, whole.content), text


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


@pytest.mark.parametrize("more", [{"guidance_interval": [0.0, 0.5]}, {"negative_prompt": "y"}])
def test_a_clip_can_be_guided_by_given_frames_alone(client, tmp_path, more):
    """The check before the clip is read knows that there are given frames, and refuses what `make` would refuse."""
    file = write_video(tmp_path / "c.webp", np.zeros((6, 16, 24, 3), np.uint8), 8).read_bytes()
    asked = {"prompt": "x", "num_frames": 9, "video": base64.b64encode(file).decode(), "num_inference_steps": 2, **more}
    clip = client.post("/api/clips", json=asked | {"guidance_scale": 1, "image_guidance_scale": 2.0}).json()
    assert ended(client, clip)["status"] == "done", clip
    answer = client.post("/api/clips", json=asked | {"guidance_scale": 1})
    assert (answer.status_code, "has no effect with guidance_scale 1" in answer.json()["error"]) == (422, True)


def test_events_tell_each_change_and_end_with_the_clip(client):
    clip = client.post("/api/clips", json={"prompt": "x", "num_frames": 9, "num_inference_steps": 50}).json()
    with client.stream("GET", f"/api/clips/{clip['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    events = re.findall(r"event: (\w+)\ndata: (.*)\nid: \1\n\n", text)
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
    deadline = time.monotonic() + 600
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
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "a number of thousands of digits; shorten it"),
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
