"""A connection as uvicorn has it, with bounds: on what comes before a body, and on who does not read an answer.

uvicorn bounds neither where it parses by httptools: one client could fill the memory with a head that never ends. Nor
does it tell the request that is being answered that its client left, where that one has sent others ahead.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES = 65536
HEAD_SECONDS = 30.0
READ_SECONDS = 30.0  # without a byte of an answer being read


class Connection(HttpToolsProtocol):
    """One client's. Told 400 for a head that is too large, closed where a head does not come or nobody reads."""

    _head: int | None = 0  # bytes of the head that is being read; None: a body, or nothing
    _running: RequestResponseCycle | None = None  # the request that is being answered
    _timer: asyncio.TimerHandle | None = None
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look(math.inf)

    def resume_writing(self) -> None:
        self._watched()
        super().resume_writing()

    def _look(self, before: float) -> None:
        """Look at how much is not read of an answer, now and again, until it is no less than before."""
        self._watched()
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._watch = self.loop.call_later(READ_SECONDS, self._look, left)
        else:
            self.transport.abort()

    def _watched(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._watched()
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
