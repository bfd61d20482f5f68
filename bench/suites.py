"""The pytest-benchmark suites as one command runs them: which there are, their results as rows, tables and plots."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.harness import report
from bench.harness.command import ROOT
from bench.harness.contest import OURS, TRIAD

SUITES = {
    "op": sorted(
        path.name for path in (ROOT / "bench").glob("test_*.py") if path.stem not in ("test_models", "test_step")
    ),
    "model": ["test_models.py"],
    "step": ["test_step.py"],
}
SUITES["all"] = [name for names in SUITES.values() for name in names]


def run(what: str, select: str, rounds: int, threads: int) -> tuple[list[dict[str, Any]], int]:
    """Run suites in a process of their own: a row for each contest, and pytest's exit status (5: nothing selected)."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--rounds={rounds}", f"--benchmark-json={out}"]
        chosen = [f"bench/{name}" for name in SUITES[what]]
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        done = subprocess.run(
            [*command, "--benchmark-columns=median", "-k", select, *chosen],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL if sys.stdout.isatty() else sys.stderr,
        )
        made = json.loads(out.read_text())["benchmarks"] if out.is_file() and out.stat().st_size else []
    return [row(one) for one in made], done.returncode


def row(made: Mapping[str, Any]) -> dict[str, Any]:
    """A contest from pytest-benchmark's record of it."""
    contenders = made["extra_info"]["contenders"]
    suite, _, case = made["fullname"].partition("::")
    return {
        "suite": Path(suite).stem.removeprefix("test_"),
        "case": case.removeprefix("test_"),
        "contenders": {name: dict(result) for name, result in contenders.items()},
    }


def share_of_limit(result: Mapping[str, Any], triad: Mapping[str, Any], peaks: Mapping[str, float]) -> float:
    """The longer of a work's products at the peak rate and its bytes at the triad's bandwidth, over its time."""
    bandwidth = triad["moved_bytes"] / statistics.median(triad["seconds"])
    least = max(result["moved_bytes"] / bandwidth, result["operations"] / peaks[result["unit"]])
    return least / statistics.median(result["seconds"])


def ratio(row: Mapping[str, Any], rival: str) -> list[float]:
    """How many times as fast ours is, round by round."""
    ours, other = (row["contenders"][name]["seconds"] for name in (OURS, rival))
    return [b / a for a, b in zip(ours, other, strict=True)]


def rivals(row: Mapping[str, Any]) -> Iterator[str]:
    """Who is not ours, the fastest first."""
    others = [name for name in row["contenders"] if name != TRIAD and not name.startswith(OURS)]
    yield from sorted(others, key=lambda name: statistics.median(row["contenders"][name]["seconds"]))


def table(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> Table:
    """A row a contest: ours, the fastest rival, and how near ours is to what the machine allows."""
    columns = ("suite", "case", "ms", "range", "fastest rival", "ms", "ours is", "range", "of the limit", "peak MiB")
    made = report.table("ours, and the fastest of the others", columns, left=(0, 1, 4))
    for one in rows:
        ours, rival = one["contenders"][OURS], next(rivals(one), None)
        ms = [1e3 * value for value in ours["seconds"]]
        cells = ["", "", "", ""]
        if rival is not None:
            times = ratio(one, rival)
            theirs = 1e3 * statistics.median(one["contenders"][rival]["seconds"])
            cells = [rival, f"{theirs:.3g}", f"{statistics.median(times):.2f}x", f"{min(times):.2f}-{max(times):.2f}"]
        limit = share_of_limit(ours, one["contenders"][TRIAD], peaks)
        made.add_row(
            one["suite"],
            Text(one["case"]),
            f"{statistics.median(ms):.3g}",
            f"{min(ms):.3g}-{max(ms):.3g}",
            *cells,
            f"{limit:.0%}",
            f"{ours['peak_bytes'] / 2**20:.1f}",
        )
    return made


def plot_roofline(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, float], title: str, path: Path) -> None:
    """Operations a second against operations a byte, of contests that multiply; the lines are what was measured."""
    from distilbert_fast.evaluation.report import new_figure, png

    figure = new_figure(9, 6)
    axes = figure.subplots()
    triads = [one["contenders"][TRIAD] for one in rows]
    bandwidth = statistics.median(one["moved_bytes"] / statistics.median(one["seconds"]) for one in triads)
    colors = {"fp32": "tab:gray", "bf16": "tab:orange", "int8": "tab:blue"}
    reach = [2.0**power for power in range(-2, 14)]
    for unit, peak in peaks.items():
        axes.plot(reach, [min(peak, x * bandwidth) for x in reach], color=colors[unit], label=f"{unit}, measured limit")
    for one in rows:
        for name in (OURS, *list(rivals(one))[:1]):
            result = one["contenders"][name]
            if result["operations"]:
                seconds = statistics.median(result["seconds"])
                at = result["operations"] / result["moved_bytes"], result["operations"] / seconds
                axes.plot(*at, "o" if name == OURS else "x", color=colors[result["unit"]])
                if name == OURS:
                    label = f"{one['suite']} {one['case']}"
                    axes.annotate(label, at, xytext=(4, 4), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axes.set_title(f"o ours, x the fastest rival; {title}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2, which="both")
    path.write_bytes(png(figure, 130))


def plot_latency(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Milliseconds of every contest, ours and the fastest rival, with their ranges."""
    from distilbert_fast.evaluation.report import new_figure, png

    figure = new_figure(10, 1.5 + 0.35 * len(rows))
    axes = figure.subplots()
    for place, one in enumerate(reversed(rows)):
        for name, color, shift in ((OURS, "tab:blue", 0.1), (next(rivals(one), None), "tab:gray", -0.1)):
            if name is not None:
                ms = [1e3 * value for value in one["contenders"][name]["seconds"]]
                middle = statistics.median(ms)
                error = [[middle - min(ms)], [max(ms) - middle]]
                axes.errorbar(middle, place + shift, xerr=error, fmt="o", color=color, markersize=4, capsize=2)
    axes.set_yticks(range(len(rows)), [f"{one['suite']}: {one['case']}" for one in reversed(rows)], fontsize=7)
    axes.set(xscale="log", xlabel="milliseconds; blue: ours, gray: the fastest rival")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.2, which="both", axis="x")
    path.write_bytes(png(figure, 130))
