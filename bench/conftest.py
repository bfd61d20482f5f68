"""Benchmarks, run from a checkout. Each test is one contest (see harness/contest.py) and prints one table.

pytest bench                          every suite
pytest bench --rounds 5 -k bf16       a shorter one
pytest bench --benchmark-disable      does every contest run at all? One round
pytest bench --benchmark-autosave     ours is also a pytest-benchmark: save it, and --benchmark-compare revisions

`distilbert-fast bench` (python -m bench) runs them with tables and plots, and compares revisions in one run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: bench.harness, and the package beside it

from bench.harness.contest import COLLECTED, OURS, contest, table
from bench.harness.machine import machine

TABLES = pytest.StashKey[list[Table]]()


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=15, help="rounds of each contest (default 15)")


@pytest.fixture
def hold_contest(request, benchmark):
    """Hold a contest; its table is printed at the end, its numbers go into pytest-benchmark's record of ours."""
    rounds = request.config.getoption("rounds") if benchmark.enabled else 1
    collected = request.config.stash.get(COLLECTED, None)

    def hold(contenders, matrix_bytes):
        if collected is not None:
            collected[request.node.nodeid.removeprefix("bench/")] = contenders[OURS]
            return
        results = contest(contenders, rounds)
        made = table(request.node.name, results, matrix_bytes)
        request.config.stash.setdefault(TABLES, []).append(made)
        benchmark.extra_info["machine"] = machine()
        benchmark.extra_info["contenders"] = {name: result._asdict() for name, result in results.items()}
        benchmark.pedantic(contenders[OURS].call, setup=contenders[OURS].reset, rounds=rounds)

    return hold


def pytest_terminal_summary(terminalreporter, config):
    tables = config.stash.get(TABLES, [])
    if tables:
        console = Console(width=132)
        with console.capture() as capture:
            console.print(f"\n{machine()}", *tables, sep="\n")
        terminalreporter.write(capture.get())
