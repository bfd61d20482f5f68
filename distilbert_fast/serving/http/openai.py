"""The routes of OpenAI that a client of embeddings calls: https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from distilbert_fast.serving.encoding import EncodedRow
from distilbert_fast.serving.http.bodies import OpenAIBody, body_of
from distilbert_fast.serving.http.served import EMBED, dumped, in_base64
from distilbert_fast.serving.http.service import Service


def router(service: Service) -> APIRouter:
    """The routes of this file."""
    made = APIRouter(prefix="/v1")
    began = int(time.time())

    @made.post("/embeddings", openapi_extra=body_of(OpenAIBody))
    async def embeddings(request: Request) -> Response:
        """Embeddings of unit length. `dimensions` keeps the first of each."""
        body = await service.read(request, OpenAIBody)
        served = service.pick(body.model, EMBED)
        service.check_count(len(body.input.rows), "input")

        def finish(rows: Sequence[EncodedRow], answers: Sequence[np.ndarray]) -> bytes:
            tokens = sum(row.tokens for row in rows)
            found: Sequence[Any] = answers if body.encoding_format == "float" else [*map(in_base64, answers)]
            data = [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(found)]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return dumped({"object": "list", "data": data, "model": served.name, "usage": usage})

        content = await service.compute(
            request,
            served,
            body.input.rows,
            served.embedding(True, body.dimensions),
            finish,
            field=lambda at: "input" if body.input.single else f"input[{at}]",
        )
        return Response(content, media_type="application/json")

    @made.get("/models")
    async def models() -> Response:
        """The names of the models."""
        data = [
            {"id": name, "object": "model", "created": began, "owned_by": "distilbert-fast"} for name in service.models
        ]
        return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")

    return made
