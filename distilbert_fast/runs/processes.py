"""Several processes at one job, as torchrun and accelerate launch start them: all train, the first does all else.

Every process goes through the same lines; where the first alone has something to do, the others wait for what comes of
it. They wait at the launcher's store and in no collective: an evaluation or a cache may take hours, and a process group
gives up after minutes. In training, where all are in step, it is the process group that notices a missing one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from distilbert_fast.files.schema import Check
from distilbert_fast.runs.run_directory import RunDirectory

T = TypeVar("T")

_FAILED, _LEFT = "failed", "left"
_PAUSE = 0.1  # seconds between two looks at the store
_IN_STEP = timedelta(minutes=30)  # in which a collective of the training has to be joined by all
_PATIENCE = 2.0  # seconds in which others notice that the first has failed, if they wait for it


class ProcessError(Exception):
    """The processes cannot find each other; or the first one failed, and this is its message in the others."""


class Processes:
    """The processes of this job: this one alone unless a launcher started several. See ``processes``.

    Attributes:
        rank: of this process; 0 is the first.
        count: of them all.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", 1))
        self._job = self._events = 0  # of this process and of the job, so far; in all processes the same
        if self.count > 1:
            import torch
            from accelerate import PartialState
            from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not in its __all__
            from torch.distributed.rendezvous import rendezvous

            try:
                store, self.rank, self.count = next(rendezvous("env://"))
            except ValueError as error:
                raise ProcessError(f"WORLD_SIZE is {self.count}, but no launcher started so many: {error}") from error
            # processes that torchrun starts again, --max-restarts, find the store as those before them left it
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"distill-{attempt}", store)
            group = {"store": self._store, "rank": self.rank, "world_size": self.count, "timeout": _IN_STEP}
            PartialState(cpu=not torch.cuda.is_available(), **group)  # also gives each process its GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Wrap the work of all: if the first process fails, the others raise its message."""
        if self.count == 1:
            yield
            return
        self._job, self._events = self._job + 1, 0
        try:
            yield
        except Exception as error:
            if self.is_first:
                self._store.set(self._key(_FAILED), str(error) or type(error).__name__)
            failure = self._failure()
            self._part(_PATIENCE)
            if failure is None or self.is_first:
                raise
            raise failure from error  # which came of it: such as a collective that the first has left
        self._part()

    def first(self, compute: Callable[[], T]) -> T:
        """Return to all what ``compute`` returns in the first process, JSON values; the others wait, however long.

        Raises ProcessError in the others where the first fails meanwhile. To be called inside of ``joined``.
        """
        value = compute() if self.is_first else None
        if self.count == 1:
            return value  # type: ignore[return-value]
        key = self._next()  # after ``compute``, which may ask for results of its own
        if self.is_first:
            self._store.set(key, json.dumps(value))
        self._until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def meet(self) -> None:
        """Wait until all have come here, however long it takes."""
        if self.count > 1:
            key = self._next()
            self._store.add(key, 1)
            self._until(lambda: self._store.add(key, 0) == self.count)

    def in_turn(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the first process, then in the others: they find ready what it left on the disk."""
        self.first(work)
        if not self.is_first:
            work()
        self.meet()

    def _key(self, name: object) -> str:
        return f"{self._job}/{name}"

    def _next(self) -> str:
        self._events += 1
        return self._key(self._events)

    def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if (failure := self._failure()) is not None:
                raise failure
            time.sleep(_PAUSE)

    def _part(self, patience: float = math.inf) -> None:
        """Leave; the first process waits so many seconds for the others, since it may hold the store."""
        left, end = self._store.add(self._key(_LEFT), 1), time.monotonic() + patience
        while self.is_first and left < self.count and time.monotonic() < end:
            time.sleep(_PAUSE)
            left = self._store.add(self._key(_LEFT), 0)

    def _failure(self) -> ProcessError | None:
        key = self._key(_FAILED)
        return ProcessError(self._store.get(key).decode()) if self._store.check([key]) else None


@functools.cache
def processes() -> Processes:
    """The processes of this job. All must make the first call, before they load a model."""
    return Processes()


def launcher() -> list[str]:
    """The command that starts these processes again, word by word."""
    count, of_node = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == 1:
        return ["distilbert-fast"]
    nodes = [] if count == of_node else ["--nnodes", str(count // of_node)]
    return ["torchrun", *nodes, "--nproc-per-node", str(of_node), "-m", "distilbert_fast"]


class SharedRun:
    """A ``RunDirectory`` that the first process holds; the others go from stage to stage beside it.

    Its methods are those of RunDirectory and must be called by all.
    """

    def __init__(self, run: RunDirectory, together: Processes) -> None:
        self.run, self.together = run, together

    @property
    def path(self) -> Path:
        return self.run.path

    def __enter__(self) -> SharedRun:
        if self.together.is_first:
            self.run.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.together.is_first:
            self.run.__exit__(*exception)

    def is_complete(self, name: str) -> bool:
        return self.together.first(lambda: self.run.is_complete(name))

    def directory(self, name: str, build: Callable[[Path], Mapping[str, Any]], check: Check) -> dict[str, Any]:
        """Where the first process has to ``build``, the others do so too, for its training; they write nothing."""
        if not self.is_complete(name) and not self.together.is_first:
            build(self.path / name)
        return self.together.first(lambda: self.run.directory(name, build, check))

    def result(self, name: str, compute: Callable[[], Mapping[str, Any]], check: Check) -> dict[str, Any]:
        return self.together.first(lambda: self.run.result(name, compute, check))

    def discard(self, name: str) -> None:
        if self.together.is_first:
            self.run.discard(name)
