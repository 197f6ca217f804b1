"""The routes for clips by id: ask for clips, follow them, have their content, list, cancel and remove them.

Requests and answers are JSON; `lumos.demo.schema` describes both.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from lumos.demo.answers import FILE, KEEP, Delivery, errors, watch
from lumos.demo.clips import Clips, bodies_of
from lumos.demo.keys import Key, Keys
from lumos.demo.limits import TooLarge
from lumos.demo.schema import CLIP, CLIPS
from lumos.demo.worker import ClipJob
from lumos.errors import UserError
from lumos.files import parse_json
from lumos.wording import text_of

HEARTBEAT_SECONDS = 15  # an event stream that has nothing to tell sends a comment, so that proxies keep it open
LONGEST_PAGE = 100


def add_clips(api: APIRouter, clips: Clips, keys: Keys, *, open_lists: bool) -> None:
    """Add the routes to a router. open_lists: whether clients may list clips."""

    def client_of(request: Request) -> Key:
        return keys.client(request.headers.get("authorization"))

    def job_of(clip_id: str, request: Request) -> ClipJob:
        return clips.find(clip_id, client_of(request))

    one_or_more = {"oneOf": [clips.schema, {"type": "array", "items": clips.schema, "minItems": 1}]}
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": one_or_more}}}}

    @api.post("/api/clips", status_code=202, tags=["clips"], summary="Ask for a clip, or for a list of clips, all or none",
              openapi_extra=body,
              responses={**told({"oneOf": [CLIP, CLIPS]}, 202), **errors(400, 401, 403, 413, 415, 422, 429, 500)})  # fmt: skip
    async def create(request: Request) -> Response:
        client, document = client_of(request), await read_json_body(request)
        bodies, is_list = bodies_of(document)
        with as_unprocessable():
            jobs = await asyncio.to_thread(clips.add, bodies, client, keys)
        if is_list:
            return JSONResponse({"clips": [clips.told(job) for job in jobs], "next": None}, 202)
        return JSONResponse(clips.told(jobs[0]), 202, {"Location": f"/api/clips/{jobs[0].id}"})

    @api.get("/api/clips", tags=["clips"], summary="The clips of this client, the newest first",
             responses={**told(CLIPS), **errors(401, 403, 404, 422)})  # fmt: skip
    async def listed(
        request: Request, limit: Annotated[int, Query(ge=1, le=LONGEST_PAGE)] = 20, before: str | None = None
    ) -> JSONResponse:
        if not open_lists:
            raise HTTPException(403, "a server that others can reach lists clips only for its keys; start it with --api-keys")
        return JSONResponse(clips.page(client_of(request), limit, before))

    @api.get("/api/clips/{clip_id}", tags=["clips"], summary="The status of a clip", responses={**told(CLIP), **errors(401, 404)})
    async def status(clip_id: str, request: Request) -> JSONResponse:
        return JSONResponse(clips.told(job_of(clip_id, request)))

    @api.get("/api/clips/{clip_id}/events", tags=["clips"], summary="The status of a clip at each change, as server-sent events",
             responses={200: {"description": "events named as the status, each with the clip as data, until the clip has ended",
                              "content": {"text/event-stream": {}}},
                        204: {"description": "the header Last-Event-ID says that the client has the last event"},
                        **errors(401, 404)})  # fmt: skip
    async def events(clip_id: str, request: Request) -> Response:
        job = job_of(clip_id, request)
        if job.ended and request.headers.get("last-event-id") == job.state:
            return Response(status_code=204)  # an EventSource of a browser connects again until it gets this
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # no cache, and no proxy that collects events
        return StreamingResponse(stream(clips, job), media_type="text/event-stream", headers=headers)

    of_content = {"tags": ["clips"], "responses": {**FILE, **errors(401, 404, 409, 410, 416)}}

    @api.head("/api/clips/{clip_id}/content", operation_id="content_head", summary="The size of that file", **of_content)
    @api.get("/api/clips/{clip_id}/content", summary="The mp4 or png file of a clip", **of_content)
    async def content(clip_id: str, request: Request) -> Response:
        return Delivery(clips.service.store, clips.result(job_of(clip_id, request)), headers=KEEP)

    @api.post("/api/clips/{clip_id}/cancel", tags=["clips"], summary="Stop a clip after its current step",
              responses={**told(CLIP), **errors(401, 403, 404, 409)})  # fmt: skip
    async def cancel(clip_id: str, request: Request) -> JSONResponse:
        clips.cancel(job := job_of(clip_id, request))
        return JSONResponse(clips.told(job))

    @api.delete("/api/clips/{clip_id}", status_code=204, tags=["clips"], summary="Stop a clip and remove its files",
                responses=errors(401, 403, 404))  # fmt: skip
    async def remove(clip_id: str, request: Request) -> Response:
        clips.remove(job_of(clip_id, request))
        return Response(status_code=204)


def told(schema: dict[str, Any], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Return the description of a JSON answer for OpenAPI."""
    return {status: {"description": "as the schema says", "content": {"application/json": {"schema": schema}}}}


async def read_json_body(request: Request) -> Any:
    """Return the JSON value of a request's body; HTTPException with status 400 or 415 if it is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the request's content type is {kind!r}; send application/json here, or a form to /api/generate")
    try:
        return parse_json(text_of(await request.body()), "the body")
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error


@contextmanager
def as_unprocessable() -> Iterator[None]:
    """Turn a UserError, but not TooLarge, into status 422."""
    try:
        yield
    except TooLarge:
        raise
    except UserError as error:
        raise HTTPException(422, str(error)) from error


async def stream(clips: Clips, job: ClipJob) -> AsyncIterator[str]:
    """Yield the status of a job as server-sent events, at the begin and at each change, until the job has ended."""
    last, at = "", time.monotonic()
    async for _ in watch(job):
        found = clips.told(job)
        data = json.dumps(found, ensure_ascii=False)
        if data != last:
            last, at = data, time.monotonic()
            yield f"event: {found['status']}\ndata: {data}\nid: {found['status']}\n\n"
        elif time.monotonic() - at > HEARTBEAT_SECONDS:
            at = time.monotonic()
            yield ": still here\n\n"
