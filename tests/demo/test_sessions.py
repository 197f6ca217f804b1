"""Sessions of the page: their messages are checked, and their memory is freed."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from lumos.demo.limits import Limits, ServerBusy
from lumos.demo.store import Store
from lumos.errors import UserError

gr = pytest.importorskip("gradio", reason="the page needs the extra [demo]")
module = pytest.importorskip("lumos.demo.sessions")


@pytest.fixture
def sessions(tmp_path):
    """Sessions of a page with a button that takes a text, a number and a file, and a button without a queue; without an app."""

    async def clean_events(session_hash):
        queue.cleaned.append(session_hash)

    inputs = [gr.Textbox(label="Prompt"), gr.Slider(1, 9, label="Frames"), gr.File(), gr.State([])]
    fns = {3: SimpleNamespace(queue=True, inputs=inputs), 4: SimpleNamespace(queue=False, inputs=[])}
    queue = SimpleNamespace(
        pending_messages_per_session={}, pending_event_ids_session={}, clean_events=clean_events, cleaned=[]
    )
    states = SimpleNamespace(session_data={}, time_last_used={})
    worker = SimpleNamespace(cancelled=[])
    worker.cancel_of = worker.cancelled.append
    page = SimpleNamespace(fns=fns, _queue=queue, state_holder=states)
    return module.Sessions(None, page, SimpleNamespace(store=Store(tmp_path, Limits()), worker=worker))


GOOD = {"fn_index": 3, "session_hash": "abc", "data": ["a circle", 5, None, None]}


def check(sessions, queued=True, **change):
    return sessions.checked(json.dumps({**GOOD, **change}).encode(), queued)


def test_only_allowed_fields_of_a_message_are_passed_on(sessions):
    passed = check(sessions, trigger_id=7, batched=True, simple_format=True, oauth_token="x", event_id="y", event_data={"a": 1})
    assert passed == {**GOOD, "trigger_id": 7}
    assert check(sessions, queued=False, fn_index=4, data=[])["fn_index"] == 4


@pytest.mark.parametrize(("change", "message"), [
    *(({"fn_index": n}, "fn_index .* is not allowed here") for n in (4, 99, -1, None, "3", 3.0, True, [3], {}, 10**30)),
    *(({"session_hash": s}, "session_hash .* is not allowed") for s in (None, "", "a/b", "x" * 65, 3, {}, "a\n")),
    *(({"data": d}, "data is not a list of 4") for d in (None, {}, [], [1] * 5, "abcd")),
    ({"data": [{"a": 1}, 5, None, None]}, "Prompt: .* is not allowed"),
    ({"data": [["x"], 5, None, None]}, "Prompt: .* is not allowed"),
    ({"data": ["x", "many", None, None]}, "Frames: 'many' is not allowed"),
    ({"data": ["x", 10, None, None]}, "Frames: 10 is not allowed"),
    ({"data": ["x", float("nan"), None, None]}, "Frames: nan is not allowed"),
    ({"data": ["x", 5, "/etc/passwd", None]}, "is not allowed"),
    ({"data": ["x", 5, [{"path": "/etc/passwd"}], None]}, "is not allowed"),
])  # fmt: skip
def test_other_messages_are_refused(sessions, change, message):
    with pytest.raises(UserError, match=message):
        check(sessions, **change)


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000, b"{", b"3"])
def test_a_malformed_message_is_refused(sessions, body):
    with pytest.raises(UserError):
        sessions.checked(body, True)


def test_an_upload_has_a_name_outside_and_a_path_inside(sessions):
    store = sessions.service.store
    path = store.new_upload("a.png")
    path.write_bytes(b"x")
    name = store.keep(path)
    assert str(store.uploads) not in name
    assert check(sessions, data=["x", 5, {"path": name}, None])["data"][2]["path"] == str(path)
    for other in ("/etc/passwd", "https://example.com/x", "../x", str(store.uploads / "x"), "x\x00"):
        assert check(sessions, data=["x", 5, {"path": other}, None])["data"][2]["path"] == str(store.uploads / "none")


def test_a_session_that_has_gone_holds_nothing(sessions, monkeypatch):
    monkeypatch.setattr(module, "ALONE_SECONDS", 0)
    path = sessions.service.store.new_upload("a.png")
    path.write_bytes(b"x")
    page = sessions.page
    check(sessions, data=["x", 5, {"path": sessions.service.store.keep(path)}, None])
    held = [page._queue.pending_messages_per_session, page._queue.pending_event_ids_session, page.state_holder.session_data,
            page.state_holder.time_last_used]  # fmt: skip
    for each in held:
        each["abc"] = object()

    async def scenario():
        sessions.pages["abc"] = 1
        sessions._touch("abc", 0)
        await asyncio.sleep(0.05)
        assert path.exists()  # its page is open
        del sessions.pages["abc"]
        sessions._touch("abc", 0)
        while path.exists() or sessions.ending:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert held == [{}, {}, {}, {}]
    assert (sessions.ends, sessions.uploads) == ({}, {})
    assert "abc" in sessions.service.worker.cancelled


def test_the_number_of_sessions_is_limited(sessions, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)

    async def scenario():
        for name in "aba":
            sessions._touch(name)
        with pytest.raises(ServerBusy, match="2 visitors are here already"):
            sessions._touch("c")
        for timer in sessions.ends.values():
            timer.cancel()

    asyncio.run(scenario())
