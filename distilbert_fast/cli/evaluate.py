"""`distilbert-fast evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbert_fast.cli.errors import plain_errors

if TYPE_CHECKING:
    from distilbert_fast.jobs.score import Scored

EPILOG = """\
[bold]Examples[/bold]

A model on GLUE's file, by transformers and by our engine in two precisions:

    distilbert-fast evaluate --task sst2 --data SST-2/dev.tsv --model ./my-bert --precision transformers,int8,bf16

Models of three seeds on a file of yours, with their median and range, and their predictions in a directory:

    distilbert-fast evaluate --data dev.csv --model s1 --model s2 --model s3 -o results

Answers to SQuAD's questions, scored as its own scripts do, without a model:

    distilbert-fast evaluate --task squad --data dev-v1.1.json --predictions answers.json
    distilbert-fast evaluate --task squad_v2 --data dev-v2.0.json --predictions answers.json --na-prob na.json --json

Labels in GLUE's form of submission (index and prediction), entities in CoNLL's columns (the tag in the last):

    distilbert-fast evaluate --task mrpc --data MRPC/dev.tsv --predictions MRPC.tsv
    distilbert-fast evaluate --task entities --data eng.testb --predictions tagged.conll
"""


GLUE_EPILOG = """\
[bold]Examples[/bold]

A model for each task, in runs/cola, runs/sst2 and so on, on GLUE's files, by transformers and in int8:

    distilbert-fast evaluate glue --model-dir 'runs/{task}' --data-dir glue_data --precision transformers,int8

Three seeds, with median and range:

    distilbert-fast evaluate glue --model-dir 's1/{task}' --model-dir 's2/{task}' --model-dir 's3/{task}' -o results
"""

# Options of both commands.
Precision = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="How to run it: transformers (its own forward), auto (optimized as it is), fp32, bf16, fp16, int8; "
        "several with commas.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows of a call.")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens a row. By default up to 512, as many as the model reads; of questions, 384."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Write predictions and evaluation.json into it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, numbers in full.")]

app = typer.Typer(invoke_without_command=True, epilog=EPILOG)


@app.callback()
def evaluate(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cola, sst2, mrpc, stsb, qqp, mnli, mnli_mismatched, qnli, rte, wnli, ax; cb, boolq, axb, axg; imdb, "
            "ag_news; squad, squad_v2; entities, tags. None: a file with the columns sentence or of a pair, and label.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The true answers, in a file as the task publishes it; by default the hub's."
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="SQuAD: JSON of answers by id. Labels: index and prediction as TSV, or one a line. Entities: CoNLL's "
            "columns; without --data the last two are the true and the predicted tag.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_ID", help="A model to judge; give it again for more, such as those of seeds."),
    ] = None,
    precision: Precision = "transformers",
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens by which windows of a long context overlap; by default 128, or a third of a window."),
    ] = None,
    output: Output = None,
    na_prob: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="squad_v2: JSON of the probabilities that a question has no answer."),
    ] = None,
    na_prob_thresh: Annotated[
        float, typer.Option(help="squad_v2: above this probability an answer counts as none.")
    ] = 1.0,
    regression: Annotated[bool, typer.Option("--regression", help="Labels of a file of yours are numbers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge models, or predictions in a file, by the task's own metrics, to the last digit of its own script.

    SQuAD 1.1 and 2.0: exact match and F1 in percent. Entities: precision, recall and F1, over all and type by type.
    Others: accuracy, F1, Matthews', Pearson's and Spearman's correlation as the task asks.
    """
    if context.invoked_subcommand is not None:
        return
    with plain_errors("nothing was written"):
        from distilbert_fast.jobs.score import score
        from distilbert_fast.jobs.settings import RecipeError

        if (predictions is None) is not bool(model):
            got = "both" if model else "neither"
            raise RecipeError(f"evaluate: expected --model or --predictions, got {got}")
        if predictions is None:
            _models(
                task,
                data,
                model or [],
                (_listed(precision), batch_size, max_length, stride, output),
                regression,
                as_json,
            )
            return
        scored = score(task, data, predictions, na_prob, na_prob_thresh, regression)
        if as_json:
            _print_json(scored.as_json())
        else:
            _print(task or str(data), scored)


