"""The demo's command line in a process that is forked from one that has imported everything but run nothing."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from pathlib import Path

import pytest

IMPORTED = (
    *("hurried", "distilbert_fast.cli", "distilbert_fast.jobs.demo", "distilbert_fast.jobs.distill"),
    *("distilbert_fast.distillation.trainer", "distilbert_fast.evaluation.report", "datasets", "pandas"),
    *("scipy.stats", "sklearn.metrics", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)
FORKS = multiprocessing.get_context("forkserver")


def command(directory: str, words: list[str], out: str, err: str) -> None:
    os.chdir(directory)
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from hurried import before_forks

    from distilbert_fast import cli

    before_forks()
    sys.argv = ["distilbert-fast", *words]
    cli.main()


class Forked:
    """What of subprocess.Popen the tests use."""

    def __init__(self, directory: Path, words: list[str]) -> None:
        self.said = [directory / ".stdout", directory / ".stderr"]
        self.process = FORKS.Process(target=command, args=(str(directory), words, *map(str, self.said)))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = 600) -> list[str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still there after {timeout} seconds"
        return [path.read_text() if path.exists() else "" for path in self.said]


def start_server() -> None:
    """Once for a process of tests; later calls find it running."""
    FORKS.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "80")
        multiprocessing.forkserver.ensure_running()
