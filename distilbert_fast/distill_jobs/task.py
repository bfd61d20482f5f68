"""Distillation on a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.distill_jobs.job import LABELS_ALONE, TASK_VARIANTS, Metric

if TYPE_CHECKING:
    from distilbert_fast.evaluation.speed import Batch
    from distilbert_fast.evaluation.tasks import Task


class TaskJob:
    """Classification of sentences or pairs of them; see `load_task` for the data."""

    kind, head = "task", "SequenceClassification"
    teacher_epochs = 3.0
    metrics = (
        Metric("accuracy", "accuracy", True),
        Metric("matthews", "Matthews"),
        Metric("macro_f1", "macro-F1", True),
        Metric("agreement", "agreement", True),
        Metric("kl", "KL"),
    )
    untaught = LABELS_ALONE
    variants = TASK_VARIANTS

    def __init__(self, task: Task, max_length: int = 128) -> None:
        self.task, self.max_length = task, max_length

    @property
    def config(self) -> Mapping[str, Any]:
        names = self.task.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "ignore_mismatched_sizes": True,  # a head of other classes is one that is missing
        }

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        self.task = self.task.for_classes(classes, kept)

    def describe(self) -> dict[str, Any]:
        task = self.task
        return {
            "name": task.name,
            "train": len(task.train),
            "eval": len(task.eval),
            **({"pairs": ", ".join(task.columns)} if len(task.columns) > 1 else {}),
            "classes": ", ".join(task.label_names),
            "fingerprint": task.fingerprint[:12],
            "max_length": self.max_length,
        }

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        from datasets import Dataset

        from distilbert_fast.evaluation.texts import tokenized

        self.tokenizer = tokenizer
        encoded = tokenized(tokenizer, self.task.texts(self.task.train), self.max_length)
        self._rows = Dataset.from_dict({**encoded, "labels": list(self.task.train["label"])})

    def rows(self) -> Any:
        return self._rows

    def collator(self) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        import torch

        from distilbert_fast.evaluation import metrics

        def answers(of: Any) -> Any:
            texts = self.task.texts(self.task.eval)
            return metrics.predictions(of, self.tokenizer, texts, max_length=self.max_length)

        labels, logits = torch.tensor(self.task.eval["label"]), answers(model)
        row = {name: getattr(metrics, name)(logits, labels) for name in ("accuracy", "matthews", "macro_f1")}
        if teacher is not None:
            taught = answers(teacher)
            row |= {"agreement": metrics.agreement(logits, taught), "kl": metrics.mean_kl(logits, taught)}
        return row

    def timed(self, model: Any) -> Any:
        return model

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        from distilbert_fast.evaluation import speed

        texts = self.task.texts(self.task.eval)
        timed = texts[:: max(1, len(texts) // rows)][:rows]
        return speed.batches(self.tokenizer, timed, size, self.max_length, "cpu")
