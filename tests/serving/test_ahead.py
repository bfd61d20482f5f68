"""Steps that overlap: order, errors, and an end when nobody wants more."""

from __future__ import annotations

import threading
import time

import pytest

from distilbert_fast.serving.ahead import ahead


def test_order_and_errors():
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    found = []
    with pytest.raises(ValueError, match="the sixth"):
        found.extend(ahead(number * 2 for number in ahead(items())))
        raise AssertionError
    assert list(ahead(number * 2 for number in ahead(iter(range(5))))) == [0, 2, 4, 6, 8]


def test_it_is_no_more_than_so_far_ahead_and_ends_when_closed():
    made, closed = [], threading.Event()

    def items():
        try:
            for number in range(100):
                made.append(number)
                yield number
        finally:
            closed.set()

    stream = ahead(items(), depth=2)
    assert next(stream) == 0
    time.sleep(0.2)
    assert len(made) <= 1 + 2 + 1  # taken, waiting, and in the hands of the thread
    before = threading.active_count()
    stream.close()
    assert closed.is_set() and threading.active_count() == before - 1
