"""`distilbert-fast predict`: the answers of a model to the rows of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distilbert_fast.cli.errors import plain_errors

EPILOG = """\
[bold]Examples[/bold]

Labels of the column text, or sentence, in int8; the other columns stay:

    distilbert-fast predict --model ./my-bert --input reviews.jsonl --output labelled.jsonl --precision int8

All labels with their scores, of a column with another name:

    distilbert-fast predict --model ./my-bert --input reviews.csv --column body --top-k 0 --output labelled.parquet

Embeddings for a search index, half as wide, in int8, with the column id alone:

    distilbert-fast predict --model ./minilm --task embedding --input corpus.parquet --output vectors.parquet \
--normalize --dimensions 192 --dtype int8 --keep id

Entities of what another program writes; answers to questions; scores of pairs:

    zcat news.jsonl.gz | distilbert-fast predict --model ./ner --input - --format jsonl --output entities.jsonl
    distilbert-fast predict --model ./qa --input questions.tsv --output answers.jsonl --handle-impossible-answer
    distilbert-fast predict --model ./reranker --task reranking --input pairs.tsv --output scores.parquet

On the cores of a Ray cluster (pip install 'distilbert-fast\\[ray]'), with the same output:

    distilbert-fast predict --model ./my-bert --input reviews.jsonl --output labelled.jsonl --engine ray

Stopped at any moment, the same command continues; its output is byte for byte that of a run that nobody stopped.
"""
_FILES, _TASK, _SPEED = "Files", "Task", "Speed"


def predict(
    model: Annotated[str, typer.Option(metavar="DIR_OR_ID", help="A BERT, RoBERTa or DistilBERT.")],
    input: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="File to read: .jsonl, .csv, .tsv, .txt or .parquet; - is standard input.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write, .jsonl or .parquet: it is there whole, or not at all.",
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="text-classification, regression, embedding, token-classification, question-answering or reranking; "
            "by default what the model has the head for."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Column of the text; give it twice for pairs. By default text or sentence, question and context, "
            "query and text, ….",
            rich_help_panel=_FILES,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Copy this column to the output, and no other that is not named.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Form of standard input: jsonl, csv, tsv or txt (a text a line).", rich_help_panel=_FILES),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the output, once the new one is whole.", rich_help_panel=_FILES),
    ] = False,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="How many labels, or answers to a question, a row gets; 0 for all labels.", rich_help_panel=_TASK
        ),
    ] = None,
    function_to_apply: Annotated[
        str | None,
        typer.Option(help="How logits become scores: softmax, sigmoid or none.", rich_help_panel=_TASK),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="How the vectors of tokens become an embedding: mean, cls or max.", rich_help_panel=_TASK),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale embeddings to length 1.", rich_help_panel=_TASK),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep so many of the first numbers of an embedding.", rich_help_panel=_TASK)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of embeddings: float32, float16, int8, binary or ubinary.", rich_help_panel=_TASK),
    ] = None,
    aggregation_strategy: Annotated[
        str | None,
        typer.Option(help="How tokens become entities: none, simple, first, average or max.", rich_help_panel=_TASK),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the windows of a long text or context share; without it, entities are found in the "
            "first window alone.",
            rich_help_panel=_TASK,
        ),
    ] = None,
    max_answer_len: Annotated[
        int | None, typer.Option(help="The most tokens of an answer.", rich_help_panel=_TASK)
    ] = None,
    handle_impossible_answer: Annotated[
        bool,
        typer.Option("--handle-impossible-answer", help="A question may have no answer.", rich_help_panel=_TASK),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the engine: fp32, bf16, fp16 or int8; by default the model's.", rich_help_panel=_SPEED
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="The most tokens of a text; longer ones are cut, and counted.", rich_help_panel=_SPEED),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a batch, padding not counted.", rich_help_panel=_SPEED)
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Save progress after so many rows.", rich_help_panel=_SPEED)
    ] = None,
    packed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep packed weights here; processes share them.", rich_help_panel=_SPEED),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Where to compute: here, or ray, the workers of the cluster that RAY_ADDRESS names.",
            rich_help_panel=_SPEED,
        ),
    ] = "here",
    workers: Annotated[
        int | None,
        typer.Option(help="Workers of Ray; by default as many as the cluster has cores for.", rich_help_panel=_SPEED),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each worker of Ray.", rich_help_panel=_SPEED)] = 1,
) -> None:
    """Write the answers of a model to the rows of a file, in their order, with their other columns.

    Memory does not depend on the file's size. Rows that cannot be read, or hold no text, go to
    OUTPUT.rejected.jsonl with their line and the reason. Prints what was done as JSON.
    """
    with plain_errors("what is done is kept: the same command continues"):
        import json

        from distilbert_fast.jobs.predict import predict as run

        given = {
            "function_to_apply": function_to_apply,
            "pooling": pooling,
            "normalize": normalize,
            "dimensions": dimensions,
            "dtype": dtype,
            "aggregation_strategy": aggregation_strategy,
            "stride": stride,
            "max_answer_len": max_answer_len,
            "handle_impossible_answer": handle_impossible_answer or None,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if top_k is not None:
            options["top_k"] = top_k or None
        sizes: dict[str, Any] = {"batch_tokens": batch_tokens, "shard_rows": shard_rows}
        found = run(
            model,
            input,
            output,
            task,
            columns=column or (),
            keep=keep,
            form=format,
            precision=precision,
            max_length=max_length,
            options=options,
            overwrite=overwrite,
            packed=packed,
            engine=engine,
            workers=workers,
            threads=threads,
            **{name: size for name, size in sizes.items() if size is not None},
        )
        print(json.dumps(found, indent=2))
