"""Distil a teacher into a student, from text to a model with its card: masked language modelling, a task, or answers.

The recipe is DistilBERT's (Sanh, Debut, Chaumond, Wolf, arXiv:1910.01108): a student of the teacher's own layers;
τ = 2; KL, MLM and cosine losses weighted 5, 2, 1; AdamW with betas (0.9, 0.98) and eps 1e-6, gradients clipped at 5,
5 % linear warm-up and linear decay, 3 epochs. docs/distillation.md describes the differences, with reasons.

    teacher → student (and its variants, one after another) → speed → report

Each is a stage of a `RunDirectory`: a command that was killed goes on from its newest complete checkpoint. Under
torchrun or accelerate launch every process comes here; all train, and the first does all else (processes.py).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

from transformers import set_seed

from distilbert_fast.distillation.schedule import at, is_zero
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.teachers.build_cache import build_cache, cache_report
from distilbert_fast.distillation.teachers.cache import CachedTeacher
from distilbert_fast.distillation.teachers.model import ModelTeacher
from distilbert_fast.evaluation import distillation_report as report
from distilbert_fast.files.durable import write_file
from distilbert_fast.files.schema import anything, record
from distilbert_fast.jobs import stage_results
from distilbert_fast.jobs.flow import CHECKPOINTS, TEACHER, Stage, console, find_teacher
from distilbert_fast.jobs.job import STUDENT, Job, Variant
from distilbert_fast.jobs.settings import (
    Recipe,
    RecipeError,
    Shape,
    Training,
    check_devices,
    check_models,
    distinct,
    is_taught,
    merged,
    objective_for,
    refused,
    require,
)
from distilbert_fast.jobs.trained_flow import TrainedFlow
from distilbert_fast.modeling.loading import checkpoint_digest, without_bars
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.training import for_training
from distilbert_fast.runs.processes import Processes, SharedRun, processes
from distilbert_fast.runs.run_directory import RunDirectory

__all__ = ["Recipe", "Shape", "Training", "distill"]

CORPUS, CACHE, DATA, SPEED = "corpus", "teacher-cache", "data.json", "speed.json"
REPORT = ("report.md", "report.json", "losses.png")
_REPORTED = 32  # rows on which a cache is compared with its teacher


def distill(
    job: Job,
    output: str | Path,
    teacher: str | Path | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Distil a teacher on a job, and report what came of it.

    Args:
        job: data and metrics, such as those of task.py and mlm.py.
        output: directory for `teacher/`, `student/` (models with tokenizer; the student with a model card), a
            directory for each variant, report.md, report.json, losses.png. Killed at any moment, the same call
            continues; with more to compare, it adds that. Of several processes, all have to see it.
        teacher: directory or hub id of an encoder that `optimize` takes; by default the one in the extra `demo`.
        recipe: training, losses and the student's shape.
        overwrite: see `RunDirectory`.
        command: what the report names as the command that made it.

    Returns:
        The content of report.json.

    Raises:
        RecipeError: data, teacher or a setting that cannot be used.
        StageError: an output directory that holds something else.
    """
    recipe, together = recipe or Recipe(), processes()
    check_devices(together.count)
    recipe.student.check("student", together.count)
    recipe.teacher.check("teacher", together.count)
    epochs = recipe.student.epochs
    require(epochs is not None and epochs + recipe.student.max_steps > 0, "distill: student epochs", "above 0", epochs)
    source = find_teacher(teacher, "distill")
    known = {variant.name: variant for variant in job.variants}
    for name in recipe.compare:
        require(name in known, "distill: compare", f"of {', '.join([*known][1:])}", name)
    say = console() if together.is_first else lambda *lines: None
    names = (TEACHER, *known, CACHE, DATA, CHECKPOINTS, SPEED, *REPORT)
    with without_bars(), together.joined():
        made_of = check_models(job, source, recipe)
        compared = [known[name] for name in recipe.compare if name != STUDENT.name]
        variants = [STUDENT, *distinct(compared, recipe, from_layers=bool(made_of.layers))]
        settings = {
            "teacher": f"{teacher or source.name} ({checkpoint_digest(source)[:12]})",
            "data": job.describe(),
            "student_training": dataclasses.asdict(recipe.student),
            "teacher_training": {**dataclasses.asdict(recipe.teacher), "train_body": recipe.train_body},
            "shape": dataclasses.asdict(recipe.shape),
            "objective": dict(recipe.objective),
            "cache": recipe.cache,
        } | ({"compression": dataclasses.asdict(recipe.compression)} if recipe.compression else {})
        directory = RunDirectory(output, f"distill-{job.name}", settings, names, overwrite, [CORPUS])
        with SharedRun(directory, together) as run:
            flow = _Distillation(recipe, together, run, source, job, say)
            say(f"distill {job.name} on {job.describe()['name']}; output: {run.path}")
            with refused("distill"):
                together.in_turn(lambda: job.prepare(flow.tokenizer(), run.path))
            data = record(dict.fromkeys(job.describe(), anything))
            if run.result(DATA, job.describe, data) != job.describe():
                raise RecipeError(
                    f"distill: data: {str(run.path)!r} was made from other data of that name; choose another directory"
                )
            stages: dict[str, Stage] = {TEACHER: ("the teacher", flow.teach)}
            for variant in variants:
                stages[variant.name] = (f"the student, {variant.title}", functools.partial(flow.distil, variant))
            steps = len(stages) + 1
            results = flow.build(stages, stage_results.distilled, steps)
            say(f"[{steps}/{steps}] speed, report and model card")
            measured = run.result(SPEED, flow.measure, stage_results.speed)
            content = {
                "command": command or "distilbert_fast.distill(...)",
                "kind": job.name,
                "head": job.head,
                "settings": settings,
                "data": job.describe(),
                "metrics": [list(metric) for metric in job.metrics],
                "legend": job.legend,
                "models": results,
                **measured,
            }
            return together.first(lambda: flow.write_report(content))


