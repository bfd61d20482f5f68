"""The settings of `demo` and `distill`: how to train, the student's shape, the losses; checks before anything runs.

The command line shows their defaults, so this file loads heavy libraries only inside functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.files.schema import anything, mapping, read_json
from distilbert_fast.jobs.compressed_student import StudentCompression
from distilbert_fast.jobs.job import STUDENT, Job, Variant

if TYPE_CHECKING:
    from distilbert_fast.distillation.student_report import StudentReport

DEMO_ROWS = 1600  # of the built-in task that `demo` trains on unless more are asked for
_OF_TEACHER = ("alpha_ce", "alpha_cos", "alpha_mse", "alpha_hidden", "alpha_relation")  # in "mlm"


class RecipeError(ValueError):
    """Input that a command cannot work with; the message says what was expected."""


def require(fits: bool, what: str, expected: str, given: Any) -> None:
    """Raise RecipeError unless the setting ``what`` of a command is as expected."""
    if not fits:
        raise RecipeError(f"{what}: expected {expected}, got {given}")


@contextlib.contextmanager
def refused(job: str = "") -> Iterator[None]:
    """Turn errors that a user's input causes below into RecipeError; ``job``, if given, begins its message."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        if isinstance(error, TypeError) and not job:
            raise  # what reads data raises none: it is a bug
        raise RecipeError(f"{job}: {error}" if job else str(error)) from error


def config_of(teacher: Path) -> dict[str, Any]:
    """The config of a checkpoint as it was written."""
    return read_json(teacher / "config.json", mapping(anything))


def class_names(teacher: Path) -> list[str]:
    """What a checkpoint calls its classes, in the order of its logits; none if it does not say."""
    names = config_of(teacher).get("id2label") or {}
    return [str(names[number]) for number in sorted(names, key=int)]


