"""Steps of work that overlap, each in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")
_PATIENCE = 0.1  # seconds between looks at whether anybody still wants items
_END = object()


def ahead(items: Iterable[_T], depth: int = 1) -> Generator[_T, None, None]:
    """The items, which a thread makes, ``depth`` of them before they are asked for.

    An error that making one raises is raised here, in its place. When this is closed, so is ``items``, in its thread.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not unwanted.is_set():
            try:
                return made.put((item, error), timeout=_PATIENCE)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if unwanted.is_set():
                    break
            put(_END)
        except BaseException as error:
            put(_END, error)
        finally:
            getattr(items, "close", lambda: None)()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        unwanted.set()
        thread.join()
