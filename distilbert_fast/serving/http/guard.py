"""Around every request: the token, the access log, the counts.

A plain ASGI application, so that a client that leaves is seen. The log holds the client, the method, the route, the
status, the time and how many tokens there were; never a text.
"""

from __future__ import annotations

import hmac
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distilbert_fast.serving.http.errors import Refused
from distilbert_fast.serving.http.service import ClientLeft, Service

access = logging.getLogger("distilbert_fast.access")
log = logging.getLogger("distilbert_fast.serve")
OPEN = {"/health"}  # what needs no token
LEFT = 499  # in log and counts: the client left before it was answered


class Guard:
    """An application for clients that show a token.

    Args:
        app: that answers requests.
        service: whose token clients must show, and whose metrics count.
        routes: that are counted under their own names; others are "other".
    """

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str]) -> None:
        self.app, self.service, self.routes = app, service, routes
        self._key = None if service.key is None else service.key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["began"] = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_token(scope)
            if scope["method"] == "POST":
                self.service.check_queue()
            # uvicorn, which has the scope itself, sends no body after HEAD.
            await self.app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, watched)
        except Refused as refused:
            await send_refusal(refused, scope["path"], watched)
        except ClientLeft:
            status = LEFT
        except Exception:
            log.exception("%s %s failed", scope["method"], self._route(scope))
            if status == 0:
                await send_refusal(Refused(500, "the server failed; its log says why"), scope["path"], watched)
        finally:
            self.service.came(scope)
            self._count(scope, status or LEFT)

    def _check_token(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = given.partition(b" ")
        fits = hmac.compare_digest(token.strip(), self._key)  # in a time that does not depend on where they differ
        if kind.lower() != b"bearer" or not fits:
            raise Refused(401, "expected the server's token in the header Authorization: Bearer …")

    def _route(self, scope: Scope) -> str:
        return scope["path"] if scope["path"] in self.routes else "other"

    def _count(self, scope: Scope, status: int) -> None:
        seconds = time.perf_counter() - scope["began"]
        route = self._route(scope)
        self.service.metrics.answered(route, status, seconds)
        if access.isEnabledFor(logging.INFO):
            client: Any = scope.get("client") or ("-", 0)
            tokens = scope.get("tokens", 0)
            access.info(
                "%s %s %s %d %.1f ms %d tokens", client[0], scope["method"], route, status, 1e3 * seconds, tokens
            )


async def send_refusal(refused: Refused, path: str, send: Send) -> None:
    body = refused.body(path)
    headers = [(name.encode(), value.encode()) for name, value in refused.headers().items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
