"""The report of a demo: report.json (everything), report.md (to read) and report.png (to see).

What `distillation_report` writes too stands at the end. All come from one dict, whose layout is that of report.json:
`command`, `settings`, `task`, `stages` (what each made and how long it took), `date`, `machine`, `environment` (that of
`distilbert-fast env`), `inputs` (what was timed) and `models`: name -> row of numbers.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

SPREAD = 2.0  # slowest over fastest turn, above which other work disturbed a timing

ReportRow = Mapping[str, Any]
CLOCKS = {"ms, batch 1": "latency_ms", "sentences/s, batch 32": "throughput"}  # what we call them: key in the rows
LIBRARY_TITLES = {"transformers": "transformers", "distilbert_fast": "optimize()"}  # key in the rows: what we call it


def rows(content: Mapping[str, Any], ranges: bool = True) -> list[list[str]]:
    """The table of the report as text: a title and a cell for each model in a row; the first one holds their names."""
    models: Mapping[str, ReportRow] = content["models"]
    shown: dict[str, list[str]] = {
        title: [form(row) for row in models.values()]
        for title, form in (
            ("architecture", lambda row: row["architecture"]),
            ("layers", lambda row: str(row["layers"])),
            ("accuracy", lambda row: f"{row['accuracy']:.1%}"),
            ("macro-F1", lambda row: f"{row['macro_f1']:.1%}"),
            ("agreement with the teacher", lambda row: f"{row['agreement']:.1%}"),
            ("KL from the teacher, nats", lambda row: f"{row['kl_from_teacher']:.3f}"),
            ("parameters", lambda row: large(row["parameters"])),
            ("weight file", lambda row: f"{large(row['file_bytes'])}B"),
        )
    }
    for title, key in CLOCKS.items():
        for library, called in LIBRARY_TITLES.items():
            shown[f"{title}, {called}"] = [timing(row[key][library], ranges) for row in models.values()]
    return [["", *models], *([title, *cells] for title, cells in shown.items())]


def table(content: Mapping[str, Any]) -> Table:
    """The table of the report for a terminal, without the ranges of the timings."""
    title = f"{content['task']['name']}: {content['task']['eval_sentences']} sentences to evaluate"
    return terminal_table(title, rows(content, ranges=False))


def busy_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for each timing that other work on the machine disturbed, see `busy`."""
    return busy(
        (f"{name}, {title}, {called}", row[key][library])
        for title, key in CLOCKS.items()
        for library, called in LIBRARY_TITLES.items()
        for name, row in content["models"].items()
    )


def markdown(content: Mapping[str, Any]) -> str:
    """The text of report.md."""
    task, inputs = content["task"], content["inputs"]
    lines = [
        f"# Distilled and quantized on {task['name']}",
        "",
        *made_by(content),
        f"- **Task:** {task['train_sentences']} sentences to train on, {task['eval_sentences']} to evaluate "
        f"({task['eval_sentences_in_train']} of them also in the training split), {len(task['labels'])} classes: "
        f"{', '.join(task['labels'])}. Always saying the commonest class gives {task['majority_share']:.1%}.",
        "",
        *markdown_table(rows(content)),
        "",
        *bullets(busy_lines(content)),
        f"![accuracy, size and speed]({PLOT})",
        "",
        f"Timings: median over turns, with the range of the turns in brackets; all models take turns on the same "
        f"evaluation sentences of {inputs['mean_tokens']:.0f} tokens on average: {inputs['latency_sentences']} of them "
        f"at batch 1, {inputs['throughput_sentences']} at batch 32. *transformers* is the model as `from_pretrained` "
        "gives it; *optimize()* is the same model after `distilbert_fast.optimize`.",
        "",
        "## Stages",
        "",
        *(_stage(name, stage) for name, stage in content["stages"].items()),
        "",
        "`optimize` chose the same class as the model it was given for "
        + ", ".join(f"{row['optimized_agreement']:.1%} ({name})" for name, row in content["models"].items())
        + " of the evaluation sentences.",
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in content["settings"].items()),
        "",
        *use("SequenceClassification", "student", '# or "teacher", "student-int8"'),
    ]
    return "\n".join(lines) + "\n"


PLOT = "report.png"


