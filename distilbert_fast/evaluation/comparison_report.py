"""The report of `compare`: compare.json, a plot of size against time, and compare.html, one file that stands alone.

All come from one dict, whose layout is that of compare.json: `command`, `settings`, `inputs`, `rows` (name -> title,
weights, parameters, with_head, file_bytes, flops, latency_ms, throughput, times_reference, peak_bytes, cold_start_s,
perhaps scores), `date`, `machine` and `environment`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from distilbert_fast.evaluation.report import (
    as_json,
    busy,
    large,
    made_by,
    markdown_table,
    new_figure,
    png,
    terminal_table,
    timing,
)

FILES = ("compare.json", "compare.md", "compare.png", "compare.html")
PAPER_PAIRS = 1500  # of STS-B's development set, which DistilBERT's paper timed a pass over
PAPER = "DistilBERT's paper (arXiv:1910.01108v4, table 3: Xeon E5-2690 v3, batch 1)"
# What was published: millions of parameters, and seconds of a pass over STS-B's development set at batch 1; GLUE's mean
# of nine tasks. RoBERTa's size is that of fairseq's list of models.
PUBLISHED: Mapping[str, tuple[float, float | None, float | None]] = {
    "elmo-bilstm": (180, 895, 68.7),
    "bert-base": (110, 668, 79.5),
    "roberta-base": (125, None, None),
    "distilbert-base": (66, 410, 77.0),
}
_TITLES = (
    "",
    "parameters",
    "published",
    "weight file",
    "MFLOPs a token",
    "ms, batch 1",
    "times BERT",
    "published",
    "pairs/s, batch 32",
    "times BERT",
    "peak MiB",
    "cold start, s",
)


def files(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name."""
    picture = plot(content)
    made = (as_json(content), markdown(content).encode(), picture, page(content, picture).encode())
    return dict(zip(FILES, made, strict=True))


def rows(content: Mapping[str, Any], ranges: bool = False) -> list[list[str]]:
    """A row for each contender, titles first; the scores of those that have some come last."""
    found, tokens = content["rows"], content["inputs"]["flops_tokens"]
    metrics = list(dict.fromkeys(metric for row in found.values() for metric in row.get("scores", {})))
    table = [[*_TITLES, *metrics]]
    for name, row in found.items():
        parameters, seconds, _ = PUBLISHED.get(name, (None, None, None))
        faster = PUBLISHED["bert-base"][1] / seconds if seconds else None  # type: ignore[operator]
        table.append(
            [
                row["title"],
                large(row["parameters"]),
                f"{parameters:g} M" if parameters else "",
                f"{large(row['file_bytes'])}B",
                f"{row['flops'] / tokens / 1e6:.0f}",
                timing(row["latency_ms"], ranges),
                _times(row["times_reference"]["latency"], ranges),
                f"{faster:.2f}×" if faster else "",
                timing(row["throughput"], ranges),
                _times(row["times_reference"]["throughput"], ranges),
                f"{row['peak_bytes'] / 2**20:.0f}",
                timing(row["cold_start_s"], ranges),
                *(f"{row['scores'][m]:.4f}" if m in row.get("scores", {}) else "" for m in metrics),
            ]
        )
    return table


def table(content: Mapping[str, Any]) -> Table:
    """The table for a terminal, without what was published and the ranges."""
    return terminal_table(
        f"{content['inputs']['of']}: {content['inputs']['mean_tokens']:.1f} tokens a pair",
        [[*row[:2], *row[3:7], *row[8:]] for row in rows(content)],
    )


def markdown(content: Mapping[str, Any]) -> str:
    """The text of compare.md."""
    lines = ["# DistilBERT and others", "", *made_by(content), "", *markdown_table(rows(content, ranges=True)), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(content))]) + "\n"