@app.command("glue", epilog=GLUE_EPILOG)
def glue(
    model_dir: Annotated[
        list[str],
        typer.Option(metavar="DIR", help="With {task} for the task's name; give it again for other seeds."),
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="GLUE's files as published, CoLA/dev.tsv and so on; by default the hub's."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="LIST", help="With commas between; by default all that there are models and data of.")
    ] = "",
    precision: Precision = "transformers",
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Judge a model for each task of GLUE, with their mean.

    The model of mnli also answers mnli_mismatched and the diagnostics ax, which do not count in the mean.
    """
    with plain_errors("nothing was written"):
        from distilbert_fast.evaluation.report import terminal_table
        from distilbert_fast.jobs.evaluate import Settings, spread
        from distilbert_fast.jobs.flow import console
        from distilbert_fast.jobs.glue import evaluate_glue, glue_content, means

        ways = _listed(precision)
        settings = Settings(ways, batch_size, max_length, output=output)
        results, left_out = evaluate_glue(model_dir, data_dir, settings, _listed(tasks))
        if as_json:
            _print_json(glue_content(results, left_out))
            return
        rows = [["task", "n", "metric", *ways]]
        for name, found in results.items():
            over = spread(found)
            for metric in found[0].scored.metrics:
                cells = [_range(metric, over[way][metric], len(model_dir)) for way in ways]
                if len(model_dir) == 1:
                    cells = [_with_error(metric, one.scored) for one in found]
                rows.append([name, str(found[0].scored.count), metric, *cells])
        rows.append(["mean", "", "", *(f"{100 * value:.2f}" for value in means(results).values())])
        say = console()
        say(terminal_table("", rows), *(f"left out: {name}: {why}" for name, why in left_out.items()))


def _print_json(content: Mapping[str, Any]) -> None:
    from distilbert_fast.evaluation.report import as_json

    print(as_json(content).decode(), end="")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _models(
    task: str | None,
    data: Path | None,
    models: list[str],
    settings: tuple[Any, ...],
    regression: bool,
    as_json: bool,
) -> None:
    from distilbert_fast.evaluation.report import terminal_table
    from distilbert_fast.jobs.evaluate import Settings, content, evaluate, spread
    from distilbert_fast.jobs.flow import console

    results = evaluate(task, data, models, Settings(*settings), regression)
    if as_json:
        _print_json(content(task, data, results))
        return
    unit = results[0].scored.unit
    names = [name for name in results[0].scored.metrics if not name.endswith(("total", "_thresh"))]
    rows = [["model", "run in", *names, f"{unit}/s"]]
    for one in results:
        cells = [_with_error(name, one.scored) for name in names]
        rows.append([Path(one.model).name, one.precision, *cells, f"{one.rows / one.seconds:.4g}"])
    if len(models) > 1:
        for way, found in spread(results).items():
            cells = [_range(name, found[name], len(models), unit) for name in names]
            rows.append([f"median of {len(models)}", way, *cells, ""])
    if len(names) > _WIDE:
        rows = [list(cells) for cells in zip(*rows, strict=True)]
    say = console()
    say(f"{task or data}: {results[0].scored.count} {unit}", terminal_table("", rows))
    if len(results) == 1 and results[0].scored.kinds:
        say(_kinds(results[0].scored))


_WIDE = 4  # metrics of a row; if there are more, each has a row


def _range(name: str, found: Mapping[str, float], models: int, unit: str = "rows") -> str:
    cells = {of: shown(name, value, unit) for of, value in found.items()}
    return f"{cells['median']} ({cells['low']} to {cells['high']})" if models > 1 else cells["median"]


def _with_error(name: str, scored: Scored) -> str:
    value, error = shown(name, scored.metrics[name], scored.unit), scored.errors.get(name)
    return value if error is None else f"{value} ± {shown(name, error, scored.unit)}"


def _print(title: str, scored: Scored) -> None:
    from distilbert_fast.evaluation.report import terminal_table
    from distilbert_fast.jobs.flow import console

    say = console()
    rows = [["metric", "value", "± standard error"]]
    for name, value in scored.metrics.items():
        error = scored.errors.get(name)
        rows.append([name, shown(name, value, scored.unit), "" if error is None else shown(name, error, scored.unit)])
    if not scored.errors:
        rows = [row[:2] for row in rows]
    say(f"{title}: {scored.count} {scored.unit}", terminal_table("", rows))
    if scored.kinds:
        say(_kinds(scored))


def _kinds(scored: Scored) -> Any:
    from distilbert_fast.evaluation.report import terminal_table

    head = ["type", "precision", "recall", "f1", "support"]
    body = [
        [kind, *(shown(name, values[name], "sentences") for name in head[1:])] for kind, values in scored.kinds.items()
    ]
    return terminal_table("", [head, *body])


def shown(name: str, value: float, unit: str) -> str:
    """A metric for a table: counts as they are, SQuAD's percentages, and shares as percentages, with two decimals."""
    if math.isnan(value):
        return "undefined"
    if name.endswith(("total", "support")):
        return f"{value:.0f}"
    if name.endswith("_thresh") or name == "mse":
        return f"{value:.6g}"
    return f"{value if unit == 'questions' else 100 * value:.2f}"
