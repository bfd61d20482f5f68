"""Compile every Triton kernel that the suite launches, in processes beside each other, into Triton's cache on the disk.

A kernel takes a core about a second to compile. So that no part waits for that: one process calls the ops of one case,
with the same shapes, by one candidate of each kernel, and goes; the parts then find what they launch in the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import distilbert_fast
from bench.gpu import worker
from bench.gpu.plan import PARTS
from bench.gpu.records import Records, Where
from bench.gpu.runner import SERVER
from bench.gpu.tune import calls
from bench.harness.errors import reason

PROCESSES = 16  # at most: each has a context on the GPU, half a gigabyte
CANDIDATES = 5  # of a kernel, as many as any launcher lists
MEASURING = ("kl_div", "linear_kl_div", "attention", "int8_linear", "rows", "models", "step")


def compile_all(records: Records) -> None:
    """What fails is recorded, and the rest goes on."""
    start, done = time.monotonic(), 0
    jobs = list(_jobs())
    processes = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=SERVER, initializer=worker.end_with_parent) as pool:
        futures = {pool.submit(_call, *job): job for job in jobs}
        for future in as_completed(futures):
            with records.attempt(f"compiling for {' '.join(map(str, futures[future]))}"):
                future.result()
                done += 1
    records.note(f"{done} of {len(jobs)} calls compiled in {time.monotonic() - start:.0f} s")


def _jobs() -> Iterator[tuple[str, int, int]]:
    """(what, number of a call, candidate), the default of everything first."""
    count = len(list(calls(Where(torch.device("cuda")))))
    for name in MEASURING:
        yield name, 0, 0
    for candidate in range(CANDIDATES):
        for number in range(count):
            yield "tune", number, candidate


def _call(what: str, number: int, candidate: int) -> None:
    from distilbert_fast.kernels import tuning

    def choose(kernel: str, key: str, candidates: Any) -> Any:
        return candidates[min(candidate, len(candidates) - 1)]

    where = Where.here(compiling=True)
    try:
        with tuning.choosing(choose):
            if what == "tune":
                with distilbert_fast.backend("triton"):
                    list(calls(where))[number][2]()
            else:
                PARTS[what].function()(where, Records(Path(os.devnull)))
    except Exception as error:  # its own type may need what the other process has not
        if type(error).__name__ == "OutOfResources":
            return  # of a candidate, which a search will pass over
        raise RuntimeError(reason(error)) from None
