"""`distilbert-fast compare`: the models of DistilBERT's paper, and ours, on this machine."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from distilbert_fast.cli.errors import plain_errors

EPILOG = """\
[bold]Examples[/bold]

All of them, with random weights, at the lengths of STS-B's development set (a quarter of an hour on two cores):

    distilbert-fast compare

DistilBERT against BERT alone, in a minute or two:

    distilbert-fast compare --quick --only bert-base,distilbert-base,distilbert-base:int8

Your checkpoints, scored on a file as well:

    distilbert-fast compare --model bert-base=./my-bert --model distilbert-base=./my-distilbert \
--task stsb --data STS-B/dev.tsv
"""


def compare(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for compare.json, .md, .png and .html.")
    ] = Path("comparison"),
    only: Annotated[
        str,
        typer.Option(
            metavar="PATTERNS", help="Rows to measure now, names or shell patterns with commas: '*bert-base*'."
        ),
    ] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A checkpoint instead of random weights: bert-base, roberta-base, distilbert-base, "
            "distilbert-base:pruned or distilbert-base:codebook16; give it again for more.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="What --data is, as evaluate calls it: stsb.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows whose lengths are measured instead of those of STS-B, which are built in; checkpoints are "
            "scored on them.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each process; by default the cores allowed here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the pairs, two turns, one start.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move what is in the way in the output directory to previous-1/.")
    ] = False,
) -> None:
    """Measure ELMo, BERT, RoBERTa, XLNet and DistilBERT, and DistilBERT and BERT on our engine, side by side.

    Parameters, bytes on disk, FLOPs a token, latency at batch 1, throughput at batch 32, peak memory and cold start,
    each model in a process of its own and in turns with BERT-base; beside what was published. A row that is measured
    stays: the same command continues, and --only adds rows.
    """
    with plain_errors("the same command continues"):
        from distilbert_fast.jobs import compare as job

        plan = job.QUICK if quick else job.Workload()
        if threads is not None:
            plan = dataclasses.replace(plan, threads=threads)
        patterns = [part.strip() for part in only.split(",") if part.strip()]
        command = shlex.join(["distilbert-fast", *sys.argv[1:]])
        job.compare(output, patterns, model or [], task, data, plan, overwrite, command)
