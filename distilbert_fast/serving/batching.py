"""Batches of what many callers want computed: so many real tokens at once, first come first served.

Each thread takes a batch: the windows of the oldest job, and those of younger jobs of the same model while the budget
lasts. A job may be larger than a batch; its windows then go into several. Jobs that nobody waits for any more, and
those past their deadline, are passed over before anything is computed for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import torch

from distilbert_fast.serving.pool import shares

Compute = Callable[[Sequence[Any]], Sequence[Any]]
_HASTE = 0.7  # of a job's time, which the queue may need
_PART = 0.1  # of the oldest job's time for a batch: longer ones keep who comes meanwhile waiting
_FADE = 0.8  # of what was known of the speed when a batch is done


class Overloaded(Exception):
    """The queue is full, or so long that the deadline would pass. ``seconds``: after how many to try again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DeadlinePassed(Exception):
    """A job was not computed in time."""


class Closed(Exception):
    """The batcher takes no jobs any more."""


@dataclass(eq=False, slots=True)
class _Job:
    """Windows of one caller.

    Attributes:
        compute: windows → what the model puts out for each; also what tells models apart.
        finish: outputs → the future's result.
        taken, done: windows that are in batches, and that are computed.
        deadline, arrived: by time.perf_counter().
    """

    compute: Compute
    windows: Sequence[Any]
    finish: Callable[[list[Any]], Any]
    deadline: float
    arrived: float
    outputs: list[Any]
    future: Future[Any] = field(default_factory=Future)
    taken: int = 0
    done: int = 0

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):  # its caller left, or another batch of it failed
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class _Batch:
    compute: Compute
    parts: list[tuple[_Job, int, int]]  # of each job the windows from, to
    tokens: int
    threads: int

    def windows(self) -> list[Any]:
        return [window for job, start, end in self.parts for window in job.windows[start:end]]


class Observer:
    """What is told of jobs and batches; does nothing. Called from several threads."""

    def began(self, waited: float) -> None:
        """A job's first windows are in a batch; it waited so many seconds."""

    def computed(self, windows: int, tokens: int, seconds: float) -> None:
        """A batch is done."""


