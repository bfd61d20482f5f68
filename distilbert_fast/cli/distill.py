"""`distilbert-fast distill mlm|task|tokens|qa`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbert_fast.cli import distill_options as option
from distilbert_fast.cli.errors import plain_errors
from distilbert_fast.jobs.distill import Recipe, Shape, Training

if TYPE_CHECKING:
    from distilbert_fast.jobs.job import Job

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


@app.command(
    epilog="""\
[bold]Examples[/bold]

A general student from text; the teacher gets an MLM head first if it has none:

    distilbert-fast distill mlm --teacher ./my-bert --data 'corpus/*.txt' -o runs/general

What each loss and the start from the teacher's layers are worth, each at equal steps:

    distilbert-fast distill mlm --data corpus.txt --max-steps 500 --ablate -o runs/ablation

A corpus that need not fit on the disk:

    distilbert-fast distill mlm --data owner/set --streaming --max-steps 100000 -o runs/large
"""
)
def mlm(
    data: Annotated[
        list[str],
        typer.Option(metavar="FILES", help=".txt, .jsonl, .parquet, .csv or .tsv; a glob; or a hub data set."),
    ],
    output: option.Output = Path("distilled"),
    teacher: option.Teacher = None,
    text_column: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    packing: Annotated[
        str, typer.Option(help="full_sentences fills rows with sentences, lines makes a row of each.")
    ] = "full_sentences",
    max_length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    min_length: Annotated[int, typer.Option(help="Drop rows of fewer tokens.")] = 12,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read the corpus while training, again and again, and keep nothing of it but the first rows held out. "
            "Needs --max-steps, and --teacher-steps for a teacher without its head; goes without --teacher-cache.",
        ),
    ] = False,
    holdout: Annotated[
        float, typer.Option(help="Share of the rows to evaluate on; of a stream, of its first 50,000.")
    ] = 0.02,
    mask_probability: Annotated[float, typer.Option(help="Share of tokens that are masked.")] = 0.15,
    smoothing: Annotated[
        float,
        typer.Option(
            help="How much tokens that are rare (of a stream, in its first 50,000 rows) are masked more often; 0: not."
        ),
    ] = 0.7,
    ablate: option.Ablate = False,
    epochs: option.Epochs = 3.0,
    max_steps: option.MaxSteps = 0,
    batch_size: option.BatchSize = 256,
    micro_batch: option.MicroBatch = 32,
    lr: option.Lr = 5e-4,
    warmup: option.Warmup = 0.05,
    weight_decay: option.WeightDecay = 0.0,
    bf16: option.Bf16 = False,
    recompute: option.Recompute = False,
    seed: option.Seed = 0,
    temperature: option.Temperature = "2.0",
    alpha_ce: Annotated[
        str, typer.Option(help="KL to the teacher's vocabulary.", rich_help_panel=option.LOSSES)
    ] = "5.0",
    alpha_mlm: Annotated[
        str, typer.Option(help="Cross-entropy of masked tokens.", rich_help_panel=option.LOSSES)
    ] = "2.0",
    alpha_cos: Annotated[str, typer.Option(help="1 - cosine of hidden states.", rich_help_panel=option.LOSSES)] = "1.0",
    alpha_mse: Annotated[str, typer.Option(help="Squared error of logits.", rich_help_panel=option.LOSSES)] = "0.0",
    alpha_hidden: Annotated[str, typer.Option(help="Hidden states by layer.", rich_help_panel=option.LOSSES)] = "0.0",
    alpha_relation: Annotated[str, typer.Option(help="MiniLMv2's relations.", rich_help_panel=option.LOSSES)] = "0.0",
    kd_positions: Annotated[
        str, typer.Option(help="KL over real tokens, or masked ones.", rich_help_panel=option.LOSSES)
    ] = "real",
    hidden_loss: Annotated[str, typer.Option(help="mse or cosine.", rich_help_panel=option.LOSSES)] = "mse",
    layer_map: Annotated[
        str, typer.Option(help="0:1,1:3,… for --alpha-hidden; by default even.", rich_help_panel=option.LOSSES)
    ] = "",
    relation_heads: Annotated[int, typer.Option(help="0: the teacher's.", rich_help_panel=option.LOSSES)] = 0,
    teacher_epochs: option.TeacherEpochs = None,
    teacher_steps: option.TeacherSteps = 0,
    teacher_lr: option.TeacherLr = 1e-3,
    teacher_batch_size: option.TeacherBatch = 64,
    teacher_precision: option.TeacherPrecision = "auto",
    teacher_cache: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Run it once and keep its K likeliest tokens a row on disk, the rest as one number; 0: do not.",
            rich_help_panel=option.TEACHING,
        ),
    ] = 0,
    train_body: Annotated[
        bool,
        typer.Option("--train-body", help="Train all of it, not the new head alone.", rich_help_panel=option.TEACHING),
    ] = False,
    layers: option.Layers = "",
    architecture: option.Architecture = "distilbert",
    hidden_size: option.HiddenSize = None,
    num_heads: option.NumHeads = None,
    intermediate_size: option.Intermediate = None,
    overwrite: option.Overwrite = False,
) -> None:
    """Distil a general student by masked language modelling on text, as DistilBERT was made."""

    def job() -> Job:
        from distilbert_fast.jobs.mlm import MlmJob

        reading = (text_column, split, packing, max_length, min_length, holdout)
        return MlmJob(data, *reading, mask_probability, smoothing, seed, streaming)

    objective = {
        "temperature": temperature,
        "alpha_ce": alpha_ce,
        "alpha_mlm": alpha_mlm,
        "alpha_cos": alpha_cos,
        "alpha_mse": alpha_mse,
        "alpha_hidden": alpha_hidden,
        "alpha_relation": alpha_relation,
        "kd_positions": kd_positions,
        "hidden_loss": hidden_loss,
        "layer_map": layer_map,
        "relation_heads": relation_heads,
        "teacher_precision": teacher_precision,
    }
    student = Training(epochs, max_steps, batch_size, micro_batch, lr, warmup, weight_decay, bf16, seed, recompute)
    taught = Training(teacher_epochs, teacher_steps, teacher_batch_size, micro_batch, teacher_lr, bf16=bf16, seed=seed)
    shape = (layers, architecture, hidden_size, num_heads, intermediate_size)
    _distill(
        job, output, teacher, student, taught, train_body, shape, objective, teacher_cache, ablate, False, overwrite
    )


@app.command(
    epilog="""\
