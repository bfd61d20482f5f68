"""A server on loopback with small models of every kind, and a client that hides nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from demo_input import bert

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

from bench.harness.mixed_requests import with_heads  # noqa: E402
from distilbert_fast.jobs.serve import serve  # noqa: E402

PATIENCE = 60.0


def models(place: Path) -> dict[str, Path]:
    """Directories by name: an encoder that embeds, and one with each head."""
    return with_heads(bert(place / "embed"))


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks one server; a connection each time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host, _, port = address.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Reply:
        """``body``: bytes as they are, anything else as JSON; None: GET."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, content, named)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()


@contextlib.contextmanager
def running(*given: Any, **settings: Any) -> Iterator[Client]:
    """A client of a server in a thread, which is stopped at the end."""
    is_ready = threading.Event()
    found: dict[str, Any] = {}

    def ready(address: str, server: Any) -> None:
        found.update(address=address, server=server)
        is_ready.set()

    def work() -> None:
        try:
            serve(*given, port=0, ready=ready, **settings)
        except BaseException as error:
            found["error"] = error
            is_ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert is_ready.wait(PATIENCE)
    if "error" in found:
        raise found["error"]
    try:
        yield Client(found["address"])
    finally:
        found["server"].should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive() and "error" not in found
