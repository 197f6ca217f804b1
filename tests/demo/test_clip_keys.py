"""Keys of the HTTP API: who sees which clips, and the limits of a key."""

from __future__ import annotations

import time

import jsonschema
import pytest
from clip_requests import ALICE, BOB, LONG, SMALL, bearer, client_of
from hypothesis import given
from hypothesis import strategies as st

from lumos.cli import main
from lumos.demo.limits import ServerBusy
from lumos.errors import UserError

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
pytest.importorskip("fastapi.testclient")

from clip_status import ended

from lumos.demo.keys import HOUR, Key, Keys
from lumos.demo.schema import ERROR


def test_every_route_but_health_needs_a_key(keyed):
    for path in ("/api/clips", "/api/clips/x", "/api/clips/x/content", "/api/clips/x/events", "/api/status", "/api/results/x-1.mp4",
                 "/metrics"):  # fmt: skip
        for headers in ({}, bearer("wrong-0123456789abc"), {"Authorization": f"Basic {ALICE}"}, bearer("")):
            answer = keyed.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            is_other_key = headers == bearer("wrong-0123456789abc")
            assert answer.json()["error"].startswith("the key is unknown" if is_other_key else "a key is needed")
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


def test_the_limits_of_a_key(keyed, monkeypatch):
    first = keyed.post("/api/clips", json=LONG, headers=bearer(BOB)).json()
    keyed.post("/api/clips", json=LONG, headers=bearer(BOB))
    answer = keyed.post("/api/clips", json=SMALL, headers=bearer(BOB))
    assert (answer.status_code, "you have 2 clips that wait or are being made" in answer.json()["error"]) == (429, True)
    assert keyed.post("/api/clips", json=SMALL, headers=bearer(ALICE)).status_code == 202  # the others are not concerned
    keyed.post(f"/api/clips/{first['id']}/cancel", headers=bearer(BOB))
    deadline = time.monotonic() + 600
    while keyed.get(f"/api/clips/{first['id']}", headers=bearer(BOB)).json()["status"] != "cancelled":
        assert time.monotonic() < deadline
    assert keyed.post("/api/clips", json=LONG, headers=bearer(BOB)).status_code == 202
    answer = keyed.post("/api/clips", json=SMALL, headers=bearer(BOB))
    assert (answer.status_code, "3 clips in an hour" in answer.json()["error"]) == (429, True)
    assert 3500 < int(answer.headers["retry-after"]) <= HOUR
    for count, said in ((4, "more than this key may have in an hour"), (3, "more than you may have at a time (2); ask for fewer")):
        with monkeypatch.context() as patch:
            patch.setattr("lumos.demo.keys.HOUR", 0)  # else the clips of this hour are told first
            answer = keyed.post("/api/clips", json=[SMALL] * count, headers=bearer(BOB))
        assert (answer.status_code, said in answer.json()["error"]) == (422, True)  # not 429: they would never fit


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
