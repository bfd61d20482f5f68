"""`distilbert-fast distill mlm|task|tokens|qa`: the options that only one of them has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbert_fast.cli.command import SentencesCommand, add
from distilbert_fast.cli.distill_options import DistillCommand, TaskCommand, in_losses, in_teaching

if TYPE_CHECKING:
    from distilbert_fast.jobs.job import Job
    from distilbert_fast.jobs.settings import Recipe

app = typer.Typer(
    help="""\
Distil a teacher into a student: by masked language modelling, on sentences, on words, or on questions.

The recipe is DistilBERT's: the student is made of the teacher's own layers and learns from its soft answers, the \
labels and, with mlm, its hidden states. What is written: the teacher (with its head trained first, if it had none), \
the student with a model card, and a report with losses, sizes, speed and evaluation.

Interrupt it whenever you like: the same command continues where it was. On several GPUs start it by \
torchrun --nproc-per-node N -m distilbert_fast distill …, or by accelerate launch -m …: the steps stay the same.
""",
    no_args_is_help=True,
)


@add(
    app,
    "mlm",
    """\
[bold]Examples[/bold]

A general student from text; the teacher gets an MLM head first if it has none:

    distilbert-fast distill mlm --teacher ./my-bert --data 'corpus/*.txt' -o runs/general

What each loss and the start from the teacher's layers are worth, each at equal steps:

    distilbert-fast distill mlm --data corpus.txt --max-steps 500 --ablate -o runs/ablation

A corpus that need not fit on the disk:

    distilbert-fast distill mlm --data owner/set --streaming --max-steps 100000 -o runs/large
""",
    batch_size=256,
    lr=5e-4,
    teacher_lr=1e-3,
    teacher_batch_size=64,
)
@dataclass(kw_only=True)
class DistilMlm(DistillCommand):
    """Distil a general student by masked language modelling on text, as DistilBERT was made."""

    data: Annotated[
        list[str],
        typer.Option(metavar="FILES", help=".txt, .jsonl, .parquet, .csv or .tsv; a glob; or a hub data set."),
    ]
    text_column: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None
    split: Annotated[str, typer.Option(help="The split of a data set.")] = "train"
    packing: Annotated[
        str, typer.Option(help="full_sentences fills rows with sentences, lines makes a row of each.")
    ] = "full_sentences"
    max_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128
    min_length: Annotated[int, typer.Option(help="Drop rows of fewer tokens.")] = 12
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read the corpus while training, again and again, and keep nothing of it but the first rows held out. "
            "Needs --max-steps, and --teacher-steps for a teacher without its head; not with --teacher-cache.",
        ),
    ] = False
    holdout: Annotated[
        float, typer.Option(help="Share of the rows to evaluate on; of a stream, of its first 50,000.")
    ] = 0.02
    mask_probability: Annotated[float, typer.Option(help="Share of tokens that are masked.")] = 0.15
    smoothing: Annotated[
        float,
        typer.Option(
            help="How much more often rare tokens are masked (for a stream, rare in its first 50,000 rows); 0: no more."
        ),
    ] = 0.7
    alpha_ce: Annotated[str, in_losses(help="Weight of the KL divergence from the teacher's answers.")] = "5.0"
    alpha_mlm: Annotated[str, in_losses(help="Weight of the cross-entropy of masked tokens.")] = "2.0"
    alpha_cos: Annotated[str, in_losses(help="Weight of 1 - cosine of hidden states.")] = "1.0"
    alpha_mse: Annotated[str, in_losses(help="Weight of the squared error of logits.")] = "0.0"
    alpha_hidden: Annotated[str, in_losses(help="Weight of the distance of hidden states, layer by layer.")] = "0.0"
    alpha_relation: Annotated[
        str, in_losses(help="Weight of MiniLMv2's loss on relations of queries, keys and values.")
    ] = "0.0"
    kd_positions: Annotated[str, in_losses(help="Where the KL is taken: real tokens, or masked ones.")] = "real"
    hidden_loss: Annotated[str, in_losses(help="Distance of --alpha-hidden: mse or cosine.")] = "mse"
    layer_map: Annotated[str, in_losses(help="0:1,1:3,… for --alpha-hidden; by default even.")] = ""
    relation_heads: Annotated[int, in_losses(help="Heads of --alpha-relation; 0: as many as the teacher has.")] = 0
    teacher_cache: Annotated[
        int,
        in_teaching(
            metavar="K",
            help="Run the teacher once and keep its K likeliest tokens of each row on disk, the rest as one number; "
            "0: run it beside the student.",
        ),
    ] = 0
    train_body: Annotated[bool, in_teaching("--train-body", help="Train the teacher whole, not only its new head.")] = (
        False
    )

    def job(self) -> Job:
        from distilbert_fast.jobs.mlm import MlmJob

        reading = (self.text_column, self.split, self.packing, self.max_length, self.min_length, self.holdout)
        return MlmJob(self.data, *reading, self.mask_probability, self.smoothing, self.seed, self.streaming)

    def objective(self, job: Job) -> dict[str, Any]:
        alphas = [f"alpha_{loss}" for loss in ("ce", "mlm", "cos", "mse", "hidden", "relation")]
        others = ("kd_positions", "hidden_loss", "layer_map", "relation_heads", "teacher_precision")
        return {name: getattr(self, name) for name in ("temperature", *alphas, *others)}

    def recipe(self, job: Job) -> Recipe:
        return replace(super().recipe(job), train_body=self.train_body, cache=self.teacher_cache)


@add(
    app,
    "task",
    """\