[bold]Examples[/bold]

Sentences in files with the columns sentence and label; the teacher is fine-tuned on them first:

    distilbert-fast distill task --teacher ./my-bert --data train.tsv --eval-data dev.tsv --baseline

A teacher that knows the task is taken as it is:

    distilbert-fast distill task --teacher textattack/bert-base-uncased-SST-2 --task glue/sst2

Pairs of sentences, of the hub or in files with such columns (premise and hypothesis, sentence1 and sentence2, …):

    distilbert-fast distill task --teacher ./my-bert --task glue/mnli --max-length 256 -o runs/mnli
    distilbert-fast distill task --teacher ./my-bert --data pairs.jsonl -o runs/pairs

Numbers instead of classes, such as how alike two sentences are:

    distilbert-fast distill task --teacher ./my-bert --task glue/stsb -o runs/stsb
    distilbert-fast distill task --teacher ./my-bert --data ratings.csv --regression -o runs/ratings
"""
)
def task(
    output: option.Output = Path("distilled"),
    teacher: option.Teacher = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_ID", help="stdlib-docs (the default), or a hub data set such as glue/sst2."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TSV, CSV, JSONL or Parquet with the columns sentence and label; for pairs sentence1 and sentence2, "
            "question1 and question2, premise and hypothesis, or question and sentence.",
        ),
    ] = None,
    eval_data: option.EvalData = None,
    regression: Annotated[
        bool,
        typer.Option(
            "--regression", help="Labels are numbers, taken as they are; so are a hub data set's that are floats."
        ),
    ] = False,
    max_train_rows: Annotated[int | None, typer.Option(help="Train on this many rows only.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens a row; longer sentences are cut, of a pair the longer one first.")
    ] = 128,
    baseline: option.Baseline = False,
    ablate: option.Ablate = False,
    epochs: option.Epochs = 3.0,
    max_steps: option.MaxSteps = 0,
    batch_size: option.BatchSize = 32,
    micro_batch: option.MicroBatch = 32,
    lr: option.Lr = 1e-4,
    warmup: option.Warmup = 0.05,
    weight_decay: option.WeightDecay = 0.0,
    bf16: option.Bf16 = False,
    recompute: option.Recompute = False,
    seed: option.Seed = 0,
    temperature: option.Temperature = "2.0",
    alpha: option.Alpha = "0.5",
    teacher_epochs: option.TeacherEpochs = None,
    teacher_steps: option.TeacherSteps = 0,
    teacher_lr: option.TeacherLr = 5e-5,
    teacher_batch_size: option.TeacherBatch = 32,
    teacher_precision: option.TeacherPrecision = "auto",
    layers: option.Layers = "",
    architecture: option.Architecture = "distilbert",
    hidden_size: option.HiddenSize = None,
    num_heads: option.NumHeads = None,
    intermediate_size: option.Intermediate = None,
    overwrite: option.Overwrite = False,
) -> None:
    """Distil a student that classifies sentences, or pairs of them, or gives them a number."""

    def job() -> Job:
        from distilbert_fast.data.tasks import load_task
        from distilbert_fast.jobs.task import RegressionJob, TaskJob

        loaded = load_task(task, data, eval_data, max_train_rows, regression)
        if not loaded.regression:
            return TaskJob(loaded, max_length)
        del objective["temperature"]  # squared errors have none
        return RegressionJob(loaded, max_length)

    student = Training(epochs, max_steps, batch_size, micro_batch, lr, warmup, weight_decay, bf16, seed, recompute)
    taught = Training(teacher_epochs, teacher_steps, teacher_batch_size, micro_batch, teacher_lr, bf16=bf16, seed=seed)
    shape = (layers, architecture, hidden_size, num_heads, intermediate_size)
    objective = {"temperature": temperature, "alpha": alpha, "teacher_precision": teacher_precision}
    _distill(job, output, teacher, student, taught, True, shape, objective, 0, ablate, baseline, overwrite)


@app.command(
    epilog="""\
