"""Threads that compute batches side by side.

Two threads with a batch each finish more than one call with two threads: nothing waits where a call's threads meet, and
another thread that needs the processor for a moment, to tokenize, stops one of them and not both.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_MOST = 8  # beyond that Python, which runs one at a time, would keep them waiting


def shares(device: torch.device) -> tuple[int, int]:
    """How many workers share torch's threads, and how many each has: a thread each up to 8 workers; one for a GPU."""
    whole = torch.get_num_threads()
    if device.type != "cpu":
        return 1, whole
    each = -(-whole // _MOST)
    return max(1, whole // each), each


def worker_threads(device: torch.device) -> ThreadPoolExecutor:
    """As many threads as torch would use for a call, or 8 that share those; one for a GPU."""
    whole = torch.get_num_threads()
    workers, each = shares(device)
    executor = ThreadPoolExecutor(workers, "distilbert-fast")
    if workers > 1:
        together = threading.Barrier(workers)

        def limit() -> None:
            torch.get_num_threads()  # the first call takes what any thread set last; from then on each has its own
            torch.set_num_threads(each)
            together.wait()

        for future in [executor.submit(limit) for _ in range(workers)]:
            future.result()
        torch.set_num_threads(whole)
    return executor
