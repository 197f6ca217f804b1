"""The middleware in front of the page and the API.

It checks the Host header, the path and the origin of each request, limits the size of its body and
reserves room for uploads.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumos.demo.answers import failure
from lumos.demo.hosts import Hosts
from lumos.demo.limits import FORM_BYTES, Limits, ServerBusy, TooLarge
from lumos.demo.metrics import Metrics
from lumos.demo.store import Reservation, Store

OPEN = re.compile(
    r"/(api/.*|health|metrics|assets/.*|static/.*|svelte/.*|config|theme\.css|favicon\.ico|manifest\.json)?"
    r"|/gradio_api/(queue/(join|data)|run/predict|upload|upload_progress|heartbeat/[^/]*|startup-events|cancel|reset)/?"
)
"""The paths that the page and the API use. gradio has other routes, one of which reads files by their path; they are closed."""
UPLOADS = re.compile(r"/gradio_api/upload/?|/api/generate|/api/clips")
IN_JSON = "/api/clips"  # the path to which uploads come as base64, of four characters for three bytes
RESERVED_AT_ONCE = 2**20  # bytes, for a body that does not state its length
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",  # for browsers that do not know the line above
}


def is_foreign(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a browser sent the request on behalf of a page of another origin.

    Browsers send Sec-Fetch-Site only over https and to this machine itself, so the Origin header is
    compared otherwise. Behind a proxy with a name of its own, the name that the browser knows is in
    X-Forwarded-Host. No page can set that header.
    """
    if (site := headers.get(b"sec-fetch-site")) in (b"cross-site", b"same-origin", b"none"):
        return site == b"cross-site"
    here = {headers.get(b"host"), headers.get(b"x-forwarded-host")}
    return b"origin" in headers and headers[b"origin"].partition(b"://")[2] not in here


class Middleware:
    """An ASGI app that passes allowed requests on to another app, and refuses the others.

    The status of a refusal is 400 for a Host header that is not allowed, 404 for an unknown path,
    403 for a request on behalf of a page of another origin, 413 for a body over the limit, and 429
    for an upload for which there is no room. The size of a body is checked twice: by its stated
    length before it is read, and by its true length while it arrives.
    """

    def __init__(
        self, app: ASGIApp, store: Store, limits: Limits, hosts: Hosts | None = None, metrics: Metrics | None = None
    ):
        self.app, self.store, self.limits, self.hosts, self.metrics = app, store, limits, hosts or Hosts(), metrics
        self.message = f"the request is too large; at most {limits.max_upload_mb:g} MB are allowed: make it smaller"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SAFE_HEADERS)
                if self.metrics is not None:
                    self.metrics.request(scope["method"], message["status"])
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            await failure(refusal)(scope, receive, guarded)
        elif UPLOADS.fullmatch(scope["path"]) and scope["method"] == "POST":
            of_file = self.limits.upload_bytes * 4 // 3 if scope["path"] == IN_JSON else self.limits.upload_bytes
            with self.store.reservation() as reservation:
                await self._bounded(scope, receive, guarded, of_file + FORM_BYTES, reservation)
        else:
            await self._bounded(scope, receive, guarded, FORM_BYTES)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        if not self.hosts.takes(scope):
            return HTTPException(400, "this server is not known by the name in the Host header; --allowed-host adds names")
        if not OPEN.fullmatch(scope["path"]):
            return HTTPException(404, "there is nothing here")
        if scope["method"] not in ("GET", "HEAD") and is_foreign(dict(scope["headers"])):
            return HTTPException(403, "a page of another site sent this; open the demo itself")
        return None

    async def _bounded(
        self, scope: Scope, receive: Receive, send: Send, limit: int, reservation: Reservation | None = None
    ) -> None:
        received, refusal, started = 0, None, False

        async def hold(size: int) -> None:
            if size > limit:
                raise TooLarge(self.message)
            if reservation is not None and size > reservation.size:
                await asyncio.to_thread(reservation.grow, size)

        async def counted() -> Message:
            nonlocal received, refusal
            message = await receive()
            received += len(message.get("body", b""))
            try:
                if received > limit or (reservation is not None and received > reservation.size):
                    await hold(received if received > limit else min(received + RESERVED_AT_ONCE, limit))
            except (TooLarge, ServerBusy) as error:
                refusal = error
                raise
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if refusal is None or started:  # otherwise the message is the app's reaction to the error raised in `counted`
                started = True
                await send(message)

        stated = dict(scope["headers"]).get(b"content-length", b"")
        try:
            await hold(int(stated) if stated.isdigit() and len(stated) < 20 else 0)
            await self.app(scope, counted, answer)
        except (TooLarge, ServerBusy) as error:
            refusal = error
        if refusal is not None and not started:
            await failure(refusal)(scope, receive, send)
