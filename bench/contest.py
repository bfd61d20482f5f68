"""Contests: the same work done by us and by others, in turns, in one process, on the same threads and inputs.

A round runs every contender once, each after a pass over a buffer larger than the caches. Ratios are taken inside a
round; their median over the rounds is reported, and times with their range. Bandwidth is measured in the same rounds.
Peak memory is what one call adds to the process at its highest: of resident memory (VmHWM) on a CPU, of torch's
allocations on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from distilbert_fast import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "distilbert_fast"  # the contender that the others are compared with
TRIAD = "triad"  # the contender that measures the bandwidth
FLUSH_BYTES = 1 << 30  # more than a last-level cache holds


class Contender(NamedTuple):
    call: Callable[[], object]  # what is timed
    reset: Callable[[], object]  # what is not, before each call
    moved_bytes: int  # the least that has to cross memory


class Result(NamedTuple):
    seconds: list[float]  # one a round
    moved_bytes: int
    peak_bytes: int


def contest(contenders: dict[str, Contender], rounds: int) -> dict[str, Result]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    memory, timed = {}, {name: [] for name in contenders}
    for name, contender in contenders.items():
        for _ in range(2):  # compile, first touch
            contender.reset()
            contender.call()
        contender.reset()
        memory[name] = peak_bytes(contender.call)
    for _ in range(rounds):
        for name, contender in contenders.items():
            contender.reset()
            flush.fill_(0)
            timed[name].append(seconds(contender.call))
    return {name: Result(timed[name], contenders[name].moved_bytes, memory[name]) for name in contenders}


def seconds(call: Callable[[], object]) -> float:
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that was in use at once during the call, less what was in use before it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what malloc holds free is resident too: give it back
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> str:
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.machine()
    tier = backends.isa_report()["tier"]
    return f"{name}, {torch.get_num_threads()} threads, ISA tier {tier}, torch {torch.__version__}"


def table(title: str, results: dict[str, Result], matrix_bytes: int) -> Table:
    """One row a contender. Peak memory is given in MiB and in matrices of ``matrix_bytes``."""

    def over(a: Result, b: Result) -> float:
        return median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))

    out = Table(title=Text(title), title_justify="left")
    for column in ("", "ms", "range", f"{OURS} is", "GB/s", f"of {TRIAD}", "peak extra MiB", "in matrices"):
        out.add_column(column, justify="right" if column else "left", no_wrap=True)
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