def files(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name."""
    return {
        PLOT: plot(content),
        "report.json": as_json(content),
        "report.md": markdown(content).encode(),
    }


def plot(content: Mapping[str, Any]) -> bytes:
    """A PNG: accuracy with agreement, size, latency and throughput of each model."""
    models: Mapping[str, ReportRow] = content["models"]
    figure = new_figure(10, 7.5)
    (quality, size), (latency, throughput) = figure.subplots(2, 2)
    names = list(models)

    def bars(axes: Any, series: Mapping[str, list[float]], title: str, form: str, ranges: Any = None) -> None:
        width = 0.8 / len(series)
        for i, (label, values) in enumerate(series.items()):
            places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(names))]
            drawn = axes.bar(
                places,
                values,
                width * 0.94,
                label=LIBRARY_TITLES.get(label, label),
                yerr=ranges and ranges[label],
                capsize=3,
            )
            axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_title(title)
        axes.margins(y=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.07))

    def timings(axes: Any, key: str, title: str) -> None:
        series, ranges = {}, {}
        for library in LIBRARY_TITLES:
            measured = [row[key][library] for row in models.values()]
            series[library] = [m["median"] for m in measured]
            ranges[library] = [[m["median"] - m["low"] for m in measured], [m["high"] - m["median"] for m in measured]]
        bars(axes, series, title, "%.3g", ranges)

    percent = {
        "accuracy": [100 * row["accuracy"] for row in models.values()],
        "agreement with the teacher": [100 * row["agreement"] for row in models.values()],
    }
    bars(quality, percent, "accuracy and agreement, %", "%.1f")
    bars(size, {"": [row["file_bytes"] / 1e6 for row in models.values()]}, "weight file, MB", "%.1f")
    timings(latency, "latency_ms", "latency at batch 1, ms")
    timings(throughput, "throughput", "throughput at batch 32, sentences/s")
    machine = content["machine"]
    figure.suptitle(
        f"{content['task']['name']} on {machine['cpu']}, {content['inputs']['threads']} threads", fontsize=11
    )
    return png(figure, 130)


def _stage(name: str, stage: Mapping[str, Any]) -> str:
    proof = stage["read_back"]
    trained = f", {stage['steps']} steps" if "steps" in stage else ""
    resumed = " since it was continued" if stage.get("resumed") else ""
    layers = f", layers {', '.join(map(str, stage['layers']))} of the teacher" if "layers" in stage else ""
    made = f"{stage['seconds']:.0f} s{resumed}{trained}{layers}"
    return (
        f"- **{name}**: {made}. Read back from disk it chose the same class "
        f"for {proof['same_class']} of {proof['sentences']} sentences; largest difference of a logit "
        f"{proof['largest_difference']:.2g}."
    )


# Of any report --------------------------------------------------------------------------------------------------------


def timing(measured: Mapping[str, float], ranges: bool) -> str:
    median, low, high = (_three_digits(measured[key]) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})" if ranges else median


def large(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def busy(timings: Iterable[tuple[str, Mapping[str, float]]]) -> list[str]:
    """A line for each timing of these, by what it is called, whose turns spread by more than `SPREAD`."""
    return [
        f"The machine was busy: the turns of {name} spread by more than {SPREAD:g}×: {timing(measured, ranges=True)}."
        for name, measured in timings
        if measured["high"] > SPREAD * measured["low"]
    ]


def made_by(content: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: command, date, machine and versions."""
    machine, inputs, environment = content["machine"], content["inputs"], content["environment"]
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    yield from (
        f"Made by `{content['command']}` on {content['date']}.",
        "",
        f"- **Machine:** {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {inputs['threads']} threads, "
        f"device {inputs['device']}, CPU tier {environment['cpu']['tier']}",
        f"- **Versions:** Python {environment['python']}, {', '.join(versions)}",
    )


PIPELINES = {  # what the hub calls them, by head
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}


def model_card(content: Mapping[str, Any], row: ReportRow, name: str, made: str, text: Sequence[str]) -> str:
    """The card of a model that was made from a teacher, with what is known of it for the hub.

    Args:
        content: a report with `settings`, `head`, `data` and `metrics`.
        row: of the model, with its `quality`.
        made: how it was made, a tag.
        text: Markdown, in lines.
    """
    source, pipeline = teacher_of(content), PIPELINES[content["head"]]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type="text",
            dataset_name=content["data"]["name"],
            metric_type=metric,
            metric_value=round(row["quality"][metric], 6),
        )
        for metric, _, _ in content["metrics"]
        if metric in row["quality"]
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=source if source.count("/") == 1 and not source.startswith((".", "/")) else None,
        tags=[made, "distilbert_fast"],
        model_name=name,
        eval_results=results,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n"))


def teacher_of(content: Mapping[str, Any]) -> str:
    """The name of the teacher, or of the model that was fine-tuned, as it was given."""
    settings = content["settings"]
    return str((settings.get("teacher") or settings["model"]).partition(" (")[0])


def use(head: str, directory: str, comment: str = "") -> list[str]:
    """Markdown: how to load a model and its tokenizer."""
    return [
        "## Use",
        "",
        "```python",
        "import distilbert_fast",
        f"from transformers import AutoModelFor{head}, AutoTokenizer",
        "",
        f'model = AutoModelFor{head}.from_pretrained("{directory}")  {comment}'.rstrip(),
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")',
        "model = distilbert_fast.optimize(model)  # the same answers, faster",
        "```",
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose first row holds its titles."""
    head, *body = rows
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in body)


def bullets(lines: Sequence[str]) -> list[str]:
    """A list in Markdown with a blank line after it; nothing for no lines."""
    return [*(f"- {line}" for line in lines), ""] if lines else []


def terminal_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal."""
    head, *body = rows
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in body:
        table.add_row(*row)
    return table


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON of a report; a number that is undefined or infinite, for which JSON has no form, is null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_figure(width: float, height: float) -> Figure:
    """Of so many inches, for `png`, without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    return image.getvalue()
