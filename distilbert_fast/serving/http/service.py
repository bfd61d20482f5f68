"""What every route needs: the models, the queue, the limits; a request's body read, and its answer waited for."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from distilbert_fast.serving.batching import Batcher, Closed, DeadlinePassed, Overloaded
from distilbert_fast.serving.encoding import EncodedRow
from distilbert_fast.serving.http.bodies import read_body
from distilbert_fast.serving.http.errors import Refused
from distilbert_fast.serving.http.metrics import Metrics
from distilbert_fast.serving.http.served import Served, ToAnswer, refuse_not_finite
from distilbert_fast.serving.predictor import BATCH_TOKENS, Predictor

DEADLINE_HEADER = "x-request-timeout"
_INLINE = 4000  # characters that are tokenized without a thread
_LATE = 0.05  # what a request counts for in the mean of late ones
_DISCARDED = 16 * 2**20  # bytes of a body that is too large, which are read so that the client hears why
_Body = TypeVar("_Body", bound=BaseModel)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: of a request.
        inputs: texts, pairs or questions of a request.
        deadline: seconds from a request's head to its answer; a client may ask for fewer.
        batch_tokens: real tokens that are computed at once.
        queue_tokens: real tokens that may wait.
        truncate: texts that are too long are cut unless the request says otherwise; else they are refused.
    """

    body_bytes: int = 4_000_000
    inputs: int = 1024
    deadline: float = 60.0
    batch_tokens: int = BATCH_TOKENS
    queue_tokens: int = 2**18
    truncate: bool = False


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Service:
    """Models and their queue.

    Args:
        models: in the order in which a request without a model's name looks for one.
        limits: of requests.
        key: the token that clients must show; None: none.
    """

    def __init__(self, models: Sequence[Served], limits: Limits, key: str | None = None) -> None:
        self.models = {served.name: served for served in models}
        self.limits, self.key = limits, key
        self.metrics = Metrics(self.models, lambda: self.batcher.waiting_tokens)
        device = models[0].model.device
        self.batcher = Batcher(limits.batch_tokens, limits.queue_tokens, self.metrics, device)
        self.draining = False
        self._coming = 0  # requests whose body is read and that are not queued yet
        self._usual = 0.0  # tokens of a late request, in the mean
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    def warm_up(self) -> None:
        """Compute a short batch and a full one by each model, so that the first request waits for nothing; then the
        speed is known, too."""
        rows: list[Any] = [("warm", "up")] * (self.limits.batch_tokens // 4)
        for served in self.models.values():
            encoded = served.predictor.encode(rows if served.predictor.task.pair else ["warm up"] * len(rows))
            windows = [window for row in encoded for window in row.windows]
            for some in (windows[:1], windows, windows):
                self.batcher.submit(served.predictor.outputs, some, len, self.limits.deadline).result()

    def close(self) -> None:
        """Answer what is queued, then end the threads."""
        self.draining = True
        self.batcher.close()
        self._tokenizing.shutdown()

    def why_not_ready(self) -> str | None:
        """Why requests are not served now; None: they are."""
        if self.draining:
            return "the server is shutting down"
        return None if self.batcher.is_alive else "a thread that computes has died"

    def named(self, name: str | None) -> Served:
        """The model of a name, or the first. Raises Refused, 404, for a name that no model has."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refused(404, f"expected one of {', '.join(map(repr, self.models))}, got {name[:80]!r}", "model")
        return self.models[name]

    def pick(self, name: str | None, kind: str) -> Served:
        """The model of a name, or the first that can do something.

        Raises:
            Refused: 404 for a name that no model has, 422 for one that cannot do it.
        """
        if name is not None:
            served = self.named(name)
            served.refuse_kind(kind)
            return served
        for served in self.models.values():
            if kind in served.kinds:
                return served
        able = ", ".join(f"{name!r} can {' and '.join(sorted(one.kinds))}" for name, one in self.models.items())
        raise Refused(422, f"no model here can {kind}: {able}", "model")

    def check_queue(self) -> None:
        """Refuse a request before anything is done for it: 429 if the queue is full, 503 if the server shuts down."""
        with _refusals():
            self.batcher.check(self.limits.deadline)

    async def read(self, request: Request, kind: type[_Body]) -> _Body:
        """The body of a request.

        Raises:
            Refused: 400, 408, 413, 422.
        """
        seconds = self._seconds(request)
        try:
            content = await asyncio.wait_for(self._content(request), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refused(408, f"the body did not come within {seconds:g} s") from None
        except ClientDisconnect:
            raise ClientLeft from None
        with _refusals():  # again: of many that came together, each sees those before it
            self.batcher.check(seconds - _age(request), self._coming * self._usual)
        request.scope["coming"] = True
        self._coming += 1
        return read_body(kind, content)

    def came(self, scope: Scope, tokens: int | None = None) -> None:
        """A request is queued with so many tokens, or at its end."""
        if scope.pop("coming", False):
            self._coming -= 1
            if tokens is not None:
                self._usual += _LATE * (tokens - self._usual)

    async def _content(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = Refused(413, f"expected {most} bytes at most, got more", "body")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most + _DISCARDED:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most + _DISCARDED:
                break
            if size <= most:
                parts.append(part)
        if size > most:
            raise too_large
        return b"".join(parts)

    def _seconds(self, request: Request) -> float:
        """How long the answer may take, by the limits and the request's header."""
        given = request.headers.get(DEADLINE_HEADER)
        if given is None:
            return self.limits.deadline
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise Refused(422, f"expected seconds above 0, got {given[:40]!r}", DEADLINE_HEADER)
        return min(seconds, self.limits.deadline)

    def check_count(self, count: int, field: str) -> None:
        if count > self.limits.inputs:
            raise Refused(413, f"expected {self.limits.inputs} at most in a request, got {count}", field)

    async def tokenizing(self, work: Callable[[], _Made], rows: Sequence[Any]) -> _Made:
        """What tokenizes rows, in a thread where that takes long."""
        if _characters(rows) <= _INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def compute(
        self,
        request: Request,
        served: Served,
        rows: Sequence[Any],
        answer: ToAnswer,
        finish: Callable[[list[EncodedRow], list[Any]], bytes],
        *,
        field: Callable[[int], str],
        truncate: bool | None = None,
        predictor: Predictor | None = None,
    ) -> bytes:
        """The answers to rows as bytes.

        Args:
            request: whose client waits.
            served: the model.
            rows: texts, pairs of texts, or the ids of a text's tokens.
            answer: makes the answer to a row of the model's outputs.
            finish: makes bytes of the rows and their answers.
            field: the field of the body that holds a row of this number.
            truncate: whether rows that are too long are cut; None: as the limits say.
            predictor: of ``served``; None: its own.

        Raises:
            Refused: 413, 422, 429, 500, 503, 504.
            ClientLeft: nothing is computed any more.
        """
        predictor = predictor or served.predictor
        cut = self.limits.truncate if truncate is None else truncate
        encode = partial(served.encode, predictor, rows, field, cut)
        encoded = await self.tokenizing(encode, rows)
        windows = [window for row in encoded for window in row.windows]
        if cut and (count := sum(row.truncated for row in encoded)):
            self.metrics.truncated.inc(count)
        request.scope["tokens"] = tokens = sum(map(len, windows))
        self.came(request.scope, tokens)

        def finished(outputs: list[Any]) -> bytes:
            answers, at = [], 0
            for row in encoded:
                answers.append(answer(row, outputs[at : at + len(row.windows)]))
                at += len(row.windows)
            refuse_not_finite(answers)
            return finish(encoded, answers)

        seconds = self._seconds(request) - _age(request)
        with _refusals():
            future = asyncio.wrap_future(self.batcher.submit(predictor.outputs, windows, finished, seconds))
            return await _first_of(request, future, seconds)


async def _first_of(request: Request, future: asyncio.Future[bytes], seconds: float) -> bytes:
    """What comes first: the answer, the end of the client's connection, or the deadline."""
    left = asyncio.ensure_future(request.receive())  # the body is read, so what comes now is that the client leaves
    try:
        both: set[asyncio.Future[Any]] = {future, left}
        await asyncio.wait(both, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if left.done():
            raise ClientLeft
        raise DeadlinePassed(f"not computed within the deadline: {seconds:.2f} s have passed")
    finally:
        left.cancel()
        future.cancel()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the batcher raises into what a client is told."""
    try:
        yield
    except Overloaded as error:
        raise Refused(429, f"overloaded: {error}", retry_after=error.seconds) from None
    except DeadlinePassed as error:
        raise Refused(504, str(error)) from None
    except Closed as error:
        raise Refused(503, str(error), retry_after=5) from None


def _age(request: Request) -> float:
    """Seconds since its head was read."""
    return float(time.perf_counter() - request.scope["began"])


def _characters(rows: Sequence[Any]) -> int:
    return sum(len(row) if isinstance(row, str) else sum(map(len, map(str, row))) for row in rows)