class _Distillation(TrainedFlow):
    """The stages of `distill`."""

    def __init__(self, recipe: Recipe, together: Processes, *of_any: Any) -> None:
        super().__init__("distill", together, recipe.teacher, recipe.train_body, *of_any)
        self.recipe = recipe

    def distil(self, variant: Variant, path: Path) -> dict[str, Any]:
        training = self.recipe.student
        set_seed(training.seed)
        teacher, tokenizer, _ = self.load(self.run.path / TEACHER)
        student, made_of = student_from_teacher(teacher, **dataclasses.asdict(self.recipe.shape))
        if variant.random:
            student = for_training(type(student)(copy.deepcopy(student.config))).to(teacher.device)
        objective = merged(self.recipe, variant)
        taught, cached = teacher if is_taught(self.job.kind, objective) else None, {}
        if taught is not None and self.recipe.cache:
            cache = self.together.first(lambda: str(self._cache(teacher)))
            objective |= {"teacher_cache": cache, "teacher_precision": "auto"}
            cached = self.together.first(lambda: self._cache_report(cache, student, teacher))
        compression = self.recipe.compression
        compression.begin(student, self.job)
        callbacks = compression.callbacks()
        made = self.fit(variant.name, student, taught, training, objective, callbacks) | {"cache": cached}
        compression.end(student)
        made["start"] = "random"
        if made_of.layers and not variant.random:
            made |= {"start": f"layers {', '.join(map(str, made_of.layers))}", "made_of": str(made_of)}
        return made | {"title": variant.title} | self.keep(path, student, tokenizer, teacher)

    def _cache(self, teacher: Any) -> Path:
        """Return the directory that holds the teacher's answers to all training rows; it is made once."""
        objective = objective_for(self.job, self.recipe, teacher, teacher)
        rows = self.job.train_rows
        with refused("distill"):
            return build_cache(
                ModelTeacher(teacher, self.recipe.objective.get("teacher_precision", "auto")),
                rows,
                self.run.path / CACHE,
                k=self.recipe.cache,
                temperature=at(objective.temperature, 0.0),
                positions=objective.kd_positions,
                hidden=not is_zero(objective.cos),
                epochs=self.recipe.student.passes(len(rows)),
            )

    def _cache_report(self, cache: str, student: Any, teacher: Any) -> dict[str, float]:
        """Measure the cache's size and error on the first rows."""
        rows = self.job.train_rows.at_epoch(0)
        batch = self.job.collator([rows[i] for i in range(min(len(rows), _REPORTED))])
        answers = CachedTeacher(cache, rows, teacher)
        answers.prepare(teacher.device)
        return cache_report(answers, student, teacher, [{name: x.to(teacher.device) for name, x in batch.items()}])

    def measure(self) -> dict[str, Any]:
        """Speed of teacher and student, by transformers and on the engine, in turns."""
        models = {}
        for name in (TEACHER, STUDENT.name):
            models[f"{name} transformers"] = self.job.timed(self.load(self.run.path / name)[0])
            models[f"{name} optimize()"] = optimize(self.job.timed(self.load(self.run.path / name)[0]))
        place, measured = self.clocks(models, "rows")
        return place | {"speed": measured}

    def write_report(self, content: dict[str, Any]) -> dict[str, Any]:
        for name, written in report.files(content, STUDENT.name).items():
            write_file(self.run.path / name, written)
        files = f"report: {self.run.path / REPORT[0]}; model card: {self.run.path / STUDENT.name / 'README.md'}"
        self.say(report.table(content), *report.busy_lines(content), files)
        return content