[bold]Examples[/bold]

Sentences in files with the columns sentence and label; the teacher is fine-tuned on them first:

    distilbert-fast distill task --teacher ./my-bert --data train.tsv --eval-data dev.tsv --baseline

A teacher that knows the task is taken as it is:

    distilbert-fast distill task --teacher textattack/bert-base-uncased-SST-2 --task glue/sst2

Pairs of sentences, of the hub or in files with such columns (premise and hypothesis, sentence1 and sentence2, …):

    distilbert-fast distill task --teacher ./my-bert --task glue/mnli --max-length 256 -o runs/mnli
    distilbert-fast distill task --teacher ./my-bert --data pairs.jsonl -o runs/pairs

A student of all six layers whose weights are 80% 0, or are trained as int8, or share 16 values in groups of rows:

    distilbert-fast distill task --teacher ./my-bert --data train.tsv --layers 6 --sparsity 0.8 -o runs/sparse
    distilbert-fast distill task --teacher ./my-bert --data train.tsv --qat int8 -o runs/int8
    distilbert-fast distill task --teacher ./my-bert --data train.tsv --qat values --group-size 16 -o runs/values

Numbers instead of classes, such as how alike two sentences are:

    distilbert-fast distill task --teacher ./my-bert --task glue/stsb -o runs/stsb
    distilbert-fast distill task --teacher ./my-bert --data ratings.csv --regression -o runs/ratings
""",
)
@dataclass(kw_only=True)
class DistilSentences(SentencesCommand, TaskCommand):
    """Distil a student that classifies sentences, or pairs of them, or gives them a number."""

    def objective(self, job: Job) -> dict[str, Any]:
        settings = super().objective(job)
        if job.regression:  # squared errors have no temperature
            del settings["temperature"]
        return settings


@add(
    app,
    "tokens",
    """\
[bold]Examples[/bold]

Named entities in CoNLL's files: a word and its tag a line, the tag in the last column, a blank line after a sentence:

    distilbert-fast distill tokens --teacher ./my-bert --data eng.train --eval-data eng.testa --baseline

A tagger that is there, on a data set of the hub:

    distilbert-fast distill tokens --teacher ./my-ner-bert --task unimelb-nlp/wikiann/en -o runs/ner
""",
)
@dataclass(kw_only=True)
class DistilTokens(TaskCommand):
    """Distil a student that tags words: named entities, parts of speech."""

    task: Annotated[
        str | None, typer.Option(metavar="ID", help="A hub data set with the columns tokens and ner_tags or tags.")
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CoNLL's columns, the tag in the last; or JSONL or Parquet with tokens and tags."
        ),
    ] = None
    max_train_rows: Annotated[int | None, typer.Option(help="Train on this many sentences only.")] = None
    max_length: Annotated[
        int, typer.Option(help="Tokens a row; longer sentences are cut between words into several.")
    ] = 128

    def job(self) -> Job:
        from distilbert_fast.data.tokens import load_tokens
        from distilbert_fast.jobs.tokens import TokensJob

        return TokensJob(load_tokens(self.task, self.data, self.eval_data, self.max_train_rows), self.max_length)


@add(
    app,
    "qa",
    """\
[bold]Example[/bold]

    distilbert-fast distill qa --teacher ./my-bert --data train-v1.1.json --eval-data dev-v1.1.json
""",
    micro_batch=8,
)
@dataclass(kw_only=True)
class DistilAnswers(TaskCommand):
    """Distil a student that finds answers in a text."""

    data: Annotated[Path, typer.Option(metavar="FILE", help="Questions with answers, a .json file of SQuAD's form.")]
    unanswerable: Annotated[
        bool, typer.Option("--unanswerable", help="Questions may have no answer, as in SQuAD 2.0.")
    ] = False
    max_length: Annotated[int, typer.Option(help="Tokens of a window: a question and what fits of its context.")] = 384
    stride: Annotated[int, typer.Option(help="Tokens by which windows overlap.")] = 128

    def job(self) -> Job:
        from distilbert_fast.data.squad import load_squad
        from distilbert_fast.jobs.qa import QaJob

        return QaJob(*load_squad(self.data, self.eval_data, self.unanswerable), self.max_length, self.stride)
