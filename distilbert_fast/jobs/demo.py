"""`demo`: distil on a small task, quantize, time and plot; it begins by saying how long that will take."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from distilbert_fast.compression.quantize import quantize_model
from distilbert_fast.data.tasks import BUILT_IN, Task, load_task
from distilbert_fast.distillation.arguments import DistillationArguments
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.evaluation import metrics, report
from distilbert_fast.evaluation.speed import call_seconds, step_seconds
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs import stage_results
from distilbert_fast.jobs.flow import (
    ALONE,
    BATCHED,
    CHECKPOINTS,
    TEACHER,
    TEACHER_PACKAGE,
    TURNS,
    Flow,
    Stage,
    console,
    find_teacher,
    save,
)
from distilbert_fast.jobs.settings import (
    DEMO_ROWS,
    DemoTraining,
    RecipeError,
    class_names,
    refused,
    require,
    training_arguments,
)
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.modeling.loading import checkpoint_digest, without_bars
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.training import for_training
from distilbert_fast.runs.resumable_trainer import ResumableTrainer, newest_complete_checkpoint
from distilbert_fast.runs.run_directory import RunDirectory

__all__ = ["DemoTraining", "RecipeError", "demo"]

STUDENT, STUDENT_INT8 = "student", "student-int8"
MODELS = (TEACHER, STUDENT, STUDENT_INT8)
MEASURED = "evaluation.json"
REPORT = ("report.md", "report.json", "report.png")


def demo(
    output: str | Path,
    teacher: str | Path | None = None,
    task: str | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    max_train_rows: int | None = None,
    training: DemoTraining | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Distil, quantize and speed up a model on a task, and report what came of it.

    1. fine-tune the teacher, 2. distil it into a DistilBERT of half its depth, 3. quantize the student's linears to
    int8, 4. measure all three, beside plain transformers on the same inputs, 5. write the report.

    Args:
        output: directory for `teacher/`, `student/`, `student-int8/` (models with tokenizer, for `from_pretrained`),
            report.md, report.json and report.png. Killed at any moment, the same call continues.
        teacher: directory or hub id of an encoder that `optimize` takes; by default the one in the extra `demo`.
        task, data, eval_data, max_train_rows: see `load_task`; of the built-in task 1,600 rows by default.
        training: epochs, learning rates and the like.
        overwrite: see `RunDirectory`.
        command: what the report names as the command that made it.

    Returns:
        The content of report.json.

    Raises:
        RecipeError: a task, teacher or setting that cannot be used; nothing is written yet.
        StageError: an output directory that holds something else.
    """
    training = training or DemoTraining()
    training.check()
    say = console()
    if max_train_rows is None and data is None and task in (None, BUILT_IN):
        max_train_rows = DEMO_ROWS
    with refused():
        loaded = load_task(task, data, eval_data, max_train_rows)
    got = "numbers, which are for `distilbert-fast distill`"
    require(not loaded.regression, "demo: task", "classes as labels", got)
    source = find_teacher(teacher)
    job = TaskJob(loaded, training.max_length)
    with refused():
        job.match_classes(class_names(source), kept=training.teacher_epochs == 0)
    settings = {
        "teacher": f"{teacher or TEACHER_PACKAGE} ({checkpoint_digest(source)[:12]})",
        "task": f"{job.task.name} ({job.task.fingerprint[:12]})",
        **dataclasses.asdict(training),
    }
    names = (*MODELS, CHECKPOINTS, MEASURED, *REPORT)
    with RunDirectory(output, "demo", settings, names, overwrite) as run, without_bars():
        described = _describe(job.task)
        say(
            f"task {job.task.name}: {described['train_sentences']} sentences to train on, "
            f"{described['eval_sentences']} to evaluate, {len(job.task.label_names)} classes; output: {run.path}"
        )
        flow = _Demo(training, run, source, job, say)
        flow.prepare()
        stages: dict[str, Stage] = {
            TEACHER: ("fine-tune the teacher on the task", flow.fine_tune),
            STUDENT: ("distil it into a DistilBERT of half the depth", flow.distil),
            STUDENT_INT8: ("quantize the student's linear layers to int8", flow.quantize),
        }
        results = flow.build(stages, stage_results.DEMO_STAGE, 5)
        say("[4/5] measure all three beside transformers" + (": done before" if run.is_complete(MEASURED) else ""))
        measured = run.result(MEASURED, flow.measure, stage_results.demo_measured(MODELS))
        say("[5/5] write the report")
        content = {
            "command": command or "distilbert_fast.demo(...)",
            "settings": settings,
            "task": described,
            "stages": results,
            **measured,
        }
        for name, written in report.files(content).items():
            write_file(run.path / name, written)
        say(report.table(content), *report.busy_lines(content), f"report: {run.path / REPORT[0]}")
        return content


