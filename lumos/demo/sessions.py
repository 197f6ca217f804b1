"""Sessions of the page: their messages are checked before gradio sees them, and their memory is freed when they end."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.server_messages import HeartbeatMessage
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumos.demo.answers import failure
from lumos.demo.limits import ServerBusy
from lumos.demo.service import Service
from lumos.errors import UserError, shown
from lumos.files import parse_json

JOIN, RUN, DATA, HEARTBEAT = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/queue/data", "/gradio_api/heartbeat"
SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)
ALONE_SECONDS = 30  # a session without a connection ends after this time; it ends at once when its page is closed
MOST = 500  # sessions at a time; gradio holds about 110 kB for each


class Sessions:
    """An ASGI app around the page.

    A session begins with its first message or connection and ends with its last connection.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, service: Service):
        self.app, self.page, self.service = app, page, service
        self.pages: Counter[str] = Counter()  # open heartbeat connections of each session, one for each open page
        self.streams: set[str] = set()  # sessions with an open event stream
        self.ends: dict[str, asyncio.TimerHandle] = {}
        self.uploads: dict[str, set[Path]] = {}
        self.ending: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        try:
            if path in (JOIN, RUN) and scope["method"] == "POST":
                await self._message(path == JOIN, scope, receive, send)
            elif path == DATA:
                await self._stream(scope, receive, send)
            elif path.startswith(HEARTBEAT):
                await self._heartbeat(path.rpartition("/")[2], scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except (UserError, ServerBusy, HTTPException) as error:  # raised by this class; gradio answers its own errors itself
            await failure(error)(scope, receive, send)

    async def _message(self, queued: bool, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        checked = self.checked(body, queued)
        self._touch(checked["session_hash"])
        rest = [{"type": "http.request", "body": json.dumps(checked).encode(), "more_body": False}]

        async def replaced() -> Message:
            return rest.pop() if rest else await receive()

        await self.app({**scope, "headers": [(b"content-type", b"application/json"), *self._headers(scope)]}, replaced, send)

    @staticmethod
    def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
        return [pair for pair in scope["headers"] if pair[0] not in (b"content-type", b"content-length", b"transfer-encoding")]

    def checked(self, body: bytes, queued: bool) -> dict[str, Any]:
        """Return a message of the page, checked, with paths of uploads in place of their names.

        queued: whether the message came to the queue's route. Only the known keys are kept.
        UserError for a message that this page cannot send.
        """
        try:
            message = parse_json(body.decode(), "the message")
        except UnicodeDecodeError as error:
            raise UserError("the message is not UTF-8") from error
        if not isinstance(message, dict):
            raise UserError("the message is not a JSON object")
        number, session, data = (message.get(name) for name in ("fn_index", "session_hash", "data"))
        fn = self.page.fns.get(number) if type(number) is int else None
        if fn is None or bool(fn.queue) is not queued:
            raise UserError(f"fn_index {shown(number, 40)} is not allowed here; load the page again")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise UserError(f"session_hash {shown(session, 40)} is not allowed; give up to 64 letters, digits, - and _")
        if not isinstance(data, list) or len(data) != len(fn.inputs):
            raise UserError(f"data is not a list of {len(fn.inputs)} entries; load the page again")
        trigger = message.get("trigger_id")
        return {
            "fn_index": number, "session_hash": session, "trigger_id": trigger if type(trigger) is int else None,
            "data": [self._value(block, value, session) for block, value in zip(fn.inputs, data, strict=True)],
        }  # fmt: skip

    def _value(self, block: Any, value: Any, session: str) -> Any:
        if isinstance(block, gr.State):  # gradio keeps this value on the server
            return None
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            path = self.service.store.upload(value["path"]) if isinstance(block, gr.File) else None
            if path is not None:
                self.uploads.setdefault(session, set()).add(path)
            # For a file that does not exist, pass on a path that does not exist either: the page then shows its message.
            return {"path": str(path or self.service.store.uploads / "none"), "meta": {"_type": "gradio.FileData"}}
        if isinstance(block, gr.File) and value is None:
            return None
        try:
            if isinstance(value, dict | list) or isinstance(block, gr.File):
                raise ValueError
            block.preprocess(value)
            json.dumps(value, allow_nan=False)
        except Exception:  # components raise various errors for a value of the wrong type
            name = getattr(block, "label", None) or type(block).__name__
            raise UserError(f"{name}: {shown(value, 40)} is not allowed") from None
        return value

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the event stream of a session, which reports the progress of its messages.

        gradio leaves a task behind when such a request is cancelled in the middle of an event. So
        the disconnection of the client is passed on between two events.
        """
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        waiting = self.page._queue.pending_messages_per_session
        if session not in waiting:
            raise HTTPException(404, "this session waits for nothing")
        if session in self.streams:
            raise HTTPException(409, "this session is listened to already")
        gone = asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if session in waiting:
                waiting[session].put_nowait(HeartbeatMessage())

        async def told() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        self.streams.add(session)
        self._stay(session)
        watching = asyncio.create_task(watch())
        try:
            # From ASGI 2.4 on, starlette leaves it to the app to notice that the client has disconnected.
            await self.app({**scope, "asgi": {**scope["asgi"], "spec_version": "2.4"}}, told, send)
        finally:
            watching.cancel()
            self.streams.discard(session)
            self._touch(session)

    async def _heartbeat(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the heartbeat connection of a session, which lasts as long as its page is open."""
        if not SESSION.fullmatch(session):
            raise HTTPException(404, "there is no such session")
        self._stay(session)
        self.pages[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.pages[session] -= 1
            self.pages += Counter()  # without zeros
            if not self.pages[session]:
                self.service.worker.cancel_of(session)
                self._touch(session, 0)

    def _stay(self, session: str) -> None:
        """Stop the timer that would end the session; ServerBusy if the session is new and there are too many."""
        known = self.streams | self.pages.keys() | self.ends.keys()
        if session not in known and len(known) >= MOST:
            raise ServerBusy(f"{MOST} visitors are here already; try again later")
        if (timer := self.ends.pop(session, None)) is not None:
            timer.cancel()

    def _touch(self, session: str, seconds: float = ALONE_SECONDS) -> None:
        """End the session after `seconds`, unless it has an open connection now or gets one before that."""
        if session in self.streams or self.pages[session]:
            return
        self._stay(session)
        self.ends[session] = asyncio.get_running_loop().call_later(seconds, self._end, session)

    def _end(self, session: str) -> None:
        self.ends.pop(session, None)
        task = asyncio.create_task(self._forget(session))
        self.ending.add(task)
        task.add_done_callback(self.ending.discard)

    async def _forget(self, session: str) -> None:
        """Cancel the jobs of a session and free the memory and the uploads that it holds here and in gradio."""
        self.service.worker.cancel_of(session)
        queue, states = self.page._queue, self.page.state_holder
        await queue.clean_events(session_hash=session)
        messages, events = queue.pending_messages_per_session, queue.pending_event_ids_session
        for held in (messages, events, states.session_data, states.time_last_used):
            held.pop(session, None)
        for path in self.uploads.pop(session, ()):
            await asyncio.to_thread(self.service.store.leave, path)
