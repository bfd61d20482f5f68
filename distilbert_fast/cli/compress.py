"""`distilbert-fast compress`: a teacher made as fast as asked for, or as its accuracy allows."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from distilbert_fast.cli.command import SentencesCommand
from distilbert_fast.cli.training_options import in_training
from distilbert_fast.jobs.settings import Compression, Goals, Training, refused

HELP = """\
Compress a classifier: fewer layers, fewer heads and neurons, int8; recovered by its teacher, and measured.

Times the teacher and the parts of its layers here, then takes away as much as the speed-up needs: layers (distilled \
into a student), heads and neurons (K-prune, arXiv:2308.03449; the teacher wins back what that lost), and bits of the \
weights. Writes compressed/ with a model card, models/ with every model on the way, and report.md, report.json and \
curve.png: size, accuracy, agreement with the teacher and speed of each.

Interrupt it whenever you like: the same command continues where it was.
"""

EPILOG = """\
[bold]Examples[/bold]

Ten times as fast as the teacher under transformers on this machine, and at most one point of accuracy lost:

    distilbert-fast compress --teacher ./my-bert --data train.tsv --eval-data dev.tsv --speedup 10 --accuracy-drop 1

As fast as one point of accuracy allows:

    distilbert-fast compress --teacher ./my-bert --data train.tsv --accuracy-drop 1 -o runs/fast

The whole curve, accuracy against speed, with every model on the way:

    distilbert-fast compress --teacher ./my-bert --data train.tsv --speedup 2 --speedup 5 --speedup 10 --speedup 20

For batches of 32 instead of single sentences, as for bulk work:

    distilbert-fast compress --teacher ./my-bert --task glue/sst2 --speedup 10 --clock throughput

A model that misses a goal is kept aside in rejected/, and the exit status is 3. The same command with other goals \
goes on from the models that are there; --accept takes what came of it.
"""

in_goals = partial(typer.Option, rich_help_panel="Goals")


@dataclass(kw_only=True)
class Compress(SentencesCommand):
    """See `HELP` above."""

    speedup: Annotated[
        list[float] | None,
        in_goals(help="Times as fast as the teacher under transformers. Several: a model for each."),
    ] = None
    accuracy_drop: Annotated[
        float | None,
        in_goals(
            metavar="POINTS",
            help="The most that may be lost of accuracy, or of 100 times Pearson's correlation. Without --speedup: "
            "faster models are made until one loses more; 1 if neither is given.",
        ),
    ] = None
    clock: Annotated[
        str, in_goals(help="What is to be faster: latency, calls with one row; or throughput, calls with 32.")
    ] = "latency"
    threads: Annotated[int | None, in_goals(help="Threads of the models that are timed; by default torch's.")] = None
    accept: Annotated[bool, in_goals("--accept", help="Keep a model that misses a goal, exit status 0.")] = False
    layers: Annotated[
        int | None, typer.Option(help="Layers of students; by default what leaves pruning at most 60% of their time.")
    ] = None
    codebook: Annotated[
        int | None, typer.Option(metavar="VALUES", help="Weights share 256, 64 or 16 values instead of int8.")
    ] = None
    sentences: Annotated[int, typer.Option(help="Training rows that pruning and quantization look at.")] = 2048
    epochs: Annotated[float, in_training(help="Passes over the rows that distil a student of fewer layers.")] = 3.0
    recovery_epochs: Annotated[float, in_training(help="Passes that recover a model that was pruned.")] = 3.0
    batch_size: Annotated[int, in_training(help="Rows of an optimizer step.")] = 32
    lr: Annotated[float, in_training("--lr", help="Peak learning rate of AdamW.")] = 1e-4
    temperature: Annotated[str, in_training(help="τ of the KL divergence from the teacher.")] = "2.0"
    alpha: Annotated[str, in_training(help="Weight of the KL; the labels have 1 - alpha.")] = "0.5"
    teacher_epochs: Annotated[
        float | None, in_training(help="Passes that fine-tune the teacher; by default 0 for one that has its head.")
    ] = None
    teacher_lr: Annotated[float, in_training(help="Peak learning rate of the teacher.")] = 5e-5
    bf16: Annotated[bool, in_training("--bf16", help="Train in bfloat16.")] = False
    seed: Annotated[int, in_training(help="Seed of order and dropout.")] = 0

    def run(self) -> None:
        from distilbert_fast.jobs.compress import compress

        with refused():
            job = self.job()
        drop = 1.0 if not self.speedup and self.accuracy_drop is None else self.accuracy_drop
        goals = Goals(tuple(sorted(set(self.speedup or ()))), drop, self.accept)
        command = shlex.join(["distilbert-fast", *sys.argv[1:]])
        found = compress(job, self.output, self.teacher, self._recipe(job.regression), goals, self.overwrite, command)
        if not (found["gate"]["passed"] or self.accept):
            raise typer.Exit(3)

    def _recipe(self, regression: bool) -> Compression:
        common: dict[str, Any] = {"batch_size": self.batch_size, "micro_batch": self.batch_size}
        common |= {"bf16": self.bf16, "seed": self.seed}
        objective = {"alpha": self.alpha} | ({} if regression else {"temperature": self.temperature})
        return Compression(
            Training(self.epochs, learning_rate=self.lr, **common),
            Training(self.recovery_epochs, learning_rate=self.lr, **common),
            Training(self.teacher_epochs, learning_rate=self.teacher_lr, **common),
            objective,
            self.layers,
            self.codebook,
            self.clock,
            self.sentences,
            self.threads,
        )
