"""Answers of the routes of the HTTP API: files, and errors as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
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
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of errors for OpenAPI."""
    meanings = {
        400: "the body is not JSON", 401: "the key is missing or unknown", 403: "not allowed here", 404: "there is no such clip",
        409: "the state of the clip does not allow it", 410: "the file was removed to make room", 413: "the request is too large",
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
            # The store may have removed the result between the look-up and this moment.
            there = Path(self.path).is_file()
            await (super().__call__(scope, receive, send) if there else failure(no_result(self.name))(scope, receive, send))


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
