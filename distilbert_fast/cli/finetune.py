"""`distilbert-fast finetune`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distilbert_fast.cli.command import OutputCommand
from distilbert_fast.cli.training_options import TrainingOptions
from distilbert_fast.jobs.settings import refused

if TYPE_CHECKING:
    from distilbert_fast.jobs.job import Job

EPILOG = """\
[bold]Examples[/bold]

A classifier on GLUE's files as they are published, then its int8 form beside it:

    distilbert-fast finetune --model ./my-bert --task sst2 --data SST-2/train.tsv --eval-data SST-2/dev.tsv -o runs/sst2
    distilbert-fast evaluate --model runs/sst2/model --task sst2 --data SST-2/dev.tsv --precision transformers,int8

On a file of yours, with the columns sentence (or text) and label; a tenth of its rows is held out:

    distilbert-fast finetune --model ./my-bert --data reviews.csv -o runs/reviews

Entities in CoNLL's columns, and questions of which some have no answer:

    distilbert-fast finetune --model ./my-bert --task entities --data eng.train --eval-data eng.testa -o runs/ner
    distilbert-fast finetune --model ./my-bert --task squad_v2 --data train-v2.0.json --micro-batch 8 -o runs/qa
"""
_TAGS, _SQUAD, _SQUAD_V2 = ("entities", "tags"), "squad", "squad_v2"


@dataclass(kw_only=True)
class Finetune(TrainingOptions, OutputCommand):
    """Train a model on the labels of a task: classes, numbers, tags of words, or answers to questions.

    What is written: the model with its tokenizer and card, and a report with losses, evaluation, sizes and speed.

    Interrupt it whenever you like: the same command continues where it was. On several GPUs start it by
    torchrun --nproc-per-node N -m distilbert_fast finetune ….
    """

    model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="BERT, RoBERTa or DistilBERT; by default that of the extra 'demo'."),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of those of evaluate: the form of the files. With none, sentences or pairs with a label each. "
            "Without --data a data set of the hub, of these names or owner/set.",
        ),
    ] = None
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to train on.")] = None
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to evaluate on; by default a tenth of --data is held out.")
    ] = None
    regression: Annotated[bool, typer.Option("--regression", help="Labels of a file of yours are numbers.")] = False
    max_train_rows: Annotated[int | None, typer.Option(help="Train on this many rows only.")] = None
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a row; by default 128, of questions with their contexts 384.")
    ] = None
    stride: Annotated[int, typer.Option(help="Tokens by which windows of a long context overlap.")] = 128

    def job(self) -> Job:
        """Data and metrics. Raises ValueError or FileNotFoundError for data that cannot be used."""
        from distilbert_fast.data.published import published
        from distilbert_fast.data.squad import load_squad
        from distilbert_fast.data.tasks import load_task
        from distilbert_fast.data.tokens import load_tokens
        from distilbert_fast.jobs.qa import QaJob
        from distilbert_fast.jobs.task import task_job
        from distilbert_fast.jobs.tokens import TokensJob

        if self.task in (_SQUAD, _SQUAD_V2):
            if self.data is None:
                raise ValueError(f"finetune: data: expected a file of {self.task}, got none")
            questions = load_squad(self.data, self.eval_data, unanswerable=self.task == _SQUAD_V2)
            return QaJob(*questions, self.max_length or 384, self.stride)
        if self.task in _TAGS:
            return TokensJob(load_tokens(None, self.data, self.eval_data, self.max_train_rows), self.max_length or 128)
        known = published(self.task)
        name = known.hub if known is not None and known.hub and self.data is None else self.task
        loaded = load_task(name, self.data, self.eval_data, self.max_train_rows, self.regression)
        return task_job(loaded, self.max_length or 128)

    def run(self) -> None:
        from distilbert_fast.jobs.finetune import finetune
        from distilbert_fast.runs.processes import launcher

        with refused():
            job = self.job()
        command = shlex.join([*launcher(), *sys.argv[1:]])
        finetune(job, self.output, self.model, self.training(), self.overwrite, command)