class _Demo(Flow):
    """The stages of `demo`."""

    job: TaskJob

    def __init__(self, training: DemoTraining, *of_any: Any) -> None:
        super().__init__(*of_any)
        self.training = training
        self.epoch_steps = math.ceil(len(self.job.task.train) / training.batch_size)

    def prepare(self) -> None:
        """Make the rows, refuse what cannot be trained, and say how long the rest will take."""
        with refused("demo: teacher"):
            tokenizer = self.tokenizer()
        self.job.prepare(tokenizer, self.run.path)
        if all(map(self.run.is_complete, (*MODELS, MEASURED))):
            return
        with refused("demo: teacher"):
            teacher, *_ = self.load(self.source, self.training.teacher_epochs > 0, **self.job.config)
            student, _ = student_from_teacher(teacher)
        positions = student.config.max_position_embeddings
        expected, length = f"at most {positions}, the positions that the teacher knows", self.training.max_length
        require(length <= positions, "demo: max_length", expected, length)
        minutes = self._seconds(teacher, student) / 60
        about = "less than a minute" if minutes < 1 else f"about {math.ceil(minutes)} minutes"
        self.say(f"this will take {about}, going by a few steps taken just now")

    def _seconds(self, teacher: Any, student: Any) -> float:
        """Estimate how long the rest will take, from steps on rows of medium length, which change these models."""
        rows = sorted(self.job.train_rows, key=lambda row: len(row["input_ids"]))
        size = min(self.training.batch_size, len(rows))
        first = (len(rows) - size) // 2
        batch = dict(self.job.collator(rows[first : first + size]).to(teacher.device))
        batch.pop("token_type_ids", None)  # which the student does not read
        calls = {TEACHER: call_seconds(teacher, batch), STUDENT: call_seconds(student, batch)}
        seconds = 0.0
        for name, model, epochs, beside in (
            (TEACHER, teacher, self.training.teacher_epochs, 0.0),
            (STUDENT, student, self.training.student_epochs, calls[TEACHER]),
        ):
            if epochs and not self.run.is_complete(name):
                checkpoint = newest_complete_checkpoint(self.run.path / CHECKPOINTS / name)
                done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
                steps = self.epoch_steps * epochs - done
                seconds += steps * (step_seconds(for_training(model), batch) + beside)
        for name, call in ((TEACHER, calls[TEACHER]), (STUDENT, calls[STUDENT]), (STUDENT_INT8, calls[STUDENT])):
            evaluated = 0 if self.run.is_complete(name) else 2 * len(self.job.task.eval)  # as made, and read back
            if not self.run.is_complete(MEASURED):
                evaluated += 2 * len(self.job.task.eval) + 2 * (TURNS + 1) * (2 * ALONE + BATCHED)
            seconds += evaluated / size * call
        return seconds

    def fine_tune(self, path: Path) -> dict[str, Any]:
        set_seed(self.training.seed)
        epochs = self.training.teacher_epochs
        model, tokenizer, _ = self.load(self.source, epochs > 0, **self.job.config)
        trained: dict[str, Any] = {"seconds": 0.0, "resumed": False}
        if epochs > 0:
            arguments = TrainingArguments(**self._arguments(TEACHER, epochs, self.training.teacher_lr))
            trained = self._train(ResumableTrainer, model=for_training(model), args=arguments)
        return trained | self._save(path, model, tokenizer)

    def distil(self, path: Path) -> dict[str, Any]:
        set_seed(self.training.seed)
        teacher, tokenizer, _ = self.load(self.run.path / TEACHER)
        student, made_of = student_from_teacher(teacher)
        self.say(
            f"      layers {', '.join(map(str, made_of.layers))} of {made_of.teacher}, "
            f"{made_of.teacher_parameters:,} -> {made_of.student_parameters:,} parameters"
        )
        arguments = DistillationArguments(
            temperature=self.training.temperature,
            alpha=self.training.alpha,
            **self._arguments(STUDENT, self.training.student_epochs, self.training.student_lr),
        )
        trained = self._train(DistillationTrainer, model=student, teacher=teacher, args=arguments)
        return trained | {"layers": list(made_of.layers)} | self._save(path, student, tokenizer)

    def quantize(self, path: Path) -> dict[str, Any]:
        start = time.perf_counter()
        student, tokenizer, _ = self.load(self.run.path / STUDENT)
        quantized = quantize_model(student)
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | self._save(path, quantized, tokenizer)

    def measure(self) -> dict[str, Any]:
        labels = torch.tensor(self.job.task.eval["label"])
        rows: dict[str, dict[str, Any]] = {}
        models: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        for name in MODELS:
            model, fast = self.load(self.run.path / name)[0], optimize(self.load(self.run.path / name)[0])
            logits = self.job.answers(model)
            answers[name] = logits
            rows[name] = self.size(model, self.run.path / name) | {
                "accuracy": metrics.accuracy(logits, labels),
                "macro_f1": metrics.macro_f1(logits, labels),
                "agreement": metrics.agreement(logits, answers[TEACHER]),
                "kl_from_teacher": metrics.mean_kl(logits, answers[TEACHER]),
                "optimized_agreement": metrics.agreement(self.job.answers(fast), logits),
            }
            models |= {f"{name} transformers": model, f"{name} distilbert_fast": fast}
        self.say("      accuracy is known; now all models are timed, in turns")
        place, measured = self.clocks(models, "sentences")
        for key, by_model in measured.items():
            for model, timing in by_model.items():
                name, library = model.split(" ")
                rows[name].setdefault(key, {})[library] = timing
        return place | {"models": rows}

    def _arguments(self, name: str, epochs: int, learning_rate: float) -> dict[str, Any]:
        steps = self.epoch_steps
        return {
            **training_arguments(self.run.path / CHECKPOINTS / name, self.training.seed),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": self.training.batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": max(1, steps * epochs // 10),
            "weight_decay": 0.01,
            "save_steps": min(steps, 250),
            "logging_strategy": "epoch",
        }

    def _train(self, trainer_class: Any, **arguments: Any) -> dict[str, Any]:
        parts = {"data_collator": self.job.collator, "processing_class": self.job.tokenizer}
        trainer = trainer_class(train_dataset=self.job.train_rows, **parts, **arguments)
        return self.train(trainer)

    def _save(self, path: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Save, read back, and compare what both predict on the evaluation split."""
        save("demo", path, model, tokenizer)
        before, after = self.job.answers(model), self.job.answers(self.load(path)[0])
        difference = float((before - after).abs().max())
        same = int((before.argmax(dim=1) == after.argmax(dim=1)).sum())
        if same != len(before):
            raise RuntimeError(
                f"demo: the model read back from {str(path)!r} chooses another class for {len(before) - same} of "
                f"{len(before)} sentences (largest difference of a logit: {difference:.3g})"
            )
        return {"read_back": {"sentences": len(before), "same_class": same, "largest_difference": difference}}


def _describe(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "train_sentences": len(task.train),
        "eval_sentences": len(task.eval),
        "eval_sentences_in_train": task.overlap,
        "labels": list(task.label_names),
        "majority_share": max(task.eval["label"].count(i) for i in range(len(task.label_names))) / len(task.eval),
    }
