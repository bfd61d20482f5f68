"""Two revisions in one run: the other one is checked out and built beside this checkout, and both take turns.

A process lays out its memory once, which alone makes a kernel some percent faster or slower; and of two processes the
one that was started first is slower or faster by as much. So each revision is run by several processes, which are
started in either order, and what counts is how much their medians differ over the pairs: Yuen's test, Welch's t of
trimmed means, of the log-ratios of both orders, at 99 %, Bonferroni-corrected for the number of cases. A verdict needs
an interval that excludes 0 and an effect of FLOOR or more.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.harness import report
from bench.harness.command import ROOT
from bench.harness.errors import NotAvailableError
from bench.harness.processes import Worker

FLOOR = 0.03  # below which a difference is not told
CONFIDENCE = 0.99
TRIM = 0.2  # of the pairs of each order, from either end
LEAST = 4  # pairs of processes
TURN = 0.05  # seconds at least
_NATIVE = ("csrc", "setup.py")


@contextlib.contextmanager
def checked_out(revision: str, say: Callable[[str], None]) -> Iterator[Path]:
    """A worktree of a revision in a temporary directory, with its native modules built; removed at the end.

    Raises ValueError where git does not know it or it does not build.
    """
    known = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if known.returncode:
        raise ValueError(f"--base: expected a revision of {ROOT}, got {revision!r}")
    built = sorted((ROOT / "distilbert_fast").glob("_cpu*.so"))
    if not built:
        raise ValueError("--base: this checkout has no built _cpu module: run `pip install -e .` first")
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if newest > built[0].stat().st_mtime and _differs("HEAD"):
        raise ValueError("--base: csrc/ is newer than the native module of this checkout: build it again first")
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        tree = Path(folder) / "tree"
        made = _git("worktree", "add", "--detach", "--quiet", str(tree), known.stdout.strip())
        if made.returncode:
            raise ValueError(f"--base: git worktree failed: {made.stderr.strip()}")
        try:
            if _differs(known.stdout.strip()):
                say(f"building {revision}")
                _build(tree)
            else:
                say(f"{revision} has the same csrc/: its native modules are copied")
                for path in (ROOT / "distilbert_fast").glob("_*.so"):
                    shutil.copy2(path, tree / "distilbert_fast")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _differs(revision: str) -> bool:
    """Whether what native modules are made of differs from a revision, files that git does not know included."""
    changed = _git("diff", "--quiet", revision, "--", *_NATIVE).returncode
    return bool(changed or _git("ls-files", "--others", "--exclude-standard", "--", *_NATIVE).stdout.strip())


def _build(tree: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"--base: the revision does not build: {''.join(last)}")


def measure(
    trees: Mapping[str, Path],
    given: Mapping[str, Any],
    processes: int,
    rounds: int,
    say: Callable[[str], None],
    slow: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[dict[str, list[dict[str, list[float]]]], dict[str, str]]:
    """Seconds by case, process and side; and why the cases that one side cannot run are left out.

    Args:
        trees: "base" and "this": where their packages lie.
        given: files, select, threads and cores, for the workers.
        slow: of a side, cases that are made slower, and how much: to show that it is found.
    """
    found: dict[str, list[dict[str, list[float]]]] = {}
    left_out: dict[str, str] = {}
    logs = Path(tempfile.mkdtemp(prefix="bench-revisions-"))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given["threads"]))
    for process in range(processes):
        workers: dict[str, Worker] = {}
        with contextlib.ExitStack() as stack:
            sides = list(trees) if process % 2 == 0 else list(reversed(trees))
            for side in sides:
                setting = {**given, "tree": str(trees[side]), "slow": (slow or {}).get(side, {})}
                worker = Worker(setting, threads, logs / f"{side}-{process}.log", "bench.revisions_worker")
                workers[side] = worker
                stack.callback(worker.end)
                for case, why in worker.ready["failed"].items():
                    left_out[case] = f"{side}: {why}"
            cases = [case for case in workers["this"].ready["cases"] if case in workers["base"].ready["cases"]]
            if not cases and not left_out:
                raise NotAvailableError(f"no contest is selected by {given['select']!r}")
            for case in cases:
                say(f"processes {process + 1} of {processes}: {case}")
                timed: dict[str, list[float]] = {side: [] for side in trees}
                for turn in range(rounds + 1):
                    for side in sides if turn % 2 == 0 else reversed(sides):
                        seconds = workers[side].ask({"do": "run", "case": case, "seconds": TURN})["seconds"]
                        if turn:
                            timed[side].append(seconds)
                found.setdefault(case, []).append(timed)
    return found, left_out


def verdict(pairs: Sequence[Mapping[str, Sequence[float]]], cases: int = 1) -> dict[str, Any]:
    """How much slower "this" is than "base" over pairs of processes, and whether that is more than noise.

    Args:
        pairs: seconds of each side; in the pairs of even number base was started first, in the others this.

    Returns:
        {"change": of time, 0.1 being 10 % slower, "low", "high": its interval, "verdict": "slower", "faster" or "same"}
    """
    from scipy.stats import ttest_ind

    logs = [
        statistics.median(math.log(this / base) for base, this in zip(pair["base"], pair["this"], strict=True))
        for pair in pairs
    ]
    if len(logs) < LEAST:
        raise ValueError(f"verdict: expected {LEAST} or more pairs of processes, got {len(logs)}")
    # The mean of one order of start less the negated mean of the other is twice the change: what order does cancels.
    test = ttest_ind(logs[::2], [-log for log in logs[1::2]], equal_var=False, trim=TRIM)
    interval = test.confidence_interval(1 - (1 - CONFIDENCE) / cases)
    low, high = float(interval.low) / 2, float(interval.high) / 2
    middle = (low + high) / 2
    told = (low > 0 or high < 0) and abs(middle) >= math.log1p(FLOOR)
    return {
        "change": math.expm1(middle),
        "low": math.expm1(low),
        "high": math.expm1(high),
        "verdict": ("slower" if middle > 0 else "faster") if told else "same",
    }


def table(verdicts: Mapping[str, Mapping[str, Any]], base: str) -> Table:
    columns = ("case", "ms before", "ms now", "change of time", "interval", "verdict")
    made = report.table(f"this checkout beside {base}", columns, left=(0, 5))
    for case, one in verdicts.items():
        made.add_row(
            Text(case.removeprefix("test_")),
            *(f"{1e3 * one[side]:.4g}" for side in ("base", "this")),
            f"{one['change']:+.1%}",
            f"{one['low']:+.1%} to {one['high']:+.1%}",
            {"same": "no difference beyond noise"}.get(one["verdict"], one["verdict"].upper()),
            style="bold" if one["verdict"] != "same" else None,
        )
    return made
