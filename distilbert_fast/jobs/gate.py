"""The gate of `compress`: which of the models that were measured is worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distilbert_fast.jobs.settings import Goals

TOLERANCE = 0.05  # by which the turns of a timing spread: a target that is missed by no more counts as met

ReportRow = Mapping[str, Any]  # of report.json: "quality", "file_bytes", "speedup" by clock


def faults(
    row: ReportRow, teacher: ReportRow, metric: str, clock: str, goals: Goals, target: float | None
) -> list[str]:
    """Why a model is rejected; nothing for one that passes.

    Args:
        row, teacher: the model and what it was made from.
        metric: the name of the job's first metric; a point is 0.01 of it.
        clock: "latency" or "throughput".
        target: the speed-up that it was made for.
    """
    found = []
    speedup, drop = row["speedup"][clock], 100 * (teacher["quality"][metric] - row["quality"][metric])
    if speedup <= 1 and row["file_bytes"] >= teacher["file_bytes"]:
        found.append(f"neither faster ({speedup:.2f}×) nor smaller than the teacher")
    if target is not None and speedup < target * (1 - TOLERANCE):
        found.append(f"{speedup:.2f}× as fast, {target:g}× was asked for")
    if goals.accuracy_drop is not None and not drop <= goals.accuracy_drop + 1e-9:  # NaN is no quality
        found.append(f"{drop:.2f} points of {metric} lost, {goals.accuracy_drop:g} are allowed")
    return found


def fastest(names: Sequence[str], rows: Mapping[str, ReportRow], clock: str) -> str:
    """The name of the fastest of some models, the first of equals."""
    return max(names, key=lambda name: rows[name]["speedup"][clock])


def pareto(rows: Mapping[str, ReportRow], metric: str, clock: str) -> list[str]:
    """Names of the models that no other surpasses: none is as fast and as good, and better in one of them."""

    def both(row: ReportRow) -> tuple[float, float]:
        return row["speedup"][clock], row["quality"][metric]

    def surpassed(row: ReportRow) -> bool:
        fast, good = both(row)
        return any(f >= fast and g >= good and (f, g) != (fast, good) for f, g in map(both, rows.values()))

    return [name for name, row in rows.items() if not surpassed(row)]
