"""The parent's side: each part is a process with an end. What it wrote until then counts, however it ended.

Processes are forked from a server that has imported torch, transformers and our package once, and has not touched CUDA.
While a part runs, what it has written is handed on every second: whoever ends this process, too, loses no more.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import worker
from bench.gpu.plan import Part
from bench.gpu.records import Records

TAIL = 30  # lines of a part's output that are kept when it fails
RUNNING = "running"
PRELOADED = (
    "torch",
    "triton.testing",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
    "distilbert_fast.engine.op_encoder",
    "distilbert_fast.modeling.distilbert",
    "distilbert_fast.kernels.attention_backward",
    "bench.gpu.worker",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(PRELOADED))
STARTING = 120.0  # seconds that the server and CUDA may take


class Outcome(NamedTuple):
    name: str
    status: str  # "done", "failed", "timed out", "no time left", "running"
    reason: str
    seconds: float
    records: list[dict[str, Any]]


def gpu() -> str:
    """Its name; empty without one. Raises RuntimeError where no process can be started or CUDA does not answer."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=worker.describe, args=(there,))
    process.start()
    there.close()
    try:
        if not here.poll(STARTING):
            raise RuntimeError(f"CUDA did not answer in {STARTING:.0f} s")
        return here.recv()
    except EOFError:
        raise RuntimeError("the process that asks for the GPU's name ended; see what it said above") from None
    finally:
        process.kill()
        process.join()


def run(
    parts: Iterable[Part],
    budget: float,
    folder: Path,
    started: Callable[[Part, float], None] = lambda *_: None,
    watching: Callable[[Outcome], None] = lambda _: None,
) -> Iterator[Outcome]:
    """One part after another. A part has its share of the budget and what those before it left over.

    ``watching`` is given what a part has found so far, every second.
    """
    end = time.monotonic() + budget
    spare = 0.0
    for part in parts:
        limit = min(part.seconds + spare, end - time.monotonic())
        started(part, limit)
        if limit < 1:
            yield Outcome(part.name, "no time left", f"the budget of {budget:.0f} s is spent", 0.0, [])
            continue
        outcome = run_part(part, limit, folder, watching)
        spare = max(0.0, limit - outcome.seconds)
        yield outcome


def run_part(part: Part, limit: float, folder: Path, watching: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    log, records = folder / f"{part.name}.log", Records(folder / f"{part.name}.jsonl")
    for path in (log, records.path):
        path.unlink(missing_ok=True)
    work = part.work if "." in part.work.split(":")[0] else f"bench.gpu.{part.work}"
    start = time.monotonic()
    process = SERVER.Process(target=worker.main, args=(work, str(records.path), str(log), limit, part.rivals))
    process.start()
    try:
        while process.exitcode is None and (left := start + limit - time.monotonic()) > 0:
            process.join(min(1.0, left))
            watching(Outcome(part.name, RUNNING, "", time.monotonic() - start, records.read()))
        code = process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started ends with it
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    seconds = time.monotonic() - start
    if code == 0:
        return Outcome(part.name, "done", "", seconds, records.read())
    if code is None:
        return Outcome(part.name, "timed out", f"after {limit:.0f} s; {last_words(log)}", seconds, records.read())
    ended = f"by signal {-code}" if code < 0 else f"with status {code}"
    return Outcome(part.name, "failed", f"its process ended {ended}: {last_words(log)}", seconds, records.read())


def last_words(log: Path) -> str:
    """The last line that speaks of an error, else the last."""
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]) if log.exists() else ""
