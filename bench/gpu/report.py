"""The record of a run and its tables: what each case took, and its share of the limit that this GPU sets.

The limit of a case is the longer of its operations at the measured peak rate and its bytes at the measured bandwidth,
both of the same run (peaks.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.gpu.measure import OURS
from bench.gpu.runner import RUNNING, Outcome
from bench.harness import report as harness

NO_GPU = "not measured: no CUDA device"


@dataclass
class Report:
    machine: dict[str, Any]  # gpu (or why there is none), date, versions
    parts: list[dict[str, Any]] = field(default_factory=list)  # name, status, reason, seconds
    peaks: dict[str, float] = field(default_factory=dict)  # bytes, bf16, int8 a second
    cases: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)  # part, what, reason
    notes: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """A part's records, however it ended."""
        self.parts.append({key: value for key, value in outcome._asdict().items() if key != "records"})
        if outcome.status not in ("done", RUNNING):
            self.failures.append({"part": outcome.name, "what": outcome.status, "reason": outcome.reason})
        for record in outcome.records:
            rest = {key: value for key, value in record.items() if key != "kind"}
            if record["kind"] == "case":  # each is written again as it grows
                named = rest["op"], rest["case"]
                self.cases = [case for case in self.cases if (case["op"], case["case"]) != named] + [rest]
            elif record["kind"] == "peaks":
                self.peaks |= rest
            elif record["kind"] == "failure":
                self.failures.append({"part": outcome.name, **rest})
            elif record["kind"] == "note":
                self.notes.append(f"{outcome.name}: {rest['text']}")
            else:
                {"tuned": self.tuned, "tests": self.tests}[record["kind"]].append(rest)


def file_stem(gpu: str) -> str:
    """Of a GPU's name: "NVIDIA H100 80GB HBM3" gives "h100-80gb-hbm3"."""
    return "-".join(word for word in re.findall(r"[a-z0-9]+", gpu.lower()) if word != "nvidia")


def write_json(report: Report, path: Path) -> None:
    harness.write_json(with_shares(report), path)


def with_shares(report: Report) -> dict[str, Any]:
    """The record, with limit and share beside every time; without a GPU it says that nothing was measured."""
    record = asdict(report)
    for case in record["cases"]:
        if not any("median" in contender for contender in case["contenders"].values()):
            case["measured"] = NO_GPU
        for contender in case["contenders"].values():
            limit = limit_seconds(case["work"], contender.get("unit"), report.peaks)
            if limit is not None and "median" in contender:
                contender |= {"limit": limit, "share_of_limit": limit / contender["median"]}
    return record


def limit_seconds(work: Mapping[str, Any], unit: str | None, peaks: Mapping[str, float]) -> float | None:
    """The least seconds that the work can take here; None where its peak was not measured."""
    unit, limits = unit or work["unit"], []
    for amount, rate in ((work["operations"], unit), (work["moved_bytes"], "bytes")):
        if amount > 0:
            if rate not in peaks:
                return None
            limits.append(amount / peaks[rate])
    return max(limits, default=None)


def tables(report: Report) -> list[RenderableType]:
    """A table an op, then the parts, then what is missing or failed."""
    record = with_shares(report)
    out: list[RenderableType] = []
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        out.append(op_table(op, [case for case in record["cases"] if case["op"] == op]))
    out.append(parts_table(report))
    return [*out, *map(Text, remarks(report))]


def op_table(op: str, cases: Iterable[Mapping[str, Any]]) -> Table:
    cases = list(cases)
    measured = not all("measured" in case for case in cases)
    title = op if measured else f"{op}, {NO_GPU}"
    columns = "case,contender,ms,range,our best is,of the limit,peak extra MiB,".split(",")
    table = harness.table(title, columns, left=(0, 1, 7))
    for case in cases:
        ours = [c["median"] for name, c in case["contenders"].items() if name.startswith(OURS) and "median" in c]
        rows = sorted(case["contenders"].items(), key=lambda row: row[1].get("median", 0.0))
        for i, (name, contender) in enumerate(rows):
            mine, timed = name.startswith(OURS), "median" in contender
            table.add_row(
                case["case"] if i == 0 else "",
                name,
                harness.milliseconds(contender["median"]) if timed else "",
                harness.span(contender) if timed else "",
                f"{contender['median'] / contender.get('beside', min(ours)):.2f}x as fast"
                if timed and ours and not mine
                else "",
                f"{contender['share_of_limit']:.0%}" if "share_of_limit" in contender else "",
                f"{contender['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in contender else "",
                remark(contender, case.get("rows")),
                style="bold" if mine else None,
                end_section=i == len(rows) - 1,
            )
    return table


def remark(contender: Mapping[str, Any], rows: int | None) -> str:
    """Whether its results are right, and sequences a second."""
    said = []
    if rows is not None and "median" in contender:
        said.append(f"{rows / contender['median']:,.0f} sequences/s")
    if contender.get("host_bound"):
        said.append("waits for the host")
    if "agrees" not in contender:
        said.append("not compared")
    elif not contender["agrees"] or "median" not in contender:
        said.append(f"{'agrees' if contender['agrees'] else 'DISAGREES'}, error {contender['error']:.2g}")
    return ", ".join(said)


def parts_table(report: Report) -> Table:
    table = harness.table("parts", ("part", "", "s", "reason"), left=(0, 1, 3))
    for part in report.parts:
        table.add_row(part["name"], part["status"], f"{part['seconds']:.0f}", part["reason"])
    return table


def remarks(report: Report) -> list[str]:
    machine, peaks = report.machine, report.peaks
    units = {"bytes": (1e12, "TB/s copied"), "bf16": (1e12, "TFLOP/s bf16"), "int8": (1e12, "TOPS int8")}
    rates = ", ".join(f"{peaks[name] / scale:.2f} {unit}" for name, (scale, unit) in units.items() if name in peaks)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items()))
    lines = [f"{machine['gpu']}, {machine['date']}", f"peaks measured in this run: {rates or 'none'}", versions]
    for tests in report.tests:
        counts = ", ".join(f"{count} {name.lower()}" for name, count in tests["verdicts"].items())
        lines.append(f"tests: {counts}{'' if tests['complete'] else ', time ran out'}")
        lines += [f"  failed: {name}" for name in tests["failed"]]
    lines += report.notes
    seen = dict.fromkeys((name, reason) for case in report.cases for name, reason in case["missing"].items())
    lines += [f"not available: {name}: {reason}" for name, reason in seen]
    lines += [f"FAILED: {failure['part']}: {failure['what']}: {failure['reason']}" for failure in report.failures]
    return lines