@dataclass(frozen=True)
class DemoTraining:
    """How the demo trains. Learning rates fit a small BERT and a few thousand sentences; the rest, a few minutes.

    Attributes:
        teacher_epochs: 0 takes a teacher that is fine-tuned on the task already.
        student_epochs: passes over the training split while distilling.
        batch_size: sentences a step.
        max_length: tokens; longer sentences are cut.
        teacher_lr, student_lr: peak learning rates of AdamW, after 10 % linear warm-up, falling linearly to 0.
        temperature, alpha: of the distillation loss, see `DistillationArguments`.
        seed: of the new head, the order of the batches and dropout.
    """

    teacher_epochs: int = 1
    student_epochs: int = 1
    batch_size: int = 16
    max_length: int = 64
    teacher_lr: float = 3e-4
    student_lr: float = 3e-4
    temperature: float = 2.0
    alpha: float = 0.7
    seed: int = 0

    def check(self) -> None:
        """Raise RecipeError for a number out of range."""
        for name, least in (("teacher_epochs", 0), ("student_epochs", 1), ("batch_size", 1), ("max_length", 4)):
            given = getattr(self, name)
            require(given >= least, f"demo: {name}", f"at least {least}", given)
        for name in ("teacher_lr", "student_lr"):
            given = getattr(self, name)
            require(0 < given < math.inf, f"demo: {name}", "a finite number above 0", given)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        epochs: passes over the training rows; None for a teacher: 0 if it has its head, else the job's.
        max_steps: stop after so many optimizer steps; 0: after the epochs.
        batch_size: rows an optimizer step, of all processes together.
        micro_batch: rows that a process computes at a time; gradients add up to those of the whole batch.
        learning_rate: peak of AdamW's.
        warmup: share of the steps over which it rises; then it falls linearly to 0.
        weight_decay: of AdamW.
        bf16: compute in bfloat16 where autocast does.
        seed: of what starts at random, the order of the rows, masks and dropout.
        gradient_checkpointing: keep the input of each layer alone and compute the layer again in backward.
    """

    epochs: float | None = 3.0
    max_steps: int = 0
    batch_size: int = 256
    micro_batch: int = 32
    learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    bf16: bool = False
    seed: int = 0
    gradient_checkpointing: bool = False

    def check(self, what: str, processes: int = 1, command: str = "distill") -> None:
        """Raise RecipeError for a number out of range, or a batch that processes cannot share evenly."""
        share = max(1, self.batch_size // processes)
        together = f" x {processes} processes" if processes > 1 else ""
        for name, fits, expected in (
            ("epochs", self.epochs is None or 0 <= self.epochs < math.inf, "0 or more"),
            ("max_steps", self.max_steps >= 0, "0 or more"),
            ("micro_batch", self.micro_batch >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("batch_size", self.batch_size % processes == 0, f"a multiple of the {processes} processes"),
            ("batch_size", share % max(1, min(self.micro_batch, share)) == 0, f"a multiple of micro_batch{together}"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("warmup", 0 <= self.warmup < 1, "0 or more and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
        ):
            require(fits, f"{command}: {what} {name}", expected, getattr(self, name))

    def passes(self, rows: int) -> int:
        """How many times the rows are read, the last time perhaps not to their end."""
        return math.ceil(self.max_steps / math.ceil(rows / self.batch_size) if self.max_steps else self.epochs or 0)

    def arguments(self, path: Path, rows: int, processes: int = 1) -> dict[str, Any]:
        """Settings of TrainingArguments for each of so many processes."""
        import torch

        share = self.batch_size // processes
        micro = min(self.micro_batch, share)
        steps = self.max_steps or max(1, math.ceil((self.epochs or 0) * math.ceil(rows / self.batch_size)))
        return {
            **training_arguments(path, self.seed),
            "num_train_epochs": self.epochs or 1,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": share // micro,
            "learning_rate": self.learning_rate,
            "warmup_steps": math.ceil(self.warmup * steps),
            "weight_decay": self.weight_decay,
            "adam_beta1": 0.9,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-6,
            "max_grad_norm": 5.0,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),  # or Trainer refuses bfloat16 there
            "save_steps": max(1, min(250, steps // 8)),
            "logging_steps": max(1, steps // 100),
            **(_checkpointing() if self.gradient_checkpointing else {}),
        }


def training_arguments(path: Path, seed: int) -> dict[str, Any]:
    """Settings of TrainingArguments that every training of these jobs has in common."""
    import torch
    from transformers import TrainingArguments

    by_length: dict[str, Any] = {"group_by_length": True}
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:  # its name in later transformers 5
        by_length = {"train_sampling_strategy": "group_by_length"}
    return {
        "output_dir": str(path),
        "save_strategy": "steps",
        "save_total_limit": 1,
        "seed": seed,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **by_length,
    }


def _checkpointing() -> dict[str, Any]:
    """Settings of gradient checkpointing, under the name that the installed transformers 5 has for it."""
    from transformers import TrainingArguments

    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class Shape:
    """Of the student; see `student_from_teacher`."""

    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    architecture: str = "distilbert"
    hidden_size: int | None = None
    num_heads: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What `distill` does with a job.

    Attributes:
        student: how it is trained.
        teacher: how the teacher is, if it has to be.
        train_body: the teacher is trained as a whole; False: only its new head (for "mlm").
        shape: of the student.
        objective: settings of `DistillationArguments`, such as temperature and the alphas.
        cache: mlm: so many of the teacher's most likely tokens are kept on disk for each row, and the rest as one
            number; the teacher runs once, over all epochs, and not beside the student. 0: it runs beside it.
        compare: names of further variants of the job to train beside the student, for an ablation or a baseline.
        compression: of student and variants while they are trained.
    """

    student: Training = field(default_factory=Training)
    teacher: Training = field(default_factory=lambda: Training(epochs=None))
    train_body: bool = True
    shape: Shape = field(default_factory=Shape)
    objective: Mapping[str, Any] = field(default_factory=dict)
    cache: int = 0
    compare: Sequence[str] = ()
    compression: StudentCompression = field(default_factory=StudentCompression)


