"""Answers of the routes of the HTTP API: files, and errors as JSON."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lumos.demo.limits import ServerBusy, TooLarge
from lumos.demo.schema import ERROR
from lumos.demo.store import Store
from lumos.demo.worker import ClipJob
from lumos.errors import UserError, shown

POLL_SECONDS = 0.1
KEEP = {"Cache-Control": "private, max-age=31536000, immutable"}
"""The header of a result. Its name is of it alone, so that a browser need never ask for it again."""
FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the file", "content": {"video/mp4": {}, "image/png": {}, "application/json": {}}},
    206: {"description": "the part of the file that the header Range names"},
    304: {"description": "the client has the file: If-None-Match names its ETag, or it is not newer than If-Modified-Since"},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of errors for OpenAPI."""
    meanings = {
        400: "the body is no JSON, or a value of a form is not allowed", 401: "the key is missing or unknown",
        403: "not allowed here", 404: "there is no such clip",
        409: "the state of the clip does not allow it", 410: "the file was removed to make room", 413: "the request is too large",
        416: "the file has no byte of the header Range", 500: "the server failed",
        415: "the body is of another type", 422: "a value is not allowed", 429: "the queue or the client's limits are full",
    }  # fmt: skip
    return {status: {"description": meanings[status], "content": {"application/json": {"schema": ERROR}}} for status in statuses}


class Delivery(FileResponse):
    """A response that sends a result, or the record of a result, and keeps both from being removed meanwhile."""

    def __init__(self, store: Store, path: Path, **options: Any):
        super().__init__(path, **options)
        self.store, self.name = store, path.name.removesuffix(".json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.store.delivering(self.name):
            try:
                stat = Path(self.path).stat()
            except FileNotFoundError:  # the store has removed the result between the look-up and this moment
                await failure(no_result(self.name))(scope, receive, send)
                return
            self.set_stat_headers(stat)
            if is_known(scope, self.headers["etag"], int(stat.st_mtime)):
                kept = {name: self.headers[name] for name in ("cache-control", "etag", "last-modified") if name in self.headers}
                await Response(status_code=304, headers=kept)(scope, receive, send)
                return
            size = stat.st_size
            parts = ranges(scope, size)
            if parts == []:
                found = HTTPException(416, f"the file has {size} bytes, and Range names none", {"Content-Range": f"bytes */{size}"})
                await failure(found)(scope, receive, send)
                return
            others = [(name, value) for name, value in scope["headers"] if name != b"range"]
            asked = [] if parts is None else [(b"range", f"bytes={','.join(parts)}".encode())]
            await super().__call__({**scope, "headers": [*others, *asked]}, receive, send)


def is_known(scope: Scope, etag: str, modified: int) -> bool:
    """Return whether a request says that the client has the file of this ETag and time of change, in seconds since 1970.

    The header If-None-Match names the ETag, or any. Without it, If-Modified-Since counts (RFC 9110, 13.1.2 and 13.1.3).
    """
    if scope["method"] not in ("GET", "HEAD"):
        return False
    text = b",".join(value for name, value in scope["headers"] if name == b"if-none-match").decode("latin-1")
    if not text:
        try:
            since = parsedate_to_datetime(dict(scope["headers"])[b"if-modified-since"].decode("latin-1"))
            return modified <= since.timestamp()
        except (KeyError, ValueError, OverflowError):  # no such header, or no date
            return False
    return text.strip() == "*" or etag in (part.strip().removeprefix("W/") for part in text.split(","))


RANGE = re.compile(r"(\d{0,100})-(\d{0,100})", re.ASCII)
"""A range of bytes. Longer numbers make it one of another form: Python refuses to read numbers of thousands of digits."""


def ranges(scope: Scope, size: int) -> list[str] | None:
    """Return those ranges of the header Range that a file of `size` bytes has.

    None if the whole file is the answer (RFC 9110, 14.2): without the header, if its unit or form is not known, and for HEAD.
    """
    unit, _, text = dict(scope["headers"]).get(b"range", b"").decode("latin-1").partition("=")
    if unit.strip().lower() != "bytes" or scope["method"] != "GET":
        return None
    found = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        first, last = match.groups() if match else ("", "")
        if not (first or last) or (first and last and int(first) > int(last)):
            return None
        if int(first) < size if first else int(last) > 0:
            found.append(match[0])
    return found


def no_result(name: str) -> HTTPException:
    return HTTPException(404, f"there is no result {shown(name)}; old results are removed to make room for new ones")


def failure(error: Exception) -> JSONResponse:
    """Return {"error": message}: a status from 400 on for the client's errors, 500 for the server's.

    Status 429 has the header Retry-After, in seconds.
    """
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, RequestValidationError):  # a wrong value in the query
        wrong = error.errors()[0]
        return JSONResponse({"error": f"{wrong['loc'][-1]}: {wrong['msg']}"}, 422)
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, ServerBusy) else None
    statuses = ((TooLarge, 413), (ServerBusy, 429), (UserError, 400))
    status = next((status for kind, status in statuses if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, status, headers)


async def watch(job: ClipJob) -> AsyncIterator[None]:
    """Yield every POLL_SECONDS while the job runs, and once more when it has ended."""
    while not job.ended:
        yield
        await asyncio.sleep(POLL_SECONDS)
    yield