[bold]Examples[/bold]

Named entities in CoNLL's files: a word and its tag a line, the tag in the last column, a blank line after a sentence:

    distilbert-fast distill tokens --teacher ./my-bert --data eng.train --eval-data eng.testa --baseline

A tagger that is there, on a data set of the hub:

    distilbert-fast distill tokens --teacher ./my-ner-bert --task unimelb-nlp/wikiann/en -o runs/ner
"""
)
def tokens(
    output: option.Output = Path("distilled"),
    teacher: option.Teacher = None,
    task: Annotated[
        str | None, typer.Option(metavar="ID", help="A hub data set with the columns tokens and ner_tags or tags.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CoNLL's columns, the tag in the last; or JSONL or Parquet with tokens and tags."
        ),
    ] = None,
    eval_data: option.EvalData = None,
    max_train_rows: Annotated[int | None, typer.Option(help="Train on this many sentences only.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens a row; longer sentences are cut between words into several.")
    ] = 128,
    baseline: option.Baseline = False,
    ablate: option.Ablate = False,
    epochs: option.Epochs = 3.0,
    max_steps: option.MaxSteps = 0,
    batch_size: option.BatchSize = 32,
    micro_batch: option.MicroBatch = 32,
    lr: option.Lr = 1e-4,
    warmup: option.Warmup = 0.05,
    weight_decay: option.WeightDecay = 0.0,
    bf16: option.Bf16 = False,
    recompute: option.Recompute = False,
    seed: option.Seed = 0,
    temperature: option.Temperature = "2.0",
    alpha: option.Alpha = "0.5",
    teacher_epochs: option.TeacherEpochs = None,
    teacher_steps: option.TeacherSteps = 0,
    teacher_lr: option.TeacherLr = 5e-5,
    teacher_batch_size: option.TeacherBatch = 32,
    teacher_precision: option.TeacherPrecision = "auto",
    layers: option.Layers = "",
    architecture: option.Architecture = "distilbert",
    hidden_size: option.HiddenSize = None,
    num_heads: option.NumHeads = None,
    intermediate_size: option.Intermediate = None,
    overwrite: option.Overwrite = False,
) -> None:
    """Distil a student that tags words: named entities, parts of speech."""

    def job() -> Job:
        from distilbert_fast.data.tokens import load_tokens
        from distilbert_fast.jobs.tokens import TokensJob

        return TokensJob(load_tokens(task, data, eval_data, max_train_rows), max_length)

    student = Training(epochs, max_steps, batch_size, micro_batch, lr, warmup, weight_decay, bf16, seed, recompute)
    taught = Training(teacher_epochs, teacher_steps, teacher_batch_size, micro_batch, teacher_lr, bf16=bf16, seed=seed)
    shape = (layers, architecture, hidden_size, num_heads, intermediate_size)
    objective = {"temperature": temperature, "alpha": alpha, "teacher_precision": teacher_precision}
    _distill(job, output, teacher, student, taught, True, shape, objective, 0, ablate, baseline, overwrite)


@app.command(
    epilog="""\
