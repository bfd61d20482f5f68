"""Who answers the windows of `predict`: this process, or workers of Ray, with the same answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distilbert_fast.data.rows import Row
from distilbert_fast.jobs.predict_output import Answered
from distilbert_fast.jobs.ray_cluster import connected, last_line
from distilbert_fast.jobs.settings import RecipeError
from distilbert_fast.serving.ahead import ahead
from distilbert_fast.serving.answers import NOT_FINITE, is_finite
from distilbert_fast.serving.encoding import EncodedRow
from distilbert_fast.serving.pool import worker_threads
from distilbert_fast.serving.predictor import Predictor

_AHEAD = 2  # windows that each worker of Ray has or waits for


class Window(NamedTuple):
    """Rows that are computed together.

    Attributes:
        rows: as they were read.
        texts: what is asked of each; None where there is none.
        faults: why there is none; None where there is one.
        text: that the rows were read from.
    """

    rows: list[Row]
    texts: list[Any]
    faults: list[str | None]
    text: bytes


class AnswerEngine(ABC):
    """Answers windows."""

    @abstractmethod
    def answered(self, windows: Iterable[Window]) -> Generator[tuple[Window, list[Answered]], None, None]:
        """Windows with their answers, in their order."""


def _outcomes(
    predictor: Predictor, encoded: Sequence[EncodedRow], faults: Sequence[str | None], answers: Sequence[Any]
) -> Iterator[tuple[Any, ...]]:
    """What ``Answered`` says of each row, besides the row."""
    for row, why, answer in zip(encoded, faults, answers, strict=True):
        refused = why or row.refused or (None if is_finite(answer) else NOT_FINITE)
        if refused is not None:
            yield None, refused
        else:
            yield predictor.task.fields(answer), None, row.truncated, row.tokens


def _with_rows(window: Window, outcomes: Iterable[tuple[Any, ...]]) -> tuple[Window, list[Answered]]:
    return window, [Answered(row, *outcome) for row, outcome in zip(window.rows, outcomes, strict=True)]


class Here(AnswerEngine):
    """This process: a thread tokenizes, and each core computes a batch."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def answered(self, windows: Iterable[Window]) -> Generator[tuple[Window, list[Answered]], None, None]:
        """One window is begun before the one before it is finished, so that no thread is idle."""
        begun: deque[tuple[Window, list[EncodedRow], Callable[[], list[Any]]]] = deque()
        threads = worker_threads(self.predictor.model.device)

        def finished() -> tuple[Window, list[Answered]]:
            window, encoded, finish = begun.popleft()
            return _with_rows(window, _outcomes(self.predictor, encoded, window.faults, finish()))

        try:
            for window, encoded in ahead((window, self.predictor.encode(window.texts)) for window in windows):
                begun.append((window, encoded, self.predictor.start(encoded, threads)))
                if len(begun) > 1:
                    yield finished()
            while begun:
                yield finished()
        finally:
            threads.shutdown(cancel_futures=True)


class _Worker:
    """What a process of Ray does: a predictor of its own, with so many threads."""

    def __init__(self, threads: int, given: Mapping[str, Any]) -> None:
        torch.set_num_threads(threads)
        self.predictor = Predictor.load(**given)

    def answer(self, texts: list[Any], faults: list[str | None]) -> list[tuple[Any, ...]]:
        encoded = self.predictor.encode(texts)
        return list(_outcomes(self.predictor, encoded, faults, self.predictor.compute(encoded)))


class OnRay(AnswerEngine):
    """Workers of the Ray cluster that RAY_ADDRESS names or that runs here, else of one that is started here.

    A worker that dies is started again, and what it had to do is done again.

    Args:
        given: for ``Predictor.load``, on the machine of each worker.
        workers: how many; None: one for each core of the cluster, divided by ``threads``.
        threads: of each.

    Raises:
        RecipeError: Ray is not installed; more workers than the cluster has cores for.
    """

    def __init__(self, given: Mapping[str, Any], workers: int | None, threads: int) -> None:
        self.ray = ray = connected("predict: engine")
        self.given, self.threads = dict(given), threads
        cores = int(ray.cluster_resources().get("CPU", 0))
        most = cores // threads
        if workers is None:
            workers = max(1, most)
        if not 1 <= workers <= max(1, most):
            has = f"1 to {most}, for {threads} threads each of the cluster's {cores} cores"
            raise RecipeError(f"predict: workers: expected {has}, got {workers}")
        self.workers = workers

    def answered(self, windows: Iterable[Window]) -> Generator[tuple[Window, list[Answered]], None, None]:
        ray = self.ray
        remote = ray.remote(num_cpus=self.threads, max_restarts=-1, max_task_retries=-1)(_Worker)
        workers = [remote.remote(self.threads, self.given) for _ in range(self.workers)]
        begun: deque[tuple[Window, Any]] = deque()

        def finished() -> tuple[Window, list[Answered]]:
            window, reference = begun.popleft()
            try:
                return _with_rows(window, ray.get(reference))
            except ray.exceptions.RayError as error:
                raise RecipeError(f"predict: engine: a worker of Ray failed: {last_line(error)}") from error

        try:
            for number, window in enumerate(windows):
                worker = workers[number % len(workers)]
                begun.append((window, worker.answer.remote(window.texts, window.faults)))
                if len(begun) >= _AHEAD * len(workers):
                    yield finished()
            while begun:
                yield finished()
        finally:
            for worker in workers:
                ray.kill(worker)
