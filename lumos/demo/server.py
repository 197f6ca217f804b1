"""The web server of the demo: the page at / and the API under /api."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from lumos.demo.api import add_api
from lumos.demo.connections import MOST, Connection
from lumos.demo.hosts import Hosts
from lumos.demo.middleware import Middleware
from lumos.demo.page import CSS, build_page
from lumos.demo.reading import prepare_reading
from lumos.demo.service import Service
from lumos.demo.sessions import Sessions
from lumos.errors import UserError, printable

CLOSING_SECONDS = 3  # time for open connections to finish when the server stops


def build_app(service: Service, examples: Sequence[str], hosts: Hosts) -> ASGIApp:
    """Return the ASGI app of the whole site.

    gradio keeps its uploads in the folder of the service. Only the routes of gradio that the page
    needs are reachable.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(service.store.uploads)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, service)
    page = build_page(service, examples)
    fonts = ["system-ui", "sans-serif"]
    gr.mount_gradio_app(
        app, page, path="/", theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css_paths=[CSS], max_file_size=service.limits.upload_bytes, footer_links=[], run_history=False, ssr_mode=False,
        show_error=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip
    return Middleware(Sessions(app, page, service), service.store, service.limits, hosts)


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


def serve(service: Service, examples: Sequence[str], listener: socket.socket, hosts: Hosts) -> None:
    """Serve until Ctrl-C, then cancel all jobs and remove the uploads."""
    prepare_reading()
    config = uvicorn.Config(
        build_app(service, examples, hosts), log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS,
        http=Connection, ws="none", limit_concurrency=MOST,
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
