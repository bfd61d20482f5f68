"""Seconds of a call: on a CPU by the clock, on a GPU between two events in its stream.

A GPU's stream is kept busy (``_sleep``) while the host queues the call, else what is timed is Python: launching a
kernel takes the host 5 to 150 µs, and many kernels less. Where the sleep was too short for the host it is made longer;
a call that waits for the device in its midst, or takes longer to launch than LONGEST, is reported as one that the host
bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SHORTEST, LONGEST = 4_000_000, 64_000_000  # cycles: about 2 and 32 ms
Call = Callable[[], object]


class Timed(NamedTuple):
    seconds: float
    host_bound: bool = False  # the device may have waited for launches


class CpuClock:
    def time(self, call: Call) -> Timed:
        start = time.perf_counter()
        call()
        return Timed(time.perf_counter() - start)


class CudaClock:
    """One call at a time, in the current stream. ``cuda``: torch.cuda, or what stands for it."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda, self.cycles = cuda, SHORTEST

    def time(self, call: Call) -> Timed:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.cuda._sleep(self.cycles)
        start.record()
        call()
        end.record()
        late = bool(start.query())  # the sleep was over before the last launch was queued
        if late:
            self.cycles = min(2 * self.cycles, LONGEST)
        end.synchronize()
        return Timed(start.elapsed_time(end) / 1000, late)


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock() if device.type == "cuda" else CpuClock()
