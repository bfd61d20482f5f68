"""The parent's side: each part is a process with an end. What it wrote until then counts, however it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.plan import Part
from bench.gpu.records import Records
from bench.harness.command import ROOT
from bench.harness.processes import wait

TAIL = 30  # lines of a part's output that are kept when it fails


class Outcome(NamedTuple):
    name: str
    status: str  # "done", "failed", "timed out", "no time left"
    reason: str
    seconds: float
    records: list[dict[str, Any]]


def run(
    parts: Iterable[Part], budget: float, folder: Path, started: Callable[[Part, float], None] = lambda *_: None
) -> Iterator[Outcome]:
    """One part after another. A part has its share of the budget and what those before it left over."""
    end = time.monotonic() + budget
    spare = 0.0
    for part in parts:
        limit = min(part.seconds + spare, end - time.monotonic())
        started(part, limit)
        if limit < 1:
            yield Outcome(part.name, "no time left", f"the budget of {budget:.0f} s is spent", 0.0, [])
            continue
        outcome = run_part(part, limit, folder)
        spare = max(0.0, limit - outcome.seconds)
        yield outcome


def run_part(part: Part, limit: float, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    log, records = folder / f"{part.name}.log", Records(folder / f"{part.name}.jsonl")
    records.path.unlink(missing_ok=True)
    work = part.work if "." in part.work.split(":")[0] else f"bench.gpu.{part.work}"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker", work, str(records.path), f"{limit:.0f}"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that what it starts ends with it
        )
        code = wait(process, limit)
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
