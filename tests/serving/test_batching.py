"""The batcher: who is computed when, with whom, and what the others are told."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from distilbert_fast.serving.batching import Batcher, Closed, DeadlinePassed, Observer, Overloaded

PATIENCE = 30.0


class Model:
    """Doubles windows, a batch at a time, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may_go = threading.Event()
        self.began = threading.Semaphore(0)

    def compute(self, windows):
        self.batches.append(list(windows))
        self.began.release()
        assert self.may_go.wait(PATIENCE)
        if "bad" in windows:
            raise ValueError("a bad window")
        return [window * 2 for window in windows]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher():
    """Of one thread, ten tokens a batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Batcher(10, 60)
    yield made
    made.close()
    torch.set_num_threads(before)


def hold(batcher, model):
    """Keep the only thread busy until ``model.may_go``."""
    first = batcher.submit(model.compute, ["held"], list, PATIENCE)
    assert model.began.acquire(timeout=PATIENCE)
    return first


def test_batches_are_of_so_many_tokens_first_come_first_served(batcher, model):
    held = hold(batcher, model)
    asked = [["aaaa", "bbb"], ["ccc"], ["ddddd"], ["e" * 12], ["f", "g"]]
    futures = [batcher.submit(model.compute, windows, list, PATIENCE) for windows in asked]
    assert batcher.waiting_tokens == 4 + 3 + 3 + 5 + 12 + 2
    model.may_go.set()
    for windows, future in zip(asked, futures, strict=True):
        assert future.result(PATIENCE) == [window * 2 for window in windows]
    assert held.result() == ["heldheld"]
    assert model.batches == [["held"], ["aaaa", "bbb", "ccc"], ["ddddd"], ["e" * 12], ["f", "g"]]
    assert batcher.waiting_tokens == 0


def test_a_large_job_goes_into_several_batches(batcher, model):
    model.may_go.set()
    windows = [letter * 4 for letter in "abcdefg"]
    assert batcher.submit(model.compute, windows, list, PATIENCE).result(PATIENCE) == [one * 2 for one in windows]
    assert [len(batch) for batch in model.batches] == [2, 2, 2, 1]


def test_models_do_not_share_batches_and_the_oldest_job_is_next(batcher, model):
    other = Model()
    other.may_go.set()
    hold(batcher, model)
    order = [(model, "a"), (other, "b"), (model, "c"), (other, "d")]
    futures = [batcher.submit(one.compute, [window], list, PATIENCE) for one, window in order]
    model.may_go.set()
    assert [future.result(PATIENCE) for future in futures] == [["aa"], ["bb"], ["cc"], ["dd"]]
    assert model.batches == [["held"], ["a", "c"]] and other.batches == [["b", "d"]]


def test_who_left_is_passed_over(batcher, model):
    hold(batcher, model)
    gone, stays = (batcher.submit(model.compute, [window], list, PATIENCE) for window in ("gone", "stays"))
    assert gone.cancel() and batcher.waiting_tokens == len("stays")
    model.may_go.set()
    assert stays.result(PATIENCE) == ["staysstays"]
    assert model.batches == [["held"], ["stays"]]
    with pytest.raises(CancelledError):
        gone.result()


def test_who_leaves_while_computed_disturbs_nobody(batcher, model):
    held = hold(batcher, model)
    assert held.cancel()
    after = batcher.submit(model.compute, ["after"], list, PATIENCE)
    model.may_go.set()
    assert after.result(PATIENCE) == ["afterafter"] and batcher.is_alive


def test_who_is_late_is_told_and_not_computed(batcher, model):
    hold(batcher, model)
    late = batcher.submit(model.compute, ["late"], list, 0.01)
    stays = batcher.submit(model.compute, ["stays"], list, PATIENCE)
    time.sleep(0.02)
    model.may_go.set()
    with pytest.raises(DeadlinePassed, match="not computed within the deadline"):
        late.result(PATIENCE)
    assert stays.result(PATIENCE) and ["late"] not in model.batches and batcher.waiting_tokens == 0


def test_a_full_queue_refuses(batcher, model):
    hold(batcher, model)
    batcher.submit(model.compute, ["x" * 70], list, PATIENCE)  # finds nobody waiting
    with pytest.raises(Overloaded, match="70 tokens wait, and 60 may"):
        batcher.submit(model.compute, ["y"], list, PATIENCE)
    model.may_go.set()


def test_a_queue_that_outlasts_the_deadline_refuses(batcher, model):
    model.may_go.set()

    def slow(windows):
        time.sleep(0.05)
        return windows

    batcher.submit(slow, ["x" * 10], list, PATIENCE).result(PATIENCE)
    model.may_go.clear()
    hold(batcher, model)
    batcher.submit(model.compute, ["y" * 40], list, PATIENCE)
    assert batcher.seconds_to_wait() > 0.1
    with pytest.raises(Overloaded, match=r"the queue takes .* s, and the deadline is 0.01 s") as raised:
        batcher.submit(model.compute, ["z"], list, 0.01)
    assert raised.value.seconds > 0
    model.may_go.set()


def test_a_fault_is_its_own_jobs_alone(batcher, model):
    hold(batcher, model)
    bad = batcher.submit(model.compute, ["bad"], list, PATIENCE)
    good = batcher.submit(model.compute, ["good"], list, PATIENCE)
    model.may_go.set()
    assert good.result(PATIENCE) == ["goodgood"]
    with pytest.raises(ValueError, match="a bad window"):
        bad.result(PATIENCE)

    def no(outputs):
        raise KeyError("finish")

    with pytest.raises(KeyError, match="finish"):
        batcher.submit(model.compute, ["x"], no, PATIENCE).result(PATIENCE)
    with pytest.raises(RuntimeError, match="1 windows were computed, and there are 0 outputs"):
        batcher.submit(lambda windows: [], ["x"], list, PATIENCE).result(PATIENCE)
    assert batcher.is_alive


def test_close_finishes_what_is_queued(model):
    seen = []

    class Seen(Observer):
        def began(self, waited):
            seen.append(waited)

        def computed(self, windows, tokens, seconds):
            seen.append((windows, tokens))

    batcher = Batcher(10, 60, Seen())
    model.may_go.set()
    futures = [batcher.submit(model.compute, [letter * 6], list, PATIENCE) for letter in "abcd"]
    batcher.close()
    assert [future.result(0)[0][0] for future in futures] == [*"abcd"]
    with pytest.raises(Closed, match="the server is shutting down"):
        batcher.submit(model.compute, ["x"], list, PATIENCE)
    assert sum(isinstance(one, tuple) for one in seen) == 4 and len(seen) == 8


def test_many_threads_lose_and_cross_nothing():
    """2,000 jobs of eight callers by two models in four threads: each gets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    batcher = Batcher(40, 10**9)

    def twice(windows):
        return [window * 2 for window in windows]

    def thrice(windows):
        return [window * 3 for window in windows]

    faults = []

    def call(number):
        for at in range(250):
            kind, times = (twice, 2) if (at + number) % 3 else (thrice, 3)
            windows = [f"{number}.{at}.{part}" for part in range(1 + at % 7)]
            future = batcher.submit(kind, windows, list, PATIENCE)
            if at % 11 == 0:
                future.cancel()
            elif future.result(PATIENCE) != [window * times for window in windows]:
                faults.append((number, at))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    batcher.close()
    torch.set_num_threads(before)
    assert not faults and batcher.waiting_tokens == 0


def test_a_batch_is_no_larger_than_the_oldest_job_has_time_for(batcher, model):
    """At a token a second, batches take a tenth of a job's 40 seconds, and not ten tokens."""
    batcher._tokens, batcher._seconds = 10.0, 10.0
    model.may_go.set()
    batcher.submit(model.compute, ["aaa", "bbb", "ccc"], list, 40.0).result(PATIENCE)
    assert model.batches == [["aaa"], ["bbb"], ["ccc"]]


def test_who_has_hardly_any_time_left_takes_no_large_batch(batcher, model):
    batcher._tokens, batcher._seconds = 10.0, 10.0
    model.may_go.set()
    batcher.submit(model.compute, ["a", "b", "c"], list, 0.9).result(PATIENCE)
    assert model.batches == [["a"], ["b"], ["c"]]


def test_jobs_that_come_count(batcher, model):
    """At ten tokens a second, a job with ten seconds is refused while more than seven seconds of others come."""
    batcher._tokens, batcher._seconds = 10.0, 1.0
    batcher.check(10.0, 69)
    with pytest.raises(Overloaded, match=r"the queue takes 7\.1 s, and the deadline is 10 s"):
        batcher.check(10.0, 71)
    batcher.check(20.0, 71)
