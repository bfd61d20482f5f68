"""The routes of text-embeddings-inference, and of pipelines: tags and answers to questions.

https://huggingface.github.io/text-embeddings-inference; https://huggingface.co/docs/inference-providers/tasks
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.serving.http.bodies import (
    AnswerParameters,
    EmbedAllBody,
    EmbedBody,
    Inputs,
    PredictBody,
    QuestionBody,
    RerankBody,
    SimilarityBody,
    TagBody,
    TagParameters,
    TokenizeBody,
    body_of,
)
from distilbert_fast.serving.http.errors import Refused
from distilbert_fast.serving.http.served import ANSWER, CLASSIFY, EMBED, RERANK, TAG, Served, ToAnswer, dumped
from distilbert_fast.serving.http.service import Service
from distilbert_fast.serving.predictor import Predictor


class Routes:
    """What each route does with a body."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def embed(self, request: Request) -> bytes:
        """Embeddings of texts, [[…], …]."""
        body = await self.service.read(request, EmbedBody)
        served = self.service.pick(body.model, EMBED)
        answer = served.embedding(body.normalize, body.dimensions)
        return await self._many(request, served, body.inputs, answer, body.truncate, always_list=True)

    async def embed_all(self, request: Request) -> bytes:
        """Hidden states of each token, [[[…], …], …]."""
        body = await self.service.read(request, EmbedAllBody)
        served = self.service.pick(body.model, EMBED)
        return await self._many(
            request, served, body.inputs, lambda row, found: found[0], body.truncate, True, served.tokens
        )

    async def predict(self, request: Request) -> bytes:
        """Labels of a text with their scores, the best first; a list of those for a list of lists."""
        body = await self.service.read(request, PredictBody)
        served = self.service.pick(body.model, CLASSIFY)
        return await self._many(request, served, body.inputs, served.classes(body.raw_scores), body.truncate)

    async def rerank(self, request: Request) -> bytes:
        """Texts in the order in which they answer a query: [{"index", "score"}, …]."""
        body = await self.service.read(request, RerankBody)
        served = self.service.pick(body.model, RERANK)
        self.service.check_count(len(body.texts), "texts")

        def ranked(rows: Sequence[Any], scores: Sequence[float]) -> bytes:
            order = sorted(range(len(scores)), key=lambda at: -scores[at])
            texts = [{"text": body.texts[at]} if body.return_text else {} for at in order]
            return dumped([{"index": at, **text, "score": scores[at]} for at, text in zip(order, texts, strict=True)])

        return await self.service.compute(
            request,
            served,
            [(body.query, text) for text in body.texts],
            served.score(body.raw_scores),
            ranked,
            field=lambda at: f"texts[{at}]",
            truncate=body.truncate,
        )

    async def similarity(self, request: Request) -> bytes:
        """The cosine of a sentence's embedding and those of others, [0.9, …]."""
        body = await self.service.read(request, SimilarityBody)
        served = self.service.pick(body.model, EMBED)
        sentences = body.inputs.sentences
        self.service.check_count(len(sentences), "inputs.sentences")

        def compared(rows: Sequence[Any], embeddings: Sequence[np.ndarray]) -> bytes:
            return dumped((np.stack(embeddings[1:]) @ embeddings[0]).tolist())

        return await self.service.compute(
            request,
            served,
            [body.inputs.source_sentence, *sentences],
            served.embedding(True, None),
            compared,
            field=lambda at: f"inputs.sentences[{at - 1}]" if at else "inputs.source_sentence",
            truncate=None if body.parameters is None else body.parameters.truncate,
        )

    async def tag(self, request: Request) -> bytes:
        """Entities of a text, as the pipeline "token-classification" has them; a list of those for a list."""
        body = await self.service.read(request, TagBody)
        how = body.parameters or TagParameters()
        served = self.service.pick(body.model, TAG)
        answer = served.entities(how.aggregation_strategy, how.ignore_labels)
        return await self._many(request, served, body.inputs, answer, how.truncate)

    async def qa(self, request: Request) -> bytes:
        """Answers to a question, as the pipeline "question-answering" had them; a list of those for a list."""
        body = await self.service.read(request, QuestionBody)
        how = body.parameters or AnswerParameters()
        served = self.service.pick(body.model, ANSWER)
        return await self._many(request, served, body.inputs, served.answers(**how.model_dump()), None)

    async def tokenize(self, request: Request) -> bytes:
        """The tokens of each text."""
        body = await self.service.read(request, TokenizeBody)
        served = self.service.named(body.model)
        rows = body.inputs.rows
        self.service.check_count(len(rows), "inputs")

        def work() -> bytes:
            named = enumerate(rows)
            return orjson.dumps([served.tokenize(text, body.add_special_tokens, f"inputs[{at}]") for at, text in named])

        return await self.service.tokenizing(work, rows)

    async def root(self, request: Request) -> bytes:
        """What the first model is for."""
        kinds = next(iter(self.service.models.values())).kinds
        by_kind = {RERANK: self.rerank, EMBED: self.embed, CLASSIFY: self.predict, TAG: self.tag, ANSWER: self.qa}
        return await next(route for kind, route in by_kind.items() if kind in kinds)(request)

    async def _many(
        self,
        request: Request,
        served: Served,
        inputs: Inputs,
        answer: ToAnswer,
        truncate: bool | None,
        always_list: bool = False,
        predictor: Predictor | None = None,
    ) -> bytes:
        """A list of answers, or the only one where no list was given."""
        self.service.check_count(len(inputs.rows), "inputs")
        alone = inputs.single and not always_list
        return await self.service.compute(
            request,
            served,
            inputs.rows,
            answer,
            lambda rows, answers: dumped(answers[0] if alone else answers),
            field=lambda at: "inputs" if inputs.single else f"inputs[{at}]",
            truncate=truncate,
            predictor=predictor,
        )


