"""The tables, the JSON and the plot of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.harness import report as harness
from bench.peers.contest import Report
from bench.peers.engines import PRECISIONS


def file_stem(cpu: str) -> str:
    """Of a CPU's name: "Intel(R) Xeon(R) Processor" gives "intel-xeon-processor-peers"."""
    plain = re.sub(r"\((r|tm)\)|@.*", "", cpu.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), "peers"])


def write_json(report: Report, path: Path) -> None:
    harness.write_json(asdict(report), path)


def tables(report: Report) -> list[RenderableType]:
    """A table a model and workload, then the verdicts, then who is missing and why."""
    out: list[RenderableType] = []
    for model in report.models:
        for workload in report.workloads:
            table = results_table(report, model, workload)
            if table.rows:
                out.append(table)
    if report.verdicts:
        out.append(verdicts_table(report))
    out += notes(report)
    return out


def results_table(report: Report, model: str, workload: str) -> Table:
    table = harness.table(
        f"{model}, {workload}", "class,engine,ms,range,ours is,of peak,cosine,max abs,".split(","), left=(0, 1, 8)
    )
    for precision in PRECISIONS:
        rows = [
            row
            for row in report.results
            if (row["model"], row["workload"], row["precision"]) == (model, workload, precision)
        ]
        for i, row in enumerate(rows):
            ratio = row["ours_is_faster"]
            remarks = []
            if row["batches"] > 1:
                remarks.append(f"in {row['batches']} length buckets")
            if row["disturbed_turns"]:
                remarks.append(f"{row['disturbed_turns']} of {len(row['rounds'])} turns disturbed")
            table.add_row(
                precision if i == 0 else "",
                row["engine"],
                harness.milliseconds(row["seconds"]["median"], 2),
                harness.span(row["seconds"], 2),
                f"{ratio['median']:.2f}x as fast" if ratio else "",
                f"{row['share_of_peak']:.0%}",
                f"{row['cosine']:.6f}",
                f"{row['max_abs']:.3g}",
                ", ".join(remarks),
                style="bold" if row["ours"] else None,
                end_section=i == len(rows) - 1,
            )
    return table


def verdicts_table(report: Report) -> Table:
    columns = "model,workload,ours,ms,fastest rival of its class,ms,ours is,range,of peak"
    table = harness.table("ours against the fastest rival", columns.split(","), left=(0, 1, 2, 4))
    for row in report.verdicts:
        ratio = row["ratio"]
        table.add_row(
            row["model"],
            row["workload"],
            row["ours"].partition("-")[2],
            harness.milliseconds(row["seconds"]["median"], 2),
            row["rival"],
            harness.milliseconds(row["rival_seconds"]["median"], 2),
            f"{ratio['median']:.2f}x as fast",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            f"{row['share_of_peak']:.0%}",
        )
    return table


def notes(report: Report) -> list[Text]:
    machine, peaks = report.machine, report.peaks
    rates = ", ".join(f"{name} {rate / 1e12:.2f} TOPS" for name, rate in peaks["operations_per_second"].items())
    reads = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in peaks["read_bytes_per_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    lines = [
        f"{machine['cpu']}, cores {machine['cores']}, {machine['threads']} threads, {machine['date']}",
        f"peaks measured in this run: {rates}; reads: {reads}; by {peaks['how']}",
        f"versions: {versions}",
        *machine["notes"],
        *(missing(entry) for entry in report.unavailable),
    ]
    return [Text(line) for line in lines]


def missing(entry: Mapping[str, Any]) -> str:
    where = ", ".join(str(entry[key]) for key in ("engine", "model", "workload") if entry[key])
    return f"not available: {where}: {entry['reason']}"


def write_plot(report: Report, path: Path) -> None:
    """Microseconds a real token, one panel a model and class; ours filled and joined, rivals hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(report.models) or ["no model"]
    figure = Figure(figsize=(15, 5.2 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(PRECISIONS), squeeze=False)
    places = {workload: place for place, workload in enumerate(report.workloads)}
    for model, row in zip(models, panels, strict=True):
        for precision, axes in zip(PRECISIONS, row, strict=True):
            of_panel = [r for r in report.results if (r["model"], r["precision"]) == (model, precision)]
            for i, engine in enumerate(_engines(of_panel)):
                points = sorted((places[r["workload"]], r) for r in of_panel if r["engine"] == engine)
                ours = points[0][1]["ours"]
                axes.plot(
                    [place for place, _ in points],
                    [1e6 * r["seconds"]["median"] / sum(report.workloads[r["workload"]]) for _, r in points],
                    marker="osD^vP<>X*"[i % 10],
                    markersize=7,
                    markerfacecolor=None if ours else "none",
                    linewidth=2.5 if ours else 0.6,
                    alpha=1 if ours else 0.8,
                    label=engine,
                )
            axes.set_yscale("log")
            axes.set_title(f"{model}, {precision}")
            axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right")
            axes.set_ylabel("µs a token (lower is better)")
            axes.grid(axis="y", which="both", alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
            if of_panel:
                axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{report.machine['cpu']}, {report.machine['threads']} threads, {report.machine['date'][:10]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _engines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ours first."""
    return sorted({row["engine"] for row in results}, key=lambda name: (not name.startswith("distilbert_fast"), name))
