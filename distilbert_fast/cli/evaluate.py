"""`distilbert-fast evaluate`."""

from __future__ import annotations

import json
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


def evaluate(
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cola, sst2, mrpc, stsb, qqp, mnli, mnli_mismatched, qnli, rte, wnli, ax; cb, boolq, axb, axg; imdb, "
            "ag_news; squad, squad_v2; entities. None: a file with the columns sentence or of a pair, and label.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What is true, in a file as the task's are published.")
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
    precision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Of transformers (its own forward), auto (optimized as it is), fp32, bf16, fp16, int8; with commas.",
        ),
    ] = "transformers",
    batch_size: Annotated[int, typer.Option(help="Rows a call.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens a row. By default up to 512, as many as the model reads; of questions, 384."),
    ] = None,
    stride: Annotated[int, typer.Option(help="Tokens by which windows of a long context overlap.")] = 128,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write predictions and evaluation.json into it."),
    ] = None,
    na_prob: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="squad_v2: JSON of the probabilities that a question has no answer."),
    ] = None,
    na_prob_thresh: Annotated[
        float, typer.Option(help="squad_v2: above this probability an answer counts as none.")
    ] = 1.0,
    regression: Annotated[bool, typer.Option("--regression", help="Labels of a file of yours are numbers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, numbers in full.")] = False,
) -> None:
    """Judge models, or predictions in a file, by the task's own metrics, to the last digit of its own script.

    SQuAD 1.1 and 2.0: exact match and F1 in percent. Entities: precision, recall and F1, over all and type by type.
    Others: accuracy, F1, Matthews', Pearson's and Spearman's correlation as the task asks.
    """
    with plain_errors("nothing was written"):
        from distilbert_fast.jobs.score import score
        from distilbert_fast.jobs.settings import RecipeError

        if (predictions is None) is not bool(model):
            got = "both" if model else "neither"
            raise RecipeError(f"evaluate: expected --model or --predictions, got {got}")
        if predictions is None:
            ways = tuple(part.strip() for part in precision.split(","))
            _models(task, data, model or [], (ways, batch_size, max_length, stride, output), regression, as_json)
            return
        scored = score(task, data, predictions, na_prob, na_prob_thresh, regression)
        if as_json:
            print(json.dumps(scored.as_json(), indent=2))
        else:
            _print(task or str(data), scored)


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
        print(json.dumps(content(task, data, results), indent=2))
        return
    unit = results[0].scored.unit
    names = [name for name in results[0].scored.metrics if not name.endswith(("total", "_thresh"))]
    rows = [["model", "run in", *names, f"{unit}/s"]]
    for one in results:
        cells = [_with_error(name, one.scored) for name in names]
        rows.append([Path(one.model).name, one.precision, *cells, f"{one.rows / one.seconds:.4g}"])
    if len(models) > 1:
        for way, found in spread(results).items():
            ranges = ({of: shown(name, value, unit) for of, value in found[name].items()} for name in names)
            cells = [f"{one['median']} ({one['low']} to {one['high']})" for one in ranges]
            rows.append([f"median of {len(models)}", way, *cells, ""])
    if len(names) > _WIDE:
        rows = [list(cells) for cells in zip(*rows, strict=True)]
    say = console()
    say(f"{task or data}: {results[0].scored.count} {unit}", terminal_table("", rows))
    if len(results) == 1 and results[0].scored.kinds:
        say(_kinds(results[0].scored))


_WIDE = 4  # metrics of a row; if there are more, each has a row


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
    if name.endswith(("total", "support")):
        return f"{value:.0f}"
    if name.endswith("_thresh") or name == "mse":
        return f"{value:.6g}"
    return f"{value if unit == 'questions' else 100 * value:.2f}"
