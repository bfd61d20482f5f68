"""`distilbert-fast quantize`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbert_fast.cli.errors import plain_errors

EPILOG = """\
[bold]Examples[/bold]

Without any text; each weight is rounded to the nearest code:

    distilbert-fast quantize --model ./my-bert -o my-bert-int8

Better, with a hundred typical sentences, and a quarter of the size, tables included:

    distilbert-fast quantize --model ./my-bert -o my-bert-int8 --calibration dev.tsv --embeddings

An eighth of the size: 16 values for each 16 rows of a layer, those that decide the answers to the texts kept best:

    distilbert-fast quantize --model ./my-bert -o my-bert-c16 --codebook 16 --group-size 16 --calibration dev.tsv

At most 0.0005 nats from the float model's answers, the layers that cost most left float:

    distilbert-fast quantize --model ./my-bert -o my-bert-int8 --calibration dev.tsv --budget 0.0005
"""


def quantize(
    model: Annotated[
        str,
        typer.Option(metavar="DIR_OR_ID", help="A float BERT, RoBERTa or DistilBERT, with any task head or none."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to make; it must not be there yet.")
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Typical texts: .txt with one a line, or TSV, CSV, JSONL or Parquet with a column text or sentence.",
        ),
    ] = None,
    max_texts: Annotated[int, typer.Option(help="Use so many of them, from the beginning.")] = 256,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also the tables of words, positions and token types.")
    ] = False,
    heads: Annotated[bool, typer.Option("--heads", help="Also the linear layers of pooler and task head.")] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave float what has this in its dotted name: layer.0, intermediate.dense."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Leave layers float, the costliest first, until the mean KL on the texts is at most this."),
    ] = None,
    codebook: Annotated[
        int | None, typer.Option(help="Instead of int8, weights that share so many values: 256, 64 or 16.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Rows of a layer that share them; by default all rows do.")
    ] = None,
) -> None:
    """Hold a model in int8, or with shared values: a directory that from_pretrained reads, with a model card.

    Weights get a scale a row, activations one a token when they come. With texts, scales and biases are fitted to what
    the layers read, and the answers to these texts are compared with those of the float model.
    """
    with plain_errors("nothing was written"):
        from distilbert_fast.jobs.quantize import quantize as run
        from distilbert_fast.jobs.settings import refused, require
        from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config

        both: dict[str, Any] = {"heads": heads, "modules_to_not_convert": list(keep or [])}
        if codebook is None:
            require(group_size is None, "quantize: group-size", "a codebook", group_size)
            config: Int8Config | CodebookConfig = Int8Config(embeddings=embeddings, **both)
        else:
            require(not embeddings, "quantize: embeddings", "int8, not with a codebook", f"codebook {codebook}")
            with refused("quantize"):
                shared = ("tensor", None) if group_size is None else ("group", group_size)
                config = CodebookConfig(codebook, *shared, **both)
        command = shlex.join(["distilbert-fast", *sys.argv[1:]])
        run(model, output, calibration, config, budget, max_texts, command=command)
