"""The parent's end of processes: workers, which are stopped between their turns, and those that end by a limit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.command import ROOT
from bench.harness.errors import NotAvailableError

BUILD_SECONDS = 1800.0
TURN_SECONDS = 0.4  # that a turn should take at least
CALLS = (3, 200)


class Worker:
    """A worker process, which gets CPU time only inside a call of this class."""

    def __init__(self, given: Mapping[str, Any], environment: Mapping[str, str], log: Path, module: str) -> None:
        """Start ``module`` and wait until it is ready; NotAvailableError where that fails."""
        self.log = log
        self.calls = 1
        self.turns: list[dict[str, Any]] = []  # what was answered to each
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=ROOT,
                env=os.environ | environment,
                start_new_session=True,
            )
        try:
            self.ready = self._read(BUILD_SECONDS)
        except BaseException:
            self.end()
            raise

    def load(self, **what: Any) -> dict[str, Any]:
        """Load what the next turns run, and choose how many calls make a turn."""
        loaded = self.ask({"do": "load", **what})
        low, high = CALLS
        self.calls = min(high, max(low, math.ceil(TURN_SECONDS / loaded["seconds"])))
        return loaded

    def turn(self) -> tuple[float, float]:
        timed = self.ask({"do": "run", "calls": self.calls})
        self.turns.append(timed)
        return timed["seconds"], timed["cpu_seconds"]

    def end(self) -> None:
        end(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says how
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        return self._read(BUILD_SECONDS)

    def _read(self, limit: float) -> dict[str, Any]:
        line, end = b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise NotAvailableError(f"no answer in {limit:.0f} s; see {self.log}")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                raise NotAvailableError(f"its process ended with status {self.process.wait()}; see {self.log}")
            line += read
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise NotAvailableError(answer["error"])
        return answer

    def _signal(self, number: int) -> None:
        """To the worker and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def end_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.end()


def wait(process: subprocess.Popen, limit: float) -> int | None:
    """Its status; None where it was ended, since it took more than ``limit`` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and, where it leads a group, what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
