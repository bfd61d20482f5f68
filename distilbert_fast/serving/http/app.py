"""The application: the routes of all clients, and what they are told when they are refused."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from distilbert_fast.serving.http import openai, tei
from distilbert_fast.serving.http.errors import Refused
from distilbert_fast.serving.http.guard import LEFT, Guard, log
from distilbert_fast.serving.http.service import ClientLeft, Service


def application(service: Service) -> ASGIApp:
    """An ASGI application that serves a service's models.

    Its end is the caller's: ``service.close()`` after the last request.
    """
    app = FastAPI(title="distilbert-fast", description="Embeddings, labels, entities, answers and rankings of texts.")
    app.router.redirect_slashes = False  # to whatever host the client names
    routers = tei.router(service), openai.router(service)
    for router in routers:
        app.include_router(router)

    # Coroutines, since functions would be run in threads.
    async def refused(request: Request, error: Any) -> Response:
        return Response(error.body(request.url.path), error.status, error.headers())

    async def unknown(request: Request, error: Any) -> Response:
        words = {404: "no such route; /docs lists them", 405: f"{request.method} is not what this route takes"}
        told = words.get(error.status_code, str(error.detail))
        return await refused(request, Refused(error.status_code, told, allow=(error.headers or {}).get("Allow")))

    async def left(request: Request, error: Any) -> Response:
        return Response(status_code=LEFT)

    async def failed(request: Request, error: Any) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return await refused(request, Refused(500, "the server failed; its log says why"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientLeft, left)
    app.add_exception_handler(Exception, failed)
    return Guard(app, service, frozenset(getattr(route, "path", "") for router in routers for route in router.routes))
