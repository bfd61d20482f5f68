"""Clients of a server on loopback: so many that each wait for their answer, or requests that come at a fixed rate.

One thread and connections that stay open, written over asyncio's protocols: clients share the cores with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
    """What came back. ``seconds``: from the request to the whole answer."""

    number: int
    status: int
    seconds: float
    body: bytes


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, a request at a time."""

    def __init__(self) -> None:
        self.waits: asyncio.Future[tuple[int, bytes]] | None = None
        self.got = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length and self.waits is not None and not self.waits.done():
            self.got = body[length:]
            self.waits.set_result((int(head[9:12]), body[:length]))

    def connection_lost(self, error: Exception | None) -> None:
        if self.waits is not None and not self.waits.done():
            self.waits.set_exception(ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self.waits = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waits


def request(path: str, body: Mapping[str, Any] | bytes, host: str = "x") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        path.encode(),
        host.encode(),
        len(content),
        content,
    )


async def _connect(port: int) -> Connection:
    _, made = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return made


def closed_loop(
    port: int, requests: Callable[[int], bytes], clients: int, seconds: float | None = None, count: int | None = None
) -> tuple[list[Answer], float]:
    """Clients, connected before, that each send a request when they have the answer to the last one, for so long or so
    many in all; as many clients as requests: all requests at once.

    Returns the answers and the seconds that all took.
    """

    async def run() -> tuple[list[Answer], float]:
        answers: list[Answer] = []
        numbers: Iterator[int] = iter(range(count if count is not None else 10**9))
        connections = [await _connect(port) for _ in range(clients)]
        begin = time.perf_counter()

        async def client(connection: Connection) -> None:
            for number in numbers:
                start = time.perf_counter()
                if seconds is not None and start - begin > seconds:
                    break
                status, body = await connection.ask(requests(number))
                answers.append(Answer(number, status, time.perf_counter() - start, body))
            connection.transport.close()

        await asyncio.gather(*map(client, connections))
        return answers, time.perf_counter() - begin

    return asyncio.run(run())


def open_loop(port: int, requests: Callable[[int], bytes], rate: float, seconds: float) -> tuple[list[Answer], float]:
    """Requests that come so many a second whatever becomes of them, each on a connection of its own or a free one."""

    async def run() -> tuple[list[Answer], float]:
        answers: list[Answer] = []
        free: list[Connection] = []
        begin = time.perf_counter()

        async def one(number: int) -> None:
            start = begin + number / rate  # when it was due
            connection = free.pop() if free else await _connect(port)
            status, body = await connection.ask(requests(number))
            answers.append(Answer(number, status, time.perf_counter() - start, body))
            free.append(connection)

        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
        sent = time.perf_counter() - begin
        await asyncio.gather(*tasks)
        return answers, sent

    return asyncio.run(run())


def percentile(answers: list[Answer], share: float) -> float:
    """Milliseconds within which so many of the answers came."""
    return 1e3 * float(np.percentile([one.seconds for one in answers], 100 * share)) if answers else float("nan")
