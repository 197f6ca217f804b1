"""The web server of `demo` and `serve`: the API under /api, and for `demo` the page at /."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from lumos.demo.api import add_api, add_uploads
from lumos.demo.connections import KEPT_SECONDS, MOST, Connection
from lumos.demo.hosts import Hosts
from lumos.demo.keys import Keys
from lumos.demo.middleware import Middleware
from lumos.demo.reading import prepare_reading
from lumos.demo.service import Service
from lumos.errors import UserError, printable
from lumos.version import __version__

CLOSING_SECONDS = 3  # time for open connections to finish when the server stops


def build_app(
    service: Service, examples: Mapping[str, np.ndarray | None] | None, hosts: Hosts, keys: Keys | None = None
) -> ASGIApp:
    """Return the ASGI app of the whole site.

    examples: prompts for the page, each with the frames of its thumbnail, uint8 [T, H, W, 3], or None;
    no examples at all, None, leave the page out. keys: the clients of the API; by default everyone may use it.
    """
    app = FastAPI(title="Lumos", version=__version__, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    add_api(app, service, keys, open_lists=hosts.is_local)
    whole = without_page(app) if examples is None else with_page(app, service, examples)
    return Middleware(whole, service.store, service.limits, hosts, service.metrics)


def without_page(app: FastAPI) -> FastAPI:
    """Return the app, which says at the other paths what there is."""

    @app.api_route("/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def nothing(rest: str) -> None:
        raise HTTPException(404, "there is no page here; GET /api/openapi.json lists the routes of the API; `lumos demo` has one")

    return app


def with_page(app: FastAPI, service: Service, examples: Mapping[str, np.ndarray | None]) -> ASGIApp:
    """Return an app with the page at /.

    gradio keeps its uploads in the folder of the service. Only the routes of gradio that the page
    needs are reachable.
    """
    import gradio as gr

    from lumos.demo.page import CSS, build_page
    from lumos.demo.sessions import Sessions

    os.environ["GRADIO_TEMP_DIR"] = str(service.store.uploads)
    add_uploads(app, service)
    page = build_page(service, examples)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(body_text_color_subdued="*neutral_600")  # gradio's own, of bounds of sliders, has a contrast of 1.9 to 1
    gr.mount_gradio_app(
        app, page, path="/", theme=theme,
        css_paths=[CSS], max_file_size=service.limits.upload_bytes, footer_links=[], run_history=False, ssr_mode=False,
        show_error=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip
    return Sessions(app, page, service)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; port 0 takes any free port.

    The socket is bound before the model is loaded, so that an address in use is reported at once.
    UserError if the address cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port} ({reason}); choose others with --host and --port") from error
    return listener


class Server(uvicorn.Server):
    """A uvicorn server that cancels all clips when it is told to stop.

    The clients that wait for those clips then get their answers before uvicorn waits for open
    connections to finish.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.worker.close(wait=False)
        await super().shutdown(sockets)


def serve(
    service: Service,
    examples: Mapping[str, np.ndarray | None] | None,
    listener: socket.socket,
    hosts: Hosts,
    keys: Keys | None = None,
) -> None:
    """Serve until Ctrl-C, then cancel all jobs and remove the uploads. The arguments are those of `build_app`."""
    prepare_reading()
    config = uvicorn.Config(
        build_app(service, examples, hosts, keys), log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS,
        http=Connection, ws="none", timeout_keep_alive=KEPT_SECONDS, limit_concurrency=MOST + 1,  # which counts the new one
    )  # fmt: skip
    listener.listen()  # before the address is printed, so that a client that reads it can connect
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  results in {printable(str(service.store.results))}", flush=True)
    try:
        Server(config, service).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after Ctrl-C
        pass
    finally:
        service.worker.close()
        service.store.clear()
