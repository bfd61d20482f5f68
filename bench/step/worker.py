"""One way to take the step, in a process of its own: JSON lines in, JSON lines out, see ``bench.peers.worker``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from bench.peers.worker import PR_SET_PDEATHSIG, reason, say
from bench.step.ways import PARTS, SIZES, WAYS, Way
from distilbert_fast import backends


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped between turns, it would outlive its parent
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        torch.set_num_threads(given["threads"])
        run = Run(WAYS[given["way"]], given["size"], given["batch"], given["length"])
    except Exception as error:
        say(replies, {"error": reason(error)})
        raise
    say(replies, {"ready": True, "loss": run.loss, "peak_mib": run.peak})
    for line in sys.stdin:
        try:
            answer = run.turn(json.loads(line)["calls"])
        except Exception as error:
            answer = {"error": reason(error)}
        say(replies, answer)


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
        self.loss = 0.0
        self._step()
        backends.cpu().release_spares()
        between = _resident()
        counted = _reset_peak()
        self._step()
        self.peak = (_peak() - between) / 2**20 if counted else None

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


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


def _reset_peak() -> bool:
    """Let VmHWM start again from what is resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
