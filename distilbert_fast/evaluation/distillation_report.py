"""What a distillation leaves to read: report.md, report.json, a plot of its losses, and the student's model card.

All come from one dict, whose layout is that of report.json: `command`, `kind`, `head`, `settings`, `data`, `metrics`
(name, title, whether it is a share), `legend` (of these), `models` (name -> row: title, start, objective, losses,
quality, int8, parameters ...), `date`, `machine`, `environment`, `inputs` and `speed`.
"""

from __future__ import annotations

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

PLOT = "losses.png"
_CLOCKS = ("ms, batch 1", "rows/s, batch 32")


def files(content: Mapping[str, Any], student: str, made: str = "distilled") -> dict[str, bytes]:
    """The report's files by name, the model card of the student in its directory among them.

    ``made`` says what was done to it; ``settings`` have what it was made from under "teacher" or "model".
    """
    drawn = plot(content)
    return {
        "report.json": as_json(content),
        PLOT: drawn,
        f"{student}/{PLOT}": drawn,
        f"{student}/README.md": _card(content, student, made).encode(),
        "report.md": "\n".join([f"# {content['data']['name']}, {made}", "", *_body(content)]).encode(),
    }


def _card(content: Mapping[str, Any], student: str, made: str) -> str:
    row = content["models"][student]
    text = [
        f"# {row['layers']}-layer {row['architecture']}, {made}",
        "",
        f"{made.capitalize()} from {teacher_of(content)} with distilbert_fast.",
        "",
        *_body(content),
        "",
        *use(content["head"], student),
    ]
    return model_card(content, row, student, "distillation" if made == "distilled" else made, text)


def quality_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model: what it is, how good it is, and how good with int8 linear layers; titles first."""
    metrics = content["metrics"]
    head = ["", "starts from", "layers", "parameters", "weight file", *(title for _, title, _ in metrics)]
    first = metrics[0]
    table = [[*head, f"{first[1]}, int8"]]
    for row in content["models"].values():
        cells = [_shown(row["quality"].get(name), share) for name, _, share in metrics]
        table.append(
            [
                row["title"],
                row.get("start", ""),
                str(row["layers"]),
                large(row["parameters"]),
                f"{large(row['file_bytes'])}B",
                *cells,
                _shown(row["int8"].get(first[0]), first[2]),
            ]
        )
    return table


def table(content: Mapping[str, Any]) -> Table:
    """`quality_rows` for a terminal, without what is the same for most models."""
    body = [[row[0], *row[5:]] for row in quality_rows(content)]
    return terminal_table(f"{content['kind']}: {content['data']['name']}", body)


def busy_lines(content: Mapping[str, Any]) -> list[str]:
    """A line for each timing that other work on the machine disturbed, see `busy`."""
    by_clock = zip(_CLOCKS, content["speed"].values(), strict=True)
    return busy((f"{name}, {clock}", value) for clock, by_name in by_clock for name, value in by_name.items())


def plot(content: Mapping[str, Any]) -> bytes:
    """A PNG: the losses of every model over its steps, a panel for each loss."""
    trained = {name: row for name, row in content["models"].items() if row["losses"]}
    kinds = list(dict.fromkeys(key for row in trained.values() for entry in row["losses"] for key in entry))
    kinds = [kind for kind in kinds if kind != "step"] or ["loss"]
    figure = new_figure(4.2 * len(kinds), 3.6)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for row in trained.values():
            entries = [entry for entry in row["losses"] if kind in entry]
            if entries:
                label = row["title"]
                axes.plot([e["step"] for e in entries], [e[kind] for e in entries], label=label, linewidth=1.2)
        axes.set_title("weighted sum" if kind == "loss" else kind)
        axes.set_xlabel("optimizer step")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return png(figure, 110)


def _body(content: Mapping[str, Any]) -> Iterator[str]:
    inputs = content["inputs"]
    yield from (
        *made_by(content),
        *(f"- **Data, {name}:** {value}" for name, value in content["data"].items() if value is not None),
        "",
        "## Evaluation",
        "",
        *markdown_table(quality_rows(content)),
        "",
        f'{content["legend"]} Each model as read back from its directory; int8 is `optimize(model, "int8")`.',
        "",
        f"![losses over time]({PLOT})",
        "",
        "## Speed",
        "",
        *markdown_table(_speed_rows(content)),
        "",
        *bullets(busy_lines(content)),
        f"Median over turns of all models, with the range in brackets, on the evaluation data: "
        f"{inputs['latency_rows']} rows at batch 1, {inputs['throughput_rows']} at batch 32, "
        f"{inputs['mean_tokens']:.0f} tokens on average"
        + ("; encoders without head." if content["kind"] == "mlm" else "."),
        "",
        "## Recipe",
        "",
        *(line for row in content["models"].values() for line in _training(row)),
        "",
        *(f"- {name}: {_flat(value)}" for name, value in content["settings"].items()),
        *_made_of(content["models"]),
    )


def _training(row: Mapping[str, Any]) -> Iterator[str]:
    if row["losses"]:
        resumed = " since it was continued" if row["resumed"] else ""
        last = ", ".join(f"{name} {value:.3f}" for name, value in row["losses"][-1].items() if name != "step")
        objective = _flat(row["objective"]) or "the defaults"
        spent = f"{row['steps']} steps in {row['seconds']:.0f} s{resumed}"
        yield f"- **{row['title']}**: {spent}; {objective}; in the end {last}"
    if effect := row.get("teacher_effect"):
        yield f"  - the teacher's precision, compared with its own forward, by the first rows: {_effect(effect)}"
    if cache := row.get("cache"):
        size = f"{cache['bytes_per_token']:.0f} bytes a token, {cache['tail_mass']:.2%} of the mass in its tail"
        yield f"  - the teacher's cache: {size}; compared with all its logits, by the first rows: {_effect(cache)}"


def _made_of(models: Mapping[str, Any]) -> Iterator[str]:
    """What the student was copied from; its variants alike."""
    for made_of in [row["made_of"] for row in models.values() if "made_of" in row][:1]:
        yield from ("", "## What it is made of", "", "```", made_of, "```")


def _effect(row: Mapping[str, float]) -> str:
    """What `teacher_effect` found, by its first loss."""
    (name,) = (name for name in row if name not in ("loss_change", "bytes_per_token", "tail_mass"))
    return f"{name} {row[name]:.2g} apart, which changes the student's loss by {row['loss_change']:+.2%}"


def _speed_rows(content: Mapping[str, Any]) -> list[list[str]]:
    speeds = content["speed"]
    return [
        ["", *_CLOCKS],
        *([name, *(timing(speeds[key][name], ranges=True) for key in speeds)] for name in speeds["latency_ms"]),
    ]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(entry)}" for key, entry in value.items() if entry is not None)
    return str(value)


def _shown(value: float | None, share: bool) -> str:
    return "" if value is None else f"{value:.1%}" if share else f"{value:.3f}"
