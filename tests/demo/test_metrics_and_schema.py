"""What the HTTP API tells of itself: health, metrics, and the schema of its requests and answers."""

from __future__ import annotations

import base64
import re

import jsonschema
import pytest
from clip_requests import LONG, SMALL
from hypothesis import given
from hypothesis import strategies as st
from micro_stiv import micro_pipeline

from lumos.demo.limits import Limits
from lumos.errors import UserError
from lumos.pipeline.options import CHOICE, Option, all_options

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
pytest.importorskip("fastapi.testclient")

from clip_status import ended

from lumos.demo.metrics import Metrics
from lumos.demo.schema import option_schema, request_schema


def test_the_schema_names_the_statuses_of_errors(client):
    paths = client.get("/api/openapi.json").json()["paths"]
    for path, method, statuses in (
        ("/api/generate", "post", "400 401 403 413 429 500"), ("/api/results/{name}", "get", "304 401 404 416"),
        ("/api/clips/{clip_id}/content", "get", "401 404 409 410 416"), ("/health", "get", "503"), ("/metrics", "get", "401"),
        ("/api/clips", "post", "400 401 403 413 415 422 429 500"),
    ):  # fmt: skip
        assert set(statuses.split()) <= paths[path][method]["responses"].keys(), path


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
