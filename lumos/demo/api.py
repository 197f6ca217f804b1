"""The routes of the HTTP API that answer with a result, and what all routes share.

`POST /api/generate` takes a form and answers with the mp4 or png file when it is made. The routes
for clips by id are in `lumos.demo.clips_api`. The API has the same limits and the same queue as the
page. Errors are JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from lumos.demo.answers import FILE, KEEP, Delivery, errors, failure, no_result, watch
from lumos.demo.clips import Clips
from lumos.demo.clips_api import add_clips
from lumos.demo.keys import Key, Keys
from lumos.demo.limits import ServerBusy
from lumos.demo.metrics import CONTENT_TYPE as METRICS_TYPE
from lumos.demo.service import FILES, Service
from lumos.demo.store import Store
from lumos.demo.worker import ClipJob
from lumos.errors import RunError, UserError, instead, shown
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.options import FLAG, WHOLE, parsed_flag
from lumos.pipeline.request import Request as ClipRequest
from lumos.pipeline.request import needs_words
from lumos.prompt_lists.clips import record_path
from lumos.version import __version__

FIELDS: dict[str, Callable[[str], Any]] = {
    "prompt": str, "negative_prompt": str, "num_frames": int, "height": int, "width": int, "fps": int, "seed": int,
}  # fmt: skip
"""The form fields that are neither files nor sampling options, each with the function that parses it."""
OF_SOME_MODELS: dict[str, Callable[[str], Any]] = {"interpolate": int, "views": parsed_flag}
"""Further fields, which exist if the generator of the model takes them."""


def add_api(app: FastAPI, service: Service, keys: Keys | None = None, *, open_lists: bool = True) -> None:
    """Add the routes of the API and of metrics to an app.

    keys: the clients that may use them; by default everyone may. open_lists: on a server without
    keys, list the clips of all clients.
    """
    keys = keys or Keys()

    def client_of(
        request: Request, token: Annotated[Any, Depends(HTTPBearer(auto_error=False, description="a key of the server"))]
    ) -> Key:
        return keys.client(request.headers.get("authorization"))

    api = APIRouter(dependencies=[Depends(client_of)] if keys.keys else [])
    add_clips(api, Clips(service), keys, open_lists=open_lists or bool(keys.keys))

    @api.post("/api/generate", tags=["forms"], summary="Make a clip from a form, and answer with its file",
              responses={**FILE, **errors(400, 401, 403, 413, 429, 500)})  # fmt: skip
    async def generate(request: Request) -> Response:
        client = keys.client(request.headers.get("authorization"))
        form = await read_form(request, service.pipe)
        async with request_from_form(form, service.store, service.pipe) as wanted:
            job = ClipJob(wanted, owner=client.name) if client.name else ClipJob(wanted)
            service.check(job)
            with keys.counted(client, 1):
                service.worker.submit(job, most=client.queue_length)
            try:
                async for _ in watch(job):
                    if await request.is_disconnected():
                        break
            finally:
                service.worker.cancel(job)
        if job.error is not None:
            raise job.error
        if job.record is None:
            raise ServerBusy("the request was cancelled")
        name = job.record["file"]
        address = quote(record_path(Path(name)).name)  # headers and addresses are ASCII
        headers = {"X-Lumos-Seed": str(job.record["seed"]), "X-Lumos-Record": f"results/{address}"}
        return Delivery(service.store, service.store.results / name, headers=headers, filename=name)

    @api.get("/api/status", tags=["server"], summary="State, defaults and limits of the server", responses=errors(401))
    async def status() -> dict[str, Any]:
        return {**service.worker.status(), "defaults": service.defaults, "limits": vars(service.limits)}

    of_result = {"tags": ["clips"], "responses": {**FILE, **errors(401, 404, 416)}}

    @api.head("/api/results/{name}", operation_id="result_head", summary="The size of a result", **of_result)
    @api.get("/api/results/{name}", summary="A result, or its record", **of_result)
    async def result(name: str) -> Response:
        path = service.store.find(name)
        if path is None:
            raise no_result(name)
        return Delivery(service.store, path, headers=KEEP)

    @api.get("/metrics", tags=["server"], summary="Metrics in the text format of Prometheus", response_class=PlainTextResponse,
             responses=errors(401))  # fmt: skip
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=METRICS_TYPE)

    @app.head("/health", include_in_schema=False)  # load balancers ask so
    @app.get("/health", tags=["server"], summary="Whether the server takes requests; needs no key",
             responses={503: {"description": "the server closes"}})  # fmt: skip
    async def health() -> JSONResponse:
        is_alive = service.worker.is_alive
        return JSONResponse({"status": "ok" if is_alive else "closing", "lumos": __version__}, 200 if is_alive else 503)

    app.include_router(api)

    every = ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS"]

    @app.api_route("/api/{rest:path}", methods=every, include_in_schema=False)
    async def unknown(request: Request) -> Response:
        known = [route for route in api.routes if route.matches(request.scope)[0] != Match.NONE]
        if methods := {method for route in known for method in route.methods}:
            allowed = ", ".join(sorted(methods))
            raise HTTPException(405, f"{request.method} is not possible here; send {allowed}", {"Allow": allowed})
        raise HTTPException(404, "unknown; GET /api/openapi.json lists what there is, POST /api/clips and /api/generate make clips")

    for kind in (UserError, RunError, HTTPException, ClientDisconnect, RequestValidationError):
        app.add_exception_handler(kind, lambda request, error: failure(error))


def add_uploads(app: FastAPI, service: Service) -> None:
    """Add the routes of gradio's uploads, which the page needs, to an app."""

    @app.post("/gradio_api/upload", include_in_schema=False)
    async def upload(request: Request) -> Response:
        """Store one file in a folder of its own and return its name.

        This route replaces gradio's own, which would answer with the path of the file on the
        server.
        """
        if request.headers.get("content-type", "").partition(";")[0] != "multipart/form-data":
            raise UserError("the request is no upload; send a multipart form with a file")
        async with request.form(max_files=1, max_fields=1) as form:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise UserError("there is no file in the request; send one as 'files'")
            path = await stored(file, "file", service.store)
        return JSONResponse([service.store.keep(path)])

    @app.get("/gradio_api/upload_progress", include_in_schema=False)
    async def upload_progress() -> Response:
        return Response(status_code=204)  # the page then shows no progress of an upload


