"""Time limits of connections, so that a slow client cannot hold one for ever.

A connection is closed if its request arrives too slowly, if the client does not read the answer, or if no further request follows.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 20  # time for a request to arrive, plus 1 s for each RATE bytes that have arrived
RATE = 16 * 1024
ANSWER_SECONDS = 60  # time that a client may read nothing while there is more to send
# Time that a connection stays open for a further request. A client that keeps connections as long as the server does may send a
# request at the moment when the server closes its connection, and gets no answer. httpx keeps them for 5 s, aiohttp for 15 s, nginx
# and the load balancer of AWS for 60 s. That of Google keeps them for 600 s, too long for MOST connections: nginx belongs between.
KEPT_SECONDS = 75
MOST = 500  # open connections; further ones get status 503


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with the time limits of this module.

    uvicorn itself has a time limit only between two requests of a connection (`timeout_keep_alive`, which is `KEPT_SECONDS` here).
    """

    look_seconds = 1.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.paused_at: float | None = None
        self._begin()
        self._look()

    def _begin(self) -> None:
        self.begun, self.arrived = self.loop.time(), 0

    def data_received(self, data: bytes) -> None:
        self.arrived += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._begin()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.paused_at = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.paused_at = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if the client is late, else look again after `look_seconds`."""
        now = self.loop.time()
        between_requests = self.timeout_keep_alive_task is not None
        waits_for_client = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.flow.read_paused and not between_requests
        if not waits_for_client:
            self._begin()
        late = now > self.begun + REQUEST_SECONDS + self.arrived / RATE
        stuck = self.paused_at is not None and now > self.paused_at + ANSWER_SECONDS
        self.looking: Any = self.loop.call_later(self.look_seconds, self._look)
        if late or stuck:
            self.transport.abort()
