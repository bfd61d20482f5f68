"""One way to take the step, in a process of its own (bench/harness/worker.py):

{"calls": N}   → {"seconds", "cpu_seconds", "parts"}
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.harness.machine import restart_peak, status_bytes
from bench.harness.worker import Message, serve
from bench.step.ways import PARTS, SIZES, WAYS, Way
from distilbert_fast import backends


def build(given: Message) -> tuple[Message, Callable[[Message], Message]]:
    torch.set_num_threads(given["threads"])
    run = Run(WAYS[given["way"]], given["size"], given["batch"], given["length"])
    return {"peak_mib": run.peak}, lambda message: run.turn(message["calls"])


class Run:
    """A batch of tokens of which 15% are masked, the same for every way, and the models.

    ``peak`` is what a step needs beyond the models and the optimizer's state, gradients included, in MiB: how far the
    highest point of the process lies above what it holds between steps, memory that ours keeps from step to step not
    among it.
    """

    def __init__(self, way: Way, size: str, batch: int, length: int) -> None:
        torch.manual_seed(0)
        config = SIZES[size]
        ids = torch.randint(1000, config["vocab_size"], (batch, length))
        masked = torch.rand(batch, length) < 0.15
        self.batch = {
            "input_ids": ids.where(~masked, 103),
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": ids.where(masked, -100),
        }
        torch.manual_seed(1)
        self.way = way.build(config, self.batch)
        self._step()
        backends.cpu().release_spares()
        between = status_bytes("VmRSS")
        try:
            restart_peak()
            counted = True
        except OSError:
            counted = False
        self._step()
        self.peak = (status_bytes("VmHWM") - between) / 2**20 if counted else None

    def turn(self, calls: int) -> dict[str, Any]:
        before, parts = time.process_time(), dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        for _ in range(calls):
            for name, seconds in self._step().items():
                parts[name] += seconds / calls
        seconds = (time.perf_counter() - start) / calls
        return {"seconds": seconds, "cpu_seconds": time.process_time() - before, "parts": parts}

    def _step(self) -> dict[str, float]:
        parts = dict.fromkeys(PARTS, 0.0)
        last = time.perf_counter()

        def part(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            parts[name] += now - last
            last = now

        self.way.step(self.batch, part)
        return parts


if __name__ == "__main__":
    serve(build)
