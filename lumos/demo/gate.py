"""What stands before the site: only known paths get in, other sites' pages do not, bodies are bounded, and uploads find room."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumos.demo.api import failure
from lumos.demo.limits import Limits, TooLarge
from lumos.demo.store import Store

OPEN = re.compile(
    r"/(api/.*|assets/.*|static/.*|svelte/.*|config|theme\.css|favicon\.ico|manifest\.json)?"
    r"|/gradio_api/(queue/(join|data)|run/predict|upload|upload_progress|heartbeat/.*|startup-events|cancel|reset)/?"
)
"""What page and API use. gradio has more, and among it a way to fetch files by their path: not here."""
UPLOADS = re.compile(r"/gradio_api/upload/?|/api/generate")
FORM_BYTES = 2**20  # of a body besides the file in it


def is_foreign(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a page of another origin made a browser send it. Only https and this machine itself get Sec-Fetch-Site.

    Behind a proxy that has a name of its own, the name that the browser knows is in X-Forwarded-Host, which no page can set.
    """
    if (site := headers.get(b"sec-fetch-site")) in (b"cross-site", b"same-origin", b"none"):
        return site == b"cross-site"
    here = {headers.get(b"host"), headers.get(b"x-forwarded-host")}
    return b"origin" in headers and headers[b"origin"].partition(b"://")[2] not in here


class Gate:
    """404 for other paths; 403 for what a page of another origin makes a browser send; 413 for bodies over the limit, by their
    stated length or once they exceed it on the way.
    """

    def __init__(self, app: ASGIApp, store: Store, limits: Limits):
        self.app, self.store, self.limits = app, store, limits
        self.message = f"the request is too large; at most {limits.max_upload_mb:g} MB are allowed: make it smaller"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not OPEN.fullmatch(scope["path"]):
            await failure(HTTPException(404, "there is nothing here"))(scope, receive, send)
        elif scope["method"] != "GET" and is_foreign(dict(scope["headers"])):
            await failure(HTTPException(403, "a page of another site sent this; open the demo itself"))(scope, receive, send)
        elif UPLOADS.fullmatch(scope["path"]):
            await asyncio.to_thread(self.store.make_room)
            await self._bounded(scope, receive, send, self.limits.upload_bytes + FORM_BYTES)
        else:
            await self._bounded(scope, receive, send, FORM_BYTES)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        refusal = failure(TooLarge(self.message))
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and int(stated) > limit:
            await refusal(scope, receive, send)
            return
        received, refused, started = 0, False, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(self.message)
            return message

        async def answer(message: Message) -> None:
            nonlocal refused, started
            if received <= limit or started:
                started = True
                await send(message)
            elif not refused:  # whatever the app made of it
                refused = True
                await refusal(scope, receive, send)

        try:
            await self.app(scope, counted, answer)
        except TooLarge:
            if not (started or refused):
                await refusal(scope, receive, send)
