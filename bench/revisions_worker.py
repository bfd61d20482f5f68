"""Ours of every contest, of one revision, in a process of its own (bench/harness/worker.py).

    {"tree": where its distilbert_fast lies, "files": […], "select": …, "threads": …}   → {"cases": […]}
    {"case": …, "seconds": S}   → {"seconds": the fastest call of at least S seconds}
    {"case": …}                 → that of a single call

Rivals are not run: torch.compile leaves functions as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.worker import Message, serve


def build(given: Message) -> tuple[Message, Callable[[Message], Message]]:
    sys.path.insert(0, given["tree"])
    import distilbert_fast

    found = Path(distilbert_fast.__file__).resolve().parents[1]
    if found != Path(given["tree"]).resolve():
        raise RuntimeError(f"expected the package of {given['tree']}, got that of {found}")
    import pytest
    import torch

    from bench.harness.command import ROOT
    from bench.harness.contest import COLLECTED

    torch.set_num_threads(given["threads"])
    torch.compile = lambda function, **settings: function  # type: ignore[assignment]
    cases: dict[str, Any] = {}
    failed: dict[str, str] = {}

    class Collect:
        def pytest_configure(self, config: pytest.Config) -> None:
            config.stash[COLLECTED] = cases

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                lines = str(crash.message if crash else report.longrepr).splitlines()
                failed[report.nodeid.removeprefix("bench/")] = lines[0] if lines else "no message"

    files = [str(ROOT / "bench" / name) for name in given["files"]]
    options = ["-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--benchmark-disable", "-k", given["select"]]
    pytest.main([*options, *files], plugins=[Collect()])
    slow = given.get("slow", {})
    return {"cases": list(cases), "failed": failed}, lambda message: _turn(cases, message, slow)


def _turn(cases: dict[str, Any], message: Message, slow: dict[str, float]) -> dict[str, float]:
    one, factor = cases[message["case"]], slow.get(message["case"], 1.0)
    fastest, before, end = float("inf"), time.process_time(), time.perf_counter() + message.get("seconds", 0.0)
    while True:
        one.reset()
        start = time.perf_counter()
        one.call()
        taken = time.perf_counter() - start
        while factor > 1 and time.perf_counter() - start < factor * taken:
            pass
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() >= end:
            return {"seconds": fastest, "cpu_seconds": time.process_time() - before}


if __name__ == "__main__":
    serve(build)
