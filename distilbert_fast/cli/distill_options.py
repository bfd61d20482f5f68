"""The options that the commands of `distilbert-fast distill` have in common, and the panels of their help."""

from __future__ import annotations

import re
import shlex
import sys
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbert_fast.cli.command import EvalFile, RunCommand
from distilbert_fast.cli.training_options import TrainingOptions
from distilbert_fast.jobs.compressed_student import StudentCompression
from distilbert_fast.jobs.settings import Recipe, Shape, Training, refused, require

if TYPE_CHECKING:
    from distilbert_fast.jobs.job import Job

# Options of the panels that follow the first one.
in_losses = partial(typer.Option, rich_help_panel="Losses: numbers, or schedules such as linear:2:1")
in_teaching = partial(typer.Option, rich_help_panel="Training the teacher")
in_compression = partial(typer.Option, rich_help_panel="Compressing the student while it is trained")
in_shape = partial(typer.Option, rich_help_panel="The student's shape")


@dataclass(kw_only=True)
class DistillCommand(TrainingOptions, RunCommand):
    """Options of every distillation; the defaults fit a task."""

    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Also train students that lack a loss or start at random, and compare all in a table.",
        ),
    ] = False
    temperature: Annotated[str, in_losses(help="τ of the KL divergence.")] = "2.0"
    teacher_epochs: Annotated[
        float | None, in_teaching(help="Passes over the rows; by default 0 for a teacher that has its head.")
    ] = None
    teacher_steps: Annotated[int, in_teaching(help="Stop after so many steps; 0: after the epochs.")] = 0
    teacher_lr: Annotated[float, in_teaching(help="Peak learning rate.")] = 5e-5
    teacher_batch_size: Annotated[int, in_teaching(help="Rows of an optimizer step.")] = 32
    teacher_precision: Annotated[
        str,
        in_teaching(
            help="How it runs beside the student. fp32, bf16, fp16 or int8: on the engine; model: by its own forward; "
            "auto: on the engine if there is no GPU."
        ),
    ] = "auto"
    layers: Annotated[
        str, in_shape(metavar="N|I,J,…", help="How many layers, or which of the teacher's (0,2,5); by default half.")
    ] = ""
    architecture: Annotated[str, in_shape(help="distilbert or roberta.")] = "distilbert"
    hidden_size: Annotated[
        int | None, in_shape(help="Another width of hidden states; the student then starts at random.")
    ] = None
    num_heads: Annotated[int | None, in_shape(help="Attention heads.")] = None
    intermediate_size: Annotated[int | None, in_shape(help="Width of the feed-forward layers.")] = None
    sparsity: Annotated[
        float,
        in_compression(
            help="Share of the weights of its linear layers that training sets to 0, little by little; the file is "
            "smaller, the model not faster."
        ),
    ] = 0.0
    sparsity_method: Annotated[
        str, in_compression(help="magnitude: the smallest go; movement: those that training moves towards 0.")
    ] = "magnitude"
    sparsity_scope: Annotated[str, in_compression(help="layer: of each alike; global: of all together.")] = "layer"
    sparsity_pattern: Annotated[
        str | None, in_compression(help="2:4: two of each four in a row stay; with --sparsity 0.5.")
    ] = None
    qat: Annotated[
        str,
        in_compression(
            help="int8: train weights that compute as int8; codebook: ones that share few values; values: only these "
            "values, which weight has which is found once."
        ),
    ] = ""
    codebook: Annotated[int, in_compression(help="How many values weights share: 256, 64 or 16.")] = 16
    group_size: Annotated[
        int | None, in_compression(help="Rows of a layer that share them; by default all rows do.")
    ] = None

    @abstractmethod
    def job(self) -> Job:
        """Data and metrics. Raises ValueError or FileNotFoundError for data that cannot be used."""

    @abstractmethod
    def objective(self, job: Job) -> dict[str, Any]:
        """Settings of `DistillationArguments`."""

    def compare(self, job: Job) -> list[str]:
        """Names of the variants that are trained too."""
        return [variant.name for variant in job.variants] if self.ablate else []

    def recipe(self, job: Job) -> Recipe:
        of_both: dict[str, Any] = {"micro_batch": self.micro_batch, "bf16": self.bf16, "seed": self.seed}
        taught = (self.teacher_epochs, self.teacher_steps, self.teacher_batch_size)
        teacher = Training(*taught, learning_rate=self.teacher_lr, **of_both)
        own = {"sparsity", "sparsity_method", "sparsity_scope", "sparsity_pattern", "qat", "codebook", "group_size"}
        compression = StudentCompression(**{name: getattr(self, name) for name in own})
        compare = self.compare(job)
        return Recipe(self.training(), teacher, True, self._shape(), self.objective(job), 0, compare, compression)

    def run(self) -> None:
        from distilbert_fast.jobs.distill import distill
        from distilbert_fast.runs.processes import launcher

        with refused():
            job = self.job()
        command = shlex.join([*launcher(), *sys.argv[1:]])
        distill(job, self.output, self.teacher, self.recipe(job), self.overwrite, command)

    def _shape(self) -> Shape:
        parts = [part for part in self.layers.split(",") if part]
        readable = all(re.fullmatch(r"\s*[-+]?\d+\s*", part) for part in parts)
        require(readable, "distill: layers", "a depth or layers such as 0,2,5", repr(self.layers))
        numbers, several = tuple(map(int, parts)), "," in self.layers
        depth, chosen = (numbers[0] if numbers and not several else None), (numbers if several else None)
        return Shape(depth, chosen, self.architecture, self.hidden_size, self.num_heads, self.intermediate_size)


@dataclass(kw_only=True)
class TaskCommand(DistillCommand):
    """Options of a distillation on labels."""

    eval_data: EvalFile = None
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also fine-tune the same student without its teacher, to compare.")
    ] = False
    alpha: Annotated[str, in_losses(help="Weight of KL, or the squared error; the labels have 1 - alpha.")] = "0.5"

    def objective(self, job: Job) -> dict[str, Any]:
        settings = ("temperature", "alpha", "teacher_precision")
        return {name: getattr(self, name) for name in settings}

    def compare(self, job: Job) -> list[str]:
        return super().compare(job) or (["without-teacher"] if self.baseline else [])
