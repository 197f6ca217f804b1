"""Requests as programs and browsers send them: base64 in lines, keys given twice, events after a lost connection, caches."""

from __future__ import annotations

import base64

import pytest
from clip_requests import SMALL, png

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")

from clip_status import ended


def test_base64_as_programs_write_it(client):
    usual = base64.b64encode(png()).decode()
    for text in (base64.encodebytes(png()).decode(), base64.urlsafe_b64encode(png()).decode(), usual.replace("A", "A\r\n "),
                 f"DATA:image/PNG;Base64,{usual}", f"data:image/png;name=my photo.png;base64,{usual}"):  # fmt: skip
        clip = client.post("/api/clips", json={**SMALL, "num_frames": 5, "image": text})
        assert clip.status_code == 202, clip.text
        assert ended(client, clip.json())["status"] == "done"


@pytest.mark.parametrize(("body", "status", "said"), [
    ('{"prompt": "a", "prompt": "b"}', 400, "the key 'prompt' stands twice"),
    ('[{"prompt": "a"}, {"seed": 1, "prompt": "a", "seed": 2}]', 400, "the key 'seed' stands twice"),
    (r'{"prompt": "a\ud800"}', 422, "has U+D800"),
    (r'{"prompt": "a", "negative_prompt": "\udfff"}', 422, "the negative prompt"),
    ('{"promt": "a"}', 422, "unknown field 'promt', did you mean prompt?"),
])  # fmt: skip
def test_mistakes_of_programs(client, body, status, said):
    answer = client.post("/api/clips", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    assert client.get("/api/clips").json()["clips"] == []


def test_a_misspelled_field_of_a_form(client):
    assert "did you mean num_frames?" in client.post("/api/generate", data={"prompt": "a", "num_frame": 1}).json()["error"]


def test_events_after_a_lost_connection(client):
    clip = ended(client, client.post("/api/clips", json=SMALL).json())
    url = f"/api/clips/{clip['id']}/events"
    for last in ("working", "waiting", "x", None):
        answer = client.get(url, headers={} if last is None else {"Last-Event-ID": last})
        assert answer.status_code == 200
        assert answer.text.startswith("event: done\n")
        assert answer.text.endswith("\nid: done\n\n")
    assert client.get(url, headers={"Last-Event-ID": "done"}).status_code == 204


def test_a_browser_at_a_server_without_a_page(client):
    for path in ("/", "/config", "/favicon.ico"):
        answer = client.get(path)
        assert (answer.status_code, "GET /api/openapi.json lists" in answer.json()["error"]) == (404, True)
        assert client.head(path).status_code == 404
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_caches_that_ask_by_time(client):
    url = ended(client, client.post("/api/clips", json=SMALL).json())["content"]
    whole = client.get(url)
    times = {whole.headers["last-modified"]: 304, "Fri, 01 Jan 2100 00:00:00 GMT": 304, "Mon, 01 Jan 2001 00:00:00 GMT": 200,
             "yesterday": 200}  # fmt: skip
    for since, status in times.items():
        assert client.get(url, headers={"If-Modified-Since": since}).status_code == status, since
    both = {"If-Modified-Since": whole.headers["last-modified"], "If-None-Match": '"another"'}
    assert client.get(url, headers=both).status_code == 200
    assert client.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