def parsers(pipe: VideoPipeline) -> dict[str, Callable[[str], Any]]:
    """Return the function that parses each field that is no file, by its name: for this pipeline's generator."""
    more = {name: parse for name, parse in OF_SOME_MODELS.items() if name in pipe.takes}
    return FIELDS | more | {name: option.parse for name, option in pipe.sampling.declared().items()}


def files_of(pipe: VideoPipeline) -> list[str]:
    """Return the names of the fields that are files."""
    return [name for name in FILES if name != "last_image" or name in pipe.takes]


async def read_form(request: Request, pipe: VideoPipeline) -> dict[str, str | UploadFile]:
    """Return the fields of a form by name.

    pipe: its generator decides which fields there are. UserError if the request is not a form, and
    for a field that is unknown or given twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise UserError(f"the request's content type is {kind!r}; send a form (curl -F prompt=...)")
    files = files_of(pipe)
    known = (*parsers(pipe), *files)
    form = await request.form(max_files=len(files), max_fields=len(known))
    given = form.multi_items()
    if unknown := [name for name, _ in given if name not in known]:
        raise UserError(f"unknown field {shown(unknown[0])}{instead(unknown[0], known, 'known are')}")
    if len(dict(given)) < len(given):
        raise UserError("a field is given twice; give each once")
    return dict(given)


@contextlib.asynccontextmanager
async def request_from_form(
    form: dict[str, str | UploadFile], store: Store, pipe: VideoPipeline
) -> AsyncIterator[ClipRequest]:
    """Yield the request that a form describes.

    Its uploaded files exist until the end of the `with` block.
    """
    values: dict[str, Any] = {name: field_value(name, value, pipe) for name, value in form.items() if name not in FILES}
    if "prompt" not in values:
        if needs_words(values.get("interpolate"), values.get("views")):
            raise UserError("prompt is missing; say in words what the clip shows")
        values["prompt"] = ""
    folders: list[Path] = []
    try:
        for name in set(form) & set(FILES):
            upload = form[name]
            if isinstance(upload, str):
                raise UserError(f"{name} is text; send a file (curl -F {name}=@FILE)")
            values[name] = await stored(upload, name, store)
            folders.append(values[name].parent)
            await upload.close()  # removes starlette's copy: only the copy in the store counts against the limit
        yield ClipRequest.of(**values)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


async def stored(upload: UploadFile, what: str, store: Store) -> Path:
    """Write an uploaded file into the store and return its path.

    RunError if the file cannot be written. The message does not name the path, which is private to
    the server.
    """
    path = None
    try:
        path = store.new_upload(upload.filename or what)
        with path.open("wb") as file:
            await asyncio.to_thread(shutil.copyfileobj, upload.file, file)
    except BaseException as error:
        if path is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise RunError(f"the server cannot keep the {what} ({error.strerror}); try again later") from error
    return path


def field_value(name: str, value: str | UploadFile, pipe: VideoPipeline) -> Any:
    """Return the value of a field, parsed from its text; UserError if the text cannot be parsed."""
    if not isinstance(value, str):
        raise UserError(f"{name} is a file; send it as text")
    option = pipe.sampling.declared().get(name)
    kind = option.kind if option else FLAG if name == "views" else WHOLE
    try:
        return parsers(pipe)[name](value)
    except ValueError:
        raise UserError(f"{name} {value[:40]!r} is not allowed; give {kind}") from None
