"""One address with the page at / and the API under /api."""

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
from lumos.errors import UserError

CLOSING_SECONDS = 3  # that open connections get


def build_app(service: Service, examples: Sequence[str], hosts: Hosts) -> ASGIApp:
    """The whole site. gradio keeps its uploads in the service's folder; what it would serve besides the page is not let out."""
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
    """An address of our own, before anything slow begins; UserError if it cannot be had. Port 0 takes any that is free."""
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
    """Who waits for a clip when it is told to stop hears of it, before open connections are waited for."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.worker.close(wait=False)
        await super().shutdown(sockets)


def serve(service: Service, examples: Sequence[str], listener: socket.socket, hosts: Hosts) -> None:
    """Serve until Ctrl-C; what is running then is cancelled, and uploads are removed."""
    prepare_reading()
    config = uvicorn.Config(
        build_app(service, examples, hosts), log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS,
        http=Connection, ws="none", limit_concurrency=MOST,
    )  # fmt: skip
    listener.listen()  # whoever is told the address can connect from now on
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  results in {service.store.results}", flush=True)
    try:
        Server(config, service).run(sockets=[listener])
    except KeyboardInterrupt:  # how uvicorn ends after Ctrl-C
        pass
    finally:
        service.worker.close()
        service.store.clear()
