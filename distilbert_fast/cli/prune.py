"""`distilbert-fast prune`: heads and neurons of a classifier removed, or single weights, without training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from distilbert_fast.cli.command import EvalFile, TaskFile, TaskName
from distilbert_fast.cli.errors import plain_errors

EPILOG = """\
[bold]Examples[/bold]

Half of the encoder's weights away, chosen on the sentences of a file:

    distilbert-fast prune --model ./my-bert --data train.tsv --eval-data dev.tsv -o my-bert-half

Until the encoder is twice as fast on this machine, in int8, by a table of times that is measured first:

    distilbert-fast prune --model ./my-bert --data train.tsv --speedup 2 --precision int8

Four fifths of the single weights away, the smallest ones. The file shrinks, calls take as long as before:

    distilbert-fast prune --model ./my-bert --data train.tsv --connections --amount 0.8 --scope global -o my-bert-sparse

Nothing is trained here. `distilbert-fast compress` also wins back what was lost, by distilling the whole model into \
the pruned one, and makes it int8.
"""


def prune(
    model: Annotated[str, typer.Option(metavar="DIR_OR_ID", help="A BERT, RoBERTa or DistilBERT that classifies.")],
    task: TaskName = None,
    data: TaskFile = None,
    eval_data: EvalFile = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the pruned model and the report.")
    ] = Path("pruned"),
    amount: Annotated[
        float | None, typer.Option(help="Share that is removed, between 0 and 1; by default 0.5.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(help="Instead of a share: times as fast as the whole encoder is on this machine's engine."),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="What that is a share of: parameters (the default) or flops of the encoder's layers, or the time that "
            "they take on this machine."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="kprune scores again after each cut; fisher once, by the labels: faster, and worse.")
    ] = "kprune",
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of the engine that is timed: fp32, bf16, fp16 or int8; by default the model's."),
    ] = None,
    connections: Annotated[
        bool,
        typer.Option("--connections", help="Single weights instead, the smallest: a smaller file, the same speed."),
    ] = False,
    scope: Annotated[
        str | None,
        typer.Option(help="With --connections: that share of each layer (the default), or global: of all together."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="With --connections: 2:4, two of each four in a row, for sparse tensor cores.")
    ] = None,
    sentences: Annotated[int, typer.Option(help="Training rows by which it is chosen what to remove.")] = 2048,
    max_length: Annotated[int, typer.Option(help="Tokens of a sentence; longer ones are cut.")] = 128,
    regression: Annotated[bool, typer.Option("--regression", help="Labels are numbers, taken as they are.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the answers that scores are drawn from.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output directory.")] = False,
) -> None:
    """Remove heads and neurons of a model, or single weights, without training, and measure what that cost.

    Sub-layer by sub-layer from the bottom, those that matter least for the model's own answers go, and what reads the
    rest is fitted again (K-prune, arXiv:2308.03449). Minutes on two cores for a small BERT. The result is a model of
    transformers, which loads after import distilbert_fast; report.json and the model card say what is left and how well
    it answers. A result that is not smaller is refused.
    """
    with plain_errors("nothing was written"):
        from distilbert_fast.compression.connections import SparsityConfig
        from distilbert_fast.compression.structure import PruningConfig
        from distilbert_fast.data.tasks import load_task
        from distilbert_fast.jobs import prune as job
        from distilbert_fast.jobs.settings import refused, require
        from distilbert_fast.jobs.task import RegressionJob, TaskJob

        with refused():
            config: PruningConfig | SparsityConfig
            if connections:
                structural = {"speedup": speedup, "measure": measure, "precision": precision}
                structural |= {"method": None if method == "kprune" else method}
                for name, given in structural.items():
                    require(given is None, f"prune: --{name}", "no --connections with it", given)
                half = 0.5 if amount is None else amount
                config = SparsityConfig(half, scope=scope or "layer", pattern=pattern)
            else:
                for name, given in {"scope": scope, "pattern": pattern}.items():
                    require(given is None, f"prune: --{name}", "--connections with it", given)
                share, of = job.share(amount, measure, speedup)
                config = PruningConfig(amount=share, measure=of, method=method, precision=precision, seed=seed)
            loaded = load_task(task, data, eval_data, None, regression)
        kind = RegressionJob if loaded.regression else TaskJob
        command = shlex.join(["distilbert-fast", *sys.argv[1:]])
        job.prune(kind(loaded, max_length), model, output, config, sentences, overwrite, command)
