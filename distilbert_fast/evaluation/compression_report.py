"""What a compression leaves to read: report.md, report.json, a plot of accuracy against speed, and a model card.

All come from one dict, whose layout is that of report.json: `command`, `head`, `settings`, `data`, `metrics` (name,
title, whether it is a share), `legend` (of these), `goals`, `models` (name -> row: title, layers, parameters,
file_bytes, quality, latency_ms, throughput, speedup by clock), `pareto` (names, by clock), `gate`, `date`, `machine`,
`environment` and `inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from distilbert_fast.evaluation.report import (
    as_json,
    bullets,
    busy,
    large,
    made_by,
    markdown_table,
    model_card,
    new_figure,
    png,
    teacher_of,
    terminal_table,
    timing,
    use,
)

FILES = ("report.md", "report.json", "curve.png")
_CLOCKS = {"latency": "batch 1", "throughput": "batch 32"}
_TIMINGS = {"ms, batch 1": "latency_ms", "rows/s, batch 32": "throughput"}


def files(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name."""
    text = "\n".join(["# Compression", "", *_body(content)])
    return dict(zip(FILES, (text.encode(), as_json(content), plot(content)), strict=True))


def standard_error(content: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Of the first metric, if that is a share of the rows that are right: √(p (1 − p) / n)."""
    name, _, share = content["metrics"][0]
    right = row["quality"][name]
    return math.sqrt(right * (1 - right) / content["data"]["eval"]) if share else None


def rows(content: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model: how large, fast and good it is; titles first. What no other surpasses has a star."""
    metrics, best = content["metrics"], content["pareto"][content["goals"]["clock"]]
    head = ["", "layers", "parameters", "weight file", *(title for _, title, _ in metrics)]
    table = [[*head, *_TIMINGS, *(f"speed-up, {title}" for title in _CLOCKS.values())]]
    for name, row in content["models"].items():
        cells = [_shown(row["quality"].get(metric), share) for metric, _, share in metrics]
        error = standard_error(content, row)
        cells[0] += "" if error is None else f" ± {100 * error:.1f}"
        table.append(
            [
                row["title"] + (" *" if name in best else ""),
                str(row["layers"]),
                large(row["parameters"]),
                f"{large(row['file_bytes'])}B",
                *cells,
                *(timing(row[key], ranges=False) for key in _TIMINGS.values()),
                *(f"{row['speedup'][clock]:.1f}×" for clock in _CLOCKS),
            ]
        )
    return table


def table(content: Mapping[str, Any]) -> Table:
    """The columns of `rows` that fit a terminal."""
    head, *body = rows(content)
    shown = [0, 3, 4, 3 + len(content["metrics"]), len(head) - 2, len(head) - 1]
    narrow = [[row[place] for place in shown] for row in [head, *body]]
    return terminal_table(f"{content['data']['name']}: {content['data']['eval']} rows", narrow)


def verdict(content: Mapping[str, Any]) -> Iterator[str]:
    """A line for each model that the gate judged."""
    for name, found in content["gate"]["models"].items():
        title = content["models"][name]["title"]
        yield f"{title}: " + ("rejected: " + "; ".join(found["faults"]) if found["faults"] else "passed")


def busy_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for each timing that other work on the machine disturbed, see `busy`."""
    every = content["models"].values()
    return busy((f"{row['title']}, {title}", row[key]) for row in every for title, key in _TIMINGS.items())


def plot(content: Mapping[str, Any]) -> bytes:
    """A PNG: the first metric of every model against its speed-up, a panel for each clock."""
    name, title, share = content["metrics"][0]
    scale = 100 if share else 1
    figure = new_figure(11, 4.6)
    for axes, (clock, called) in zip(figure.subplots(1, 2, sharey=True), _CLOCKS.items(), strict=True):
        for key, row in content["models"].items():
            error = standard_error(content, row)
            marker = "o" if key in content["pareto"][clock] else "x"
            at = row["speedup"][clock], scale * row["quality"][name]
            axes.errorbar(*at, yerr=error and scale * error, fmt=marker, capsize=2, markersize=5)
            axes.annotate(row["title"], at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        best = sorted(
            (content["models"][key] for key in content["pareto"][clock]), key=lambda row: row["speedup"][clock]
        )
        line = [row["speedup"][clock] for row in best], [scale * row["quality"][name] for row in best]
        axes.plot(*line, color="grey", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50], [f"{tick}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"times as fast as the teacher by transformers, {called}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel(f"{title}, %" if share else title)
    threads = content["inputs"]["threads"]
    figure.suptitle(f"{content['data']['name']} on {content['machine']['cpu']}, {threads} threads", fontsize=10)
    return png(figure, 130)


def card(content: Mapping[str, Any], name: str) -> str:
    """The model card of a compressed model."""
    row, teacher = content["models"][name], content["models"]["teacher"]
    speedup, size = row["speedup"], 100 * row["file_bytes"] / teacher["file_bytes"]
    text = [
        f"# {row['architecture']} of {row['layers']} layers, compressed",
        "",
        f"Made of {teacher_of(content)} with distilbert_fast. Its weight file is {size:.0f}% of the teacher's; on the "
        f"machine below it is {speedup['latency']:.1f} times as fast as the teacher by transformers at batch 1, and "
        f"{speedup['throughput']:.1f} times at batch 32.",
        "",
        *_body(content, picture=False),
        "",
        *use(content["head"], name.rpartition("/")[2]),
    ]
    return model_card(content, row, name.rpartition("/")[2], "compression", text)


def _body(content: Mapping[str, Any], picture: bool = True) -> Iterator[str]:
    inputs, goals = content["inputs"], content["goals"]
    asked = [f"{speedup:g}×" for speedup in goals["speedups"]]
    if goals["accuracy_drop"] is not None:
        asked.append(f"at most {goals['accuracy_drop']:g} points of {content['metrics'][0][1]} lost")
    yield from (
        *made_by(content),
        *(f"- **Data, {name}:** {value}" for name, value in content["data"].items() if value is not None),
        f"- **Goals:** {', '.join(asked)}; the speed that counts is that at {_CLOCKS[goals['clock']]}",
        "",
        *bullets(list(verdict(content))),
        *markdown_table(rows(content)),
        "",
        f"{content['legend']} ± is one standard error on {content['data']['eval']} rows. Each model as read back from "
        "its directory. * No other model is as fast and as good, and better in one of them.",
        "",
        *bullets(busy_lines(content)),
        "Speed-ups are over the teacher by transformers (sdpa, float32), which took turns with each model on the same "
        f"evaluation rows: {inputs['latency_rows']} at batch 1, {inputs['throughput_rows']} at batch 32, "
        f"{inputs['mean_tokens']:.0f} tokens on average; medians over turns. All others run on the engine.",
        "",
        *([f"![{content['metrics'][0][1]} against speed]({FILES[2]})", ""] if picture else []),
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in content["settings"].items()),
    )


def _shown(value: float | None, share: bool) -> str:
    return "" if value is None else f"{value:.1%}" if share else f"{value:.3f}"