def router(service: Service) -> APIRouter:
    """The routes of this file."""
    made, routes = APIRouter(), Routes(service)
    for path, run, body in (
        ("/embed", routes.embed, EmbedBody),
        ("/embed_all", routes.embed_all, EmbedAllBody),
        ("/predict", routes.predict, PredictBody),
        ("/rerank", routes.rerank, RerankBody),
        ("/similarity", routes.similarity, SimilarityBody),
        ("/tokenize", routes.tokenize, TokenizeBody),
        ("/tag", routes.tag, TagBody),
        ("/qa", routes.qa, QuestionBody),
        ("/", routes.root, None),
    ):
        schema = None if body is None else body_of(body)
        name = path.strip("/") or "root"
        made.add_api_route(path, _post(run), methods=["POST"], name=name, description=run.__doc__, openapi_extra=schema)
    made.add_api_route("/health", _health(service), methods=["GET"], description="200 once requests are served.")
    made.add_api_route("/info", _info(service), methods=["GET"], description="Models and limits.")
    made.add_api_route("/metrics", _metrics(service), methods=["GET"], description="What Prometheus reads.")
    return made


def _post(run: Callable[[Request], Awaitable[bytes]]) -> Any:
    async def answered(request: Request) -> Response:
        return Response(await run(request), media_type="application/json")

    return answered


def _health(service: Service) -> Any:
    async def health() -> Response:
        if (why := service.why_not_ready()) is not None:
            raise Refused(503, why, retry_after=5)
        return Response(b'{"status":"ok"}', media_type="application/json")

    return health


def _metrics(service: Service) -> Any:
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _info(service: Service) -> Any:
    async def info() -> Response:
        first, limits = next(iter(service.models.values())), service.limits
        try:
            ours = version("distilbert-fast")
        except PackageNotFoundError:  # run from a checkout
            ours = "unknown"
        said = {
            "model_id": first.source,
            "model_dtype": (explain(first.model).engine or "").split(",")[0].split(" ")[0],
            "model_type": _type(first),
            "max_input_length": first.max_length,
            "max_batch_tokens": limits.batch_tokens,
            "max_client_batch_size": limits.inputs,
            "auto_truncate": limits.truncate,
            "version": ours,
            "models": {name: _described(served) for name, served in service.models.items()},
        }
        return Response(orjson.dumps(said), media_type="application/json")

    return info


def _type(served: Served) -> dict[str, Any]:
    """As text-embeddings-inference says what a model is."""
    if EMBED in served.kinds:
        return {"embedding": {"pooling": served.pooling}}
    labels = {str(number): name for number, name in served.labels.items()}
    ids = {name: number for number, name in served.labels.items()}
    return {"reranker" if RERANK in served.kinds else "classifier": {"id2label": labels, "label2id": ids}}


def _described(served: Served) -> dict[str, Any]:
    found = explain(served.model)
    return {
        "source": served.source,
        "task": served.task,
        "can": sorted(served.kinds),
        "max_input_length": served.max_length,
        "engine": found.engine,
        "served": found.served,
        "fallbacks": found.fallbacks,
    }