[bold]Example[/bold]

    distilbert-fast distill qa --teacher ./my-bert --data train-v1.1.json --eval-data dev-v1.1.json
"""
)
def qa(
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Questions with answers, a .json file of SQuAD 1.1's form.")
    ],
    output: option.Output = Path("distilled"),
    teacher: option.Teacher = None,
    eval_data: option.EvalData = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a window: a question and what fits of its context.")] = 384,
    stride: Annotated[int, typer.Option(help="Tokens by which windows overlap.")] = 128,
    baseline: option.Baseline = False,
    ablate: option.Ablate = False,
    epochs: option.Epochs = 3.0,
    max_steps: option.MaxSteps = 0,
    batch_size: option.BatchSize = 32,
    micro_batch: option.MicroBatch = 8,
    lr: option.Lr = 1e-4,
    warmup: option.Warmup = 0.05,
    weight_decay: option.WeightDecay = 0.0,
    bf16: option.Bf16 = False,
    recompute: option.Recompute = False,
    seed: option.Seed = 0,
    temperature: option.Temperature = "2.0",
    alpha: option.Alpha = "0.5",
    teacher_epochs: option.TeacherEpochs = None,
    teacher_steps: option.TeacherSteps = 0,
    teacher_lr: option.TeacherLr = 5e-5,
    teacher_batch_size: option.TeacherBatch = 32,
    teacher_precision: option.TeacherPrecision = "auto",
    layers: option.Layers = "",
    architecture: option.Architecture = "distilbert",
    hidden_size: option.HiddenSize = None,
    num_heads: option.NumHeads = None,
    intermediate_size: option.Intermediate = None,
    overwrite: option.Overwrite = False,
) -> None:
    """Distil a student that finds answers in a text."""

    def job() -> Job:
        from distilbert_fast.data.squad import load_squad
        from distilbert_fast.jobs.qa import QaJob

        return QaJob(*load_squad(data, eval_data), max_length, stride)

    student = Training(epochs, max_steps, batch_size, micro_batch, lr, warmup, weight_decay, bf16, seed, recompute)
    taught = Training(teacher_epochs, teacher_steps, teacher_batch_size, micro_batch, teacher_lr, bf16=bf16, seed=seed)
    shape = (layers, architecture, hidden_size, num_heads, intermediate_size)
    objective = {"temperature": temperature, "alpha": alpha, "teacher_precision": teacher_precision}
    _distill(job, output, teacher, student, taught, True, shape, objective, 0, ablate, baseline, overwrite)


def _distill(
    make_job: Callable[[], Job],
    output: Path,
    teacher: str | None,
    student: Training,
    taught: Training,
    train_body: bool,
    shape: tuple[str, str, int | None, int | None, int | None],
    objective: dict[str, Any],
    cache: int,
    ablate: bool,
    baseline: bool,
    overwrite: bool,
) -> None:
    from distilbert_fast.jobs import distill as distill_recipes
    from distilbert_fast.jobs.flow import RecipeError
    from distilbert_fast.runs.processes import launcher

    with plain_errors("the same command continues"):
        try:
            job = make_job()
        except (ValueError, FileNotFoundError) as error:
            raise RecipeError(str(error)) from error
        compare = [v.name for v in job.variants] if ablate else ["without-teacher"] if baseline else []
        distill_recipes.distill(
            job,
            output,
            teacher,
            Recipe(student, taught, train_body, _shape(*shape), objective, cache, compare),
            overwrite,
            shlex.join([*launcher(), *sys.argv[1:]]),
        )


def _shape(layers: str, architecture: str, hidden: int | None, heads: int | None, inner: int | None) -> Shape:
    from distilbert_fast.jobs.flow import RecipeError

    try:
        numbers = tuple(int(part) for part in layers.split(",") if part)
    except ValueError:
        raise RecipeError(f"distill: layers: expected a depth or layers such as 0,2,5, got {layers!r}") from None
    depth = numbers[0] if len(numbers) == 1 and "," not in layers else None
    return Shape(depth, numbers if "," in layers else None, architecture, hidden, heads, inner)