class Batcher:
    """Computes jobs in threads of its own, which it shares among all models.

    Args:
        batch_tokens: real tokens of a batch, or of one longer window.
        queue_tokens: tokens that may wait; a job that finds no others waiting may have more.
        observer: is told what happens.
        device: of the models.

    A lone batch gets all of torch's threads, batches side by side share them.
    """

    def __init__(
        self,
        batch_tokens: int,
        queue_tokens: int,
        observer: Observer | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008, it is a constant
    ) -> None:
        self.batch_tokens, self.queue_tokens = batch_tokens, queue_tokens
        self._observer = observer or Observer()
        self._whole = torch.get_num_threads()
        workers, self._each = shares(device)
        self._changed = threading.Condition()
        self._queues: dict[Compute, deque[_Job]] = {}
        self._waiting = 0  # tokens
        self._running = 0  # tokens of batches that are computed
        self._busy = 0  # threads
        self._closed = False
        self._tokens, self._seconds = 0.0, 0.0  # of late batches, the latest counting most; seconds · threads
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting_tokens(self) -> int:
        return self._waiting

    @property
    def is_alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def _rate(self) -> float:
        """Tokens a second, all threads busy; 0 before the first batch."""
        return self._whole * self._tokens / self._seconds if self._seconds else 0.0

    def seconds_to_wait(self, coming: float = 0.0) -> float:
        """An estimate of how long a job of no tokens would take, after so many tokens that come before it."""
        rate = self._rate
        return (self._waiting + self._running + coming) / rate if rate and self._waiting + coming else 0.0

    def check(self, seconds: float, coming: float = 0.0) -> None:
        """Refuse a job that may take so many seconds, before its tokens are known.

        Args:
            coming: tokens of jobs that were not refused here, and are not queued yet.

        Raises:
            Overloaded: the queue is full, or needs most of those seconds: batches end together, and estimates err.
            Closed: after ``close``.
        """
        self._check(_HASTE * seconds, seconds, coming)

    def _check(self, most: float, seconds: float, coming: float = 0.0) -> None:
        if self._closed:
            raise Closed("the server is shutting down")
        wait = self.seconds_to_wait(coming)
        if self._waiting >= self.queue_tokens:
            raise Overloaded(f"{self._waiting} tokens wait, and {self.queue_tokens} may", wait)
        if wait > most:
            raise Overloaded(f"the queue takes {wait:.1f} s, and the deadline is {seconds:g} s", wait - most)

    def submit(
        self, compute: Compute, windows: Sequence[Any], finish: Callable[[list[Any]], Any], seconds: float
    ) -> Future[Any]:
        """Queue windows of one caller, to be computed within so many seconds.

        Args:
            compute: of a batch of windows; jobs with an equal one share batches.
            windows: at least one, of some len() each.
            finish: makes the result of the outputs, in the order of the windows; it runs in a thread of the batcher.

        Returns:
            A future with that result, or with DeadlinePassed or what ``compute`` or ``finish`` raised. Cancel it when
            nobody waits any more.

        Raises:
            Overloaded: the job is not taken, since the queue is full or outlasts those seconds.
            Closed: after ``close``.
        """
        now = time.perf_counter()
        job = _Job(compute, windows, finish, now + seconds, now, [None] * len(windows))
        tokens = sum(map(len, windows))
        with self._changed:
            self._check(seconds, seconds)
            if self._waiting and self._waiting + tokens > self.queue_tokens:
                full = f"{self._waiting} tokens wait, {tokens} come, and {self.queue_tokens} may wait"
                raise Overloaded(full, self.seconds_to_wait())
            self._queues.setdefault(compute, deque()).append(job)
            self._waiting += tokens
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._forget(job))
        return job.future

    def close(self) -> None:
        """Finish what is queued, take no more, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # In the threads ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        threads = torch.get_num_threads()  # the first call takes what any thread set last
        while (batch := self._next()) is not None:
            if batch.threads != threads:
                threads = batch.threads
                torch.set_num_threads(threads)
            try:
                self._compute(batch)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._running -= batch.tokens

    def _next(self) -> _Batch | None:
        """Wait for a batch; None once there will be none."""
        with self._changed:
            while True:
                batch = self._take()
                if batch is not None:
                    self._busy += 1
                    self._running += batch.tokens
                    alone = self._busy == 1 and not self._waiting
                    batch.threads = self._whole if alone else self._each
                    return batch
                if self._closed:
                    return None
                self._changed.wait()

    def _take(self) -> _Batch | None:
        """The windows of the next batch, oldest jobs first."""
        now = time.perf_counter()
        while True:
            for compute, queue in [*self._queues.items()]:
                while queue and self._is_over(queue[0], now):
                    queue.popleft()
                if not queue:
                    del self._queues[compute]
            if not self._queues:
                return None
            compute = min(self._queues, key=lambda one: self._queues[one][0].arrived)
            batch = _Batch(compute, [], 0, self._each)
            queue = self._queues[compute]
            budget = self._budget(queue[0], now)
            while queue and self._add(batch, queue[0], now, budget):
                queue.popleft()
            if batch.parts:
                self._waiting -= batch.tokens
                return batch

    def _budget(self, oldest: _Job, now: float) -> int:
        """The tokens of a batch: what its oldest job has time for, since what is late is computed for nobody."""
        rate = self._rate * self._each / self._whole
        if not rate:
            return self.batch_tokens
        seconds = min(oldest.deadline - now, _PART * (oldest.deadline - oldest.arrived))
        return min(self.batch_tokens, max(1, int(rate * seconds)))

    def _is_over(self, job: _Job, now: float) -> bool:
        """Whether a job need not be computed any more."""
        if not job.future.done() and now > job.deadline:
            waited = now - job.arrived
            job.fail(DeadlinePassed(f"not computed within the deadline: {waited:.2f} s have passed"))
        return job.future.done()

    def _add(self, batch: _Batch, job: _Job, now: float, budget: int) -> bool:
        """Put windows of a job into a batch while there is room. Return whether none of the job are left."""
        if self._is_over(job, now):
            return True
        start = job.taken
        while job.taken < len(job.windows):
            tokens = len(job.windows[job.taken])
            if batch.tokens + tokens > budget and batch.tokens:
                break
            batch.tokens += tokens
            job.taken += 1
        if job.taken > start:
            batch.parts.append((job, start, job.taken))
            if start == 0:
                self._observer.began(now - job.arrived)
        return job.taken == len(job.windows)

    def _forget(self, job: _Job) -> None:
        """Windows that are not in a batch wait no longer: the job is done, has failed, or its caller left."""
        with self._changed:
            self._waiting -= sum(map(len, job.windows[job.taken :]))
            job.taken = len(job.windows)

    def _compute(self, batch: _Batch) -> None:
        start = time.perf_counter()
        try:
            found = self._outputs(batch.compute, batch.windows())
        except Exception:
            for job, first, last in batch.parts:  # the fault may be of one of them
                self._one(batch.compute, job, first, last)
            return
        seconds = time.perf_counter() - start
        at = 0
        for job, first, last in batch.parts:
            self._give(job, first, found[at : at + last - first])
            at += last - first
        self._observer.computed(at, batch.tokens, seconds)
        with self._changed:
            self._tokens = _FADE * self._tokens + batch.tokens
            self._seconds = _FADE * self._seconds + seconds * batch.threads

    def _one(self, compute: Compute, job: _Job, first: int, last: int) -> None:
        try:
            found = self._outputs(compute, job.windows[first:last])
        except Exception as error:
            job.fail(error)
        else:
            self._give(job, first, found)

    @staticmethod
    def _outputs(compute: Compute, windows: Sequence[Any]) -> Sequence[Any]:
        found = compute(windows)
        if len(found) != len(windows):
            raise RuntimeError(f"{len(windows)} windows were computed, and there are {len(found)} outputs")
        return found

    def _give(self, job: _Job, first: int, found: Sequence[Any]) -> None:
        """Give a job some outputs, and if these were the last, its caller the result."""
        with self._changed:
            job.outputs[first : first + len(found)] = found
            job.done += len(found)
            if job.done < len(job.windows) or job.future.done():
                return
        try:
            result = job.finish(job.outputs)
            job.future.set_result(result)
        except InvalidStateError:
            pass  # its caller left
        except Exception as error:
            job.fail(error)