@dataclass(frozen=True)
class Compression:
    """What `compress` does with a job.

    Attributes:
        student: how a student of fewer layers is distilled.
        recovery: how a model that was pruned is, from the uncompressed teacher.
        teacher: how that is trained, if it has to be.
        objective: temperature and alpha, see `DistillationArguments`.
        layers: depth of students; None: it follows from the speed that is asked for.
        codebook: linear layers share so many values, 256, 64 or 16; None: they are int8.
        clock: whose speed counts, "latency", of a call with one row, or "throughput", of calls with 32.
        sentences: training rows that pruning and quantization look at.
        threads: of models that are timed; None: as many as torch uses.
        most_pruned: the largest share of a layer's time that is pruned; what is more takes a layer away.
    """

    student: Training = field(default_factory=lambda: Training(batch_size=32, learning_rate=1e-4))
    recovery: Training = field(default_factory=lambda: Training(batch_size=32, learning_rate=1e-4))
    teacher: Training = field(default_factory=lambda: Training(epochs=None, batch_size=32, learning_rate=5e-5))
    objective: Mapping[str, Any] = field(default_factory=dict)
    layers: int | None = None
    codebook: int | None = None
    clock: str = "latency"
    sentences: int = 2048
    threads: int | None = None
    most_pruned: float = 0.6

    def check(self) -> None:
        """Raise RecipeError for a setting out of range."""
        for name in ("student", "recovery", "teacher"):
            getattr(self, name).check(name, command="compress")
        for name in ("student", "recovery"):
            training = getattr(self, name)
            require((training.epochs or 0) + training.max_steps > 0, f"compress: {name} epochs", "above 0", 0)
        for name, fits, expected in (
            ("layers", self.layers is None or self.layers >= 1, "at least 1"),
            ("codebook", self.codebook in (None, 256, 64, 16), "256, 64 or 16"),
            ("clock", self.clock in ("latency", "throughput"), "latency or throughput"),
            ("sentences", self.sentences >= 1, "at least 1"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
            ("most_pruned", 0 < self.most_pruned < 1, "above 0 and below 1"),
        ):
            require(fits, f"compress: {name}", expected, getattr(self, name))


@dataclass(frozen=True)
class Goals:
    """What a compressed model must reach, or it is rejected.

    Attributes:
        speedups: how many times as fast as the teacher under transformers, ascending; none: as fast as
            `accuracy_drop` allows.
        accuracy_drop: the most that may be lost of the job's first metric, in points; None: no limit.
        accept: keep a model that misses a goal.
    """

    speedups: tuple[float, ...] = ()
    accuracy_drop: float | None = None
    accept: bool = False

    def check(self) -> None:
        """Raise RecipeError for a number out of range, or goals that say nothing."""
        for speedup in self.speedups:
            require(1 < speedup < math.inf, "compress: speedup", "above 1", f"{speedup:g}")
        drop = self.accuracy_drop
        require(drop is None or 0 <= drop < 100, "compress: accuracy_drop", "points from 0 to below 100", drop)
        require(bool(self.speedups) or drop is not None, "compress", "a speedup, an accuracy_drop or both", "neither")


def check_models(job: Job, source: Path, recipe: Recipe, command: str = "distill") -> StudentReport:
    """Refuse teacher, student, data and losses that do not go together, before anything is trained.

    Returns what the student will be made of.
    """
    from distilbert_fast.distillation.student import student_from_teacher
    from distilbert_fast.distillation.teachers.model import ModelTeacher
    from distilbert_fast.modeling.loading import load_with_head

    with refused(command):
        other = _other_head(source, job)
        job.match_classes(class_names(source), kept=not (recipe.teacher.epochs or other))
        teacher, _, random = load_with_head(source, job.head, recipe.teacher.epochs != 0, **job.config)
        if not (random or recipe.teacher.epochs):
            _check_kept_head(source, job, other)
        student, made_of = student_from_teacher(teacher, **dataclasses.asdict(recipe.shape))
        objective = objective_for(job, recipe, student, teacher)
        objective.check(student, ModelTeacher(teacher))
        recipe.compression.check(student, job)
    if job.streaming:
        trains = {"student": recipe.student} | ({"teacher": recipe.teacher} if random or recipe.teacher.epochs else {})
        for name, training in trains.items():
            expected = "above 0 for a corpus that is streamed"
            require(training.max_steps > 0, f"{command}: {name} max_steps", expected, training.max_steps)
        require(recipe.cache == 0, f"{command}: cache", "0 for a corpus that is streamed", recipe.cache)
    positions = _positions(job, student.config)
    expected = f"4 to {positions}, the positions of the student"
    require(4 <= job.max_length <= positions, f"{command}: max_length", expected, job.max_length)
    if recipe.cache:
        _check_cache(job, recipe, objective, teacher.config.vocab_size)
    return made_of


def _other_head(source: Path, job: Job) -> str | None:
    """The class that a checkpoint was saved from, if its head is another than the job's under the same names."""
    alike = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")
    classes = config_of(source).get("architectures") or []
    return next((name for name in classes if name.endswith(alike) and not name.endswith(f"For{job.head}")), None)


def _check_kept_head(source: Path, job: Job, other: str | None) -> None:
    """Refuse to take a head as it is that was trained for something else."""
    wanted, has = job.config.get("problem_type"), config_of(source).get("problem_type")
    for expected, got in ((f"a model for {job.head}", other), (f"problem_type {wanted}", wanted and has)):
        if got and got != wanted:
            raise ValueError(f"teacher: expected {expected}, got {got}; train it on the data (teacher_epochs)")


def check_devices(processes: int, command: str = "distill") -> None:
    """Refuse a process that has several GPUs, of which it would use one."""
    import torch

    if processes == 1 and "LOCAL_RANK" not in os.environ:
        count = torch.cuda.device_count()
        launcher = f"torchrun --nproc-per-node {count} -m distilbert_fast {command}"
        advice = f"{count}; start it by {launcher}, or name one in CUDA_VISIBLE_DEVICES"
        require(count <= 1, f"{command}: GPUs", "one a process", advice)


def _check_cache(job: Job, recipe: Recipe, objective: Any, vocabulary: int) -> None:
    """Refuse settings that need answers of the teacher which a cache does not hold."""
    needs_all = ", ".join(name for name in ("mse", "hidden", "relation") if name in objective.names)
    alone, changes = job.kind == "mlm" and not needs_all, isinstance(objective.temperature, str)
    require(alone, "distill: cache", "0 but for the losses kl, mlm and cos of mlm", needs_all or job.kind)
    require(0 < recipe.cache <= vocabulary, "distill: cache", f"0 to {vocabulary}, the tokens there are", recipe.cache)
    require(not changes, "distill: cache", "0 for a temperature that changes", objective.temperature)
    masked = "cos" in objective.names and objective.kd_positions == "masked"
    expected = "0 for kd_positions masked with the loss cos, which takes all tokens"
    require(not masked, "distill: cache", expected, recipe.cache)


def _positions(job: Job, config: Any) -> int:
    """The longest rows that a student reads."""
    from distilbert_fast.data.masking import MULTIPLE
    from distilbert_fast.modeling.architectures import longest_sequence

    positions = longest_sequence(config)
    return positions // MULTIPLE * MULTIPLE if job.kind == "mlm" else positions  # to which its rows are padded


def objective_for(job: Job, recipe: Recipe, student: Any, teacher: Any) -> Any:
    """The objective that the student is trained for."""
    from distilbert_fast.distillation.arguments import DistillationArguments, objective_of

    arguments = recipe.student.arguments(Path("unused"), rows=1)  # Trainer's arguments make no directory
    return objective_of(
        DistillationArguments(objective=job.kind, **arguments, **merged(recipe, STUDENT)), student, teacher
    )


def merged(recipe: Recipe, variant: Variant) -> dict[str, Any]:
    return {**recipe.objective, **variant.objective}


def distinct(variants: Sequence[Variant], recipe: Recipe, from_layers: bool = True) -> list[Variant]:
    """The variants that differ from the student and have a loss left.

    ``from_layers``: the student starts from layers of its teacher, not at random like some of its variants.
    """
    student = _weights(merged(recipe, STUDENT))
    weights = [_weights(merged(recipe, variant)) for variant in variants]
    return [
        variant
        for variant, own in zip(variants, weights, strict=True)
        if own.keys() - {"alpha"} and (own != student or (variant.random and from_layers))
    ]


def is_taught(kind: str, objective: Mapping[str, Any]) -> bool:
    """Whether any loss needs the teacher."""
    return not _weights(objective).keys().isdisjoint(_OF_TEACHER if kind == "mlm" else ("alpha",))


def leaves_head(kind: str, objective: Mapping[str, Any]) -> bool:
    """Whether no loss reaches the head, whose weights then get no gradient."""
    return kind == "mlm" and _weights(objective).keys().isdisjoint(("alpha_ce", "alpha_mlm", "alpha_mse"))


def _weights(objective: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of all losses that are not 0 throughout; numbers that came as text as numbers."""
    from distilbert_fast.distillation.arguments import DistillationArguments
    from distilbert_fast.distillation.schedule import is_zero, plain

    names = ("alpha", "alpha_mlm", *_OF_TEACHER)
    given = {name: objective.get(name, getattr(DistillationArguments, name)) for name in names}
    return {name: plain(weight) for name, weight in given.items() if not is_zero(weight)}
