"""Contests: the same work done by us and by others, in turns, in one process, on the same threads and inputs.

A round runs every contender once, each after a pass over a buffer larger than the caches. Ratios are taken inside a
round; their median over the rounds is reported, and times with their range. Bandwidth is measured in the same rounds.
Peak memory is what one call adds to the process at its highest: of resident memory (VmHWM) on a CPU, of torch's
allocations on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import pytest
import torch
from rich.table import Table

from bench.harness import report
from bench.harness.clock import clock_for
from bench.harness.machine import restart_peak, status_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "distilbert_fast"  # the contender that the others are compared with
TRIAD = "triad"  # the contender that measures the bandwidth
FLUSH_BYTES = 1 << 30  # more than a last-level cache holds
SETTLING = 5  # calls at most that find how long a GPU must be kept busy while the host launches
# Where `python -m bench --base` has ours of every contest kept, which is then timed and not held.
COLLECTED = pytest.StashKey[dict[str, "Contender"]]()


class Contender(NamedTuple):
    call: Callable[[], object]  # what is timed
    reset: Callable[[], object]  # what is not, before each call
    moved_bytes: int  # the least that has to cross memory
    operations: int = 0  # of its products, two for each multiplication and addition; 0: memory alone limits it
    unit: str = "fp32"  # of these, as harness/peaks.py calls it


class Result(NamedTuple):
    seconds: list[float]  # one a round
    moved_bytes: int
    peak_bytes: int
    operations: int = 0
    unit: str = "fp32"
    host_bound: bool = False  # in most rounds a GPU may have waited for launches


def contest(contenders: dict[str, Contender], rounds: int) -> dict[str, Result]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    memory, timed = {}, {name: [] for name in contenders}
    clocks = {name: clock_for(DEVICE) for name in contenders}
    for name, contender in contenders.items():
        for _ in range(2):  # compile, first touch
            contender.reset()
            contender.call()
        contender.reset()
        memory[name] = peak_bytes(contender.call)
        if DEVICE.type == "cuda":
            for _ in range(SETTLING):  # until the host is ahead of the device
                contender.reset()
                if not clocks[name].time(contender.call).host_bound:
                    break
    for _ in range(rounds):
        for name, contender in contenders.items():
            contender.reset()
            flush.fill_(0)
            timed[name].append(clocks[name].time(contender.call))
    return {
        name: Result(
            [turn.seconds for turn in timed[name]],
            one[2],
            memory[name],
            *one[3:],
            host_bound=2 * sum(turn.host_bound for turn in timed[name]) > rounds,
        )
        for name, one in contenders.items()
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that was in use at once during the call, less what was in use before it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what malloc holds free is resident too: give it back
    restart_peak()
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def triad(a: torch.Tensor, b: torch.Tensor) -> Contender:
    """The traffic of an op without its arithmetic: one matrix or two in, one out."""
    out = torch.empty_like(a)
    return Contender(lambda: torch.add(a, b, out=out), lambda: None, (2 if a is b else 3) * a.nbytes)


def forgetting(*leaves: torch.Tensor) -> Callable[[], None]:
    """What resets contenders that make gradients."""

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    return forget


def table(title: str, results: dict[str, Result], matrix_bytes: int) -> Table:
    """One row a contender. Peak memory is given in MiB and in matrices of ``matrix_bytes``."""

    def over(a: Result, b: Result) -> float:
        return median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))

    columns = ("", "ms", "range", f"{OURS} is", "GB/s", f"of {TRIAD}", "peak extra MiB", "in matrices")
    out = report.table(title, columns)
    for name, result in results.items():
        ms = [1000 * value for value in result.seconds]
        share = over(results[TRIAD], result) * result.moved_bytes / results[TRIAD].moved_bytes
        out.add_row(
            name,
            f"{median(ms):.3f}",
            f"{min(ms):.3f}-{max(ms):.3f}",
            "" if name in (OURS, TRIAD) else f"{over(result, results[OURS]):.2f}x as fast",
            f"{result.moved_bytes / median(ms) / 1e6:.1f}",
            f"{share:.0%}",
            f"{result.peak_bytes / 2**20:.1f}",
            f"{result.peak_bytes / matrix_bytes:.2f}",
        )
    return out
