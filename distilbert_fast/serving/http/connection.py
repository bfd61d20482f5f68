"""A connection as uvicorn reads it, with bounds on what comes before a body: so many bytes, in so many seconds.

uvicorn bounds neither where it parses by httptools: one client could fill the memory with a head that never ends. Nor
does it tell the request that is being answered that its client left, where that one has sent others ahead.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES = 65536
HEAD_SECONDS = 30.0


class Connection(HttpToolsProtocol):
    """One client's. Told 400 for a head that is too large, closed where a head does not come."""

    _head: int | None = 0  # bytes of the head that is being read; None: a body, or nothing
    _running: RequestResponseCycle | None = None  # the request that is being answered
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self.pipeline.clear()
        super().connection_lost(exc)  # which tells the last request alone, where several were sent ahead
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def on_message_begin(self) -> None:
        if self._head is None:  # another request of the same connection
            self._begin()
        super().on_message_begin()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > HEAD_BYTES and not self.transport.is_closing():
            self._end()
            self.send_400_response(f"The head of a request has {HEAD_BYTES} bytes at most.")

    def _begin(self) -> None:
        self._end()
        self._head = 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end(self) -> None:
        self._head = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
