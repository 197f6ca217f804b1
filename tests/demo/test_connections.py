"""How long the server keeps a connection that sends nothing."""

from __future__ import annotations

import asyncio

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra [demo]")
connections = pytest.importorskip("lumos.demo.connections", reason="the server needs the extra [demo]")

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSED = 30  # seconds that a test waits for the server to close a connection


async def answer(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def with_connection(client, kept: float) -> None:
    """Run `client(reader, writer)` on a connection of a server that keeps connections for `kept` seconds."""

    async def run() -> None:
        config = uvicorn.Config(answer, port=0, lifespan="off", log_level="error", ws="none",
                                http=connections.Connection, timeout_keep_alive=kept)  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = __import__("contextlib").nullcontext
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
        try:
            await client(reader, writer)
        finally:
            writer.close()
            server.should_exit = True
            await task

    asyncio.run(run())


async def answered(reader, writer) -> None:
    writer.write(REQUEST)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(2) == b"ok"


async def closed(reader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), CLOSED) == b""
    except ConnectionResetError:
        return True


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(connections.Connection, "look_seconds", 0.05)


def test_a_connection_outlives_the_time_for_a_request():
    async def client(reader, writer):
        await answered(reader, writer)
        await asyncio.sleep(0.8)
        await answered(reader, writer)

    with_connection(client, kept=connections.KEPT_SECONDS)


def test_a_second_request_that_does_not_end_is_given_up():
    async def client(reader, writer):
        await answered(reader, writer)
        writer.write(REQUEST[:9])
        assert await closed(reader)

    with_connection(client, kept=connections.KEPT_SECONDS)


def test_a_connection_without_any_request_is_given_up():
    async def client(reader, writer):
        assert await closed(reader)

    with_connection(client, kept=connections.KEPT_SECONDS)


def test_a_connection_without_a_further_request_is_given_up():
    async def client(reader, writer):
        await answered(reader, writer)
        assert await closed(reader)

    with_connection(client, kept=1)


def test_clients_close_their_connections_before_the_server_does():
    httpx = pytest.importorskip("httpx")
    kept = [httpx.Limits().keepalive_expiry, 15, 60]  # httpx, aiohttp, nginx
    assert max(kept) < connections.KEPT_SECONDS