def notes(content: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know, a line each; first how DistilBERT compares with BERT, here and as published."""
    found, inputs = content["rows"], content["inputs"]
    if "distilbert-base" in found:
        here = found["distilbert-base"]["times_reference"]["latency"]
        yield (
            f"DistilBERT under transformers takes 1/{here['median']:.2f} of BERT's time at batch 1 "
            f"({here['low']:.2f} to {here['high']:.2f}); published: 1/{668 / 410:.2f}."
        )
    for name, row in found.items():
        if name in PUBLISHED and (seconds := PUBLISHED[name][1]):
            here = row["latency_ms"]["median"] * PAPER_PAIRS / 1e3
            yield (
                f"{row['title']}: {here:.0f} s for a pass over {PAPER_PAIRS} pairs; published: {seconds:g} s, {PAPER}; "
                f"GLUE's mean there: {PUBLISHED[name][2]:g}."
            )
    if "elmo-bilstm" in found:
        yield (
            "ELMo's 180 M are its language model (93.6 M), GLUE's BiLSTM of two layers of 1,500 units a direction "
            "(84 M) and a hidden layer, 1.5 M for one sentence; for a pair, which it reads here, it has 6.1 M."
        )
    yield (
        f"Medians over {content['settings']['turns']} turns beside BERT-base under transformers; ratios are taken "
        f"inside a turn. {content['settings']['pairs']} pairs at batch 1, {32 * content['settings']['batches']} at "
        "batch 32, the lengths of " + inputs["of"] + ", words at random. Parameters: without the task head. "
        f"FLOPs: of a pair of {inputs['flops_tokens']} tokens, two for each multiplication and addition. Peak: "
        "resident memory of the process. Cold start: from the start of the process to its first answer, files in the "
        "page cache."
    )
    yield from busy(
        (f"{row['title']}, {key}", row[key]) for row in found.values() for key in ("latency_ms", "throughput")
    )


def plot(content: Mapping[str, Any]) -> bytes:
    """A PNG: the weight file against milliseconds a pair, at batch 1 and at batch 32; left and low is best."""
    figure = new_figure(12, 5)
    inputs, found = content["inputs"], content["rows"]
    clocks = {
        "batch 1": lambda row: row["latency_ms"]["median"],
        "batch 32": lambda row: 1e3 / row["throughput"]["median"],
    }
    for axes, (title, milliseconds) in zip(figure.subplots(1, 2, sharey=True), clocks.items(), strict=True):
        for name, row in found.items():
            ours = name.partition(":")[1] == ":"
            at = milliseconds(row), row["file_bytes"] / 1e6
            axes.plot(*at, "o" if ours else "s", color="tab:blue" if ours else "tab:gray")
            label = name if ours else f"{name}, {'torch' if name == 'elmo-bilstm' else 'transformers'}"
            axes.annotate(label, at, xytext=(5, 4), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.set_xlabel(f"milliseconds a pair, {title}")
        axes.margins(x=0.25, y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, which="both")
    figure.axes[0].set_ylabel("weight file, MB")
    figure.suptitle(f"{content['machine']['cpu']}, {inputs['threads']} threads, {content['date'][:10]}", fontsize=10)
    return png(figure, 130)


def page(content: Mapping[str, Any], picture: bytes) -> str:
    """The HTML page, its picture inside."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head, *body = rows(content, ranges=True)
    machine, inputs = content["machine"], content["inputs"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>DistilBERT and others</title><style>',
            "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:90em;padding:0 1em}",
            "table{border-collapse:collapse;font-size:13px}th,td{padding:.3em .7em;text-align:right;"
            "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}img{max-width:100%}",
            "</style></head><body>",
            "<h1>DistilBERT and others</h1>",
            f"<p>Made by <code>{html.escape(content['command'])}</code> on {html.escape(content['date'])}: "
            f"{html.escape(machine['cpu'])}, {inputs['threads']} threads, tier "
            f"{html.escape(str(content['environment']['cpu']['tier']))}.</p>",
            "<table>",
            cells(head, "th"),
            *(cells(row, "td") for row in body),
            "</table>",
            f'<p><img alt="size against time" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>',
            "<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in notes(content)),
            "</ul></body></html>",
            "",
        ]
    )


def _times(ratio: Mapping[str, float], ranges: bool) -> str:
    shown = f"{ratio['median']:.2f}×"
    return f"{shown} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ranges else shown
