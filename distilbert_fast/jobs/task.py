"""Distillation on a task: classification or regression of sentences, or of pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding

from distilbert_fast.data.sentences import by_length, tokenized
from distilbert_fast.data.tasks import Task
from distilbert_fast.evaluation import metrics, speed
from distilbert_fast.evaluation.label_scores import multi_label_scores
from distilbert_fast.jobs.job import Job, Metric
from distilbert_fast.modeling.loading import classes_of_head, multi_label, single_label

_BATCH = 32  # of calibration


class TaskJob(Job):
    """Classification; see `load_task` for the data.

    Raises ValueError for a task of another kind than the job's.
    """

    kind, name, head = "task", "task", "SequenceClassification"
    labels = "classes"
    metrics: tuple[Metric, ...] = (
        Metric("accuracy", "accuracy", True),
        Metric("matthews", "Matthews"),
        Metric("macro_f1", "macro-F1", True),
        Metric("agreement", "agreement", True),
        Metric("kl", "KL"),
    )
    legend = "Agreement: the share of rows for which it chooses the teacher's class; KL from the teacher in nats."

    def __init__(self, task: Task, max_length: int = 128) -> None:
        if (got := _labels_of(task)) != self.labels:
            raise ValueError(f"{type(self).__name__}: task must have {self.labels} as labels, got {got}")
        self.task, self.max_length = task, max_length

    @property
    def config(self) -> Mapping[str, Any]:
        return single_label(self.task.label_names)

    def match_classes(self, classes: Sequence[str], kept: bool) -> None:
        self.task = self.task.for_classes(classes, kept)

    def describe(self) -> dict[str, Any]:
        task = self.task
        return {
            "name": task.name,
            "train": len(task.train),
            "eval": len(task.eval),
            **({"pairs": ", ".join(task.columns)} if len(task.columns) > 1 else {}),
            **self._labels(),
            "fingerprint": task.fingerprint[:12],
            "max_length": self.max_length,
        }

    def _labels(self) -> dict[str, str]:
        return {"classes": ", ".join(self.task.label_names)}

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        self.tokenizer = tokenizer
        self.collator = DataCollatorWithPadding(tokenizer)
        encoded = tokenized(tokenizer, self.task.texts(self.task.train), self.max_length)
        self.train_rows = Dataset.from_dict({**encoded, "labels": list(self.task.train["label"])})

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        labels = torch.tensor(self.task.eval["label"])
        return self._judge(self.answers(model), labels, None if teacher is None else self.answers(teacher))

    def answers(self, model: Any) -> Tensor:
        """The logits of a model [N, K], or its outputs [N, 1], on the evaluation split."""
        return metrics.predictions(model, self.tokenizer, self.task.texts(self.task.eval), max_length=self.max_length)

    def _judge(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> dict[str, float]:
        """Logits of a model and its teacher [N, K], labels [N]."""
        row = {name: getattr(metrics, name)(logits, labels) for name in ("accuracy", "matthews", "macro_f1")}
        if taught is not None:
            row |= {"agreement": metrics.agreement(logits, taught), "kl": metrics.mean_kl(logits, taught)}
        return row

    def calibration(self, count: int) -> list[dict[str, Tensor]]:
        """Batches of so many training rows, evenly spread, of similar length, with labels."""
        texts, labels = self.task.texts(self.task.train), list(self.task.train["label"])
        chosen = range(0, len(texts), max(len(texts) // count, 1))[:count]
        lengths = [
            len(ids) for ids in tokenized(self.tokenizer, [texts[i] for i in chosen], self.max_length)["input_ids"]
        ]
        made = []
        for rows in by_length(lengths, _BATCH):
            own = [chosen[row] for row in rows]
            how: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
            batch = tokenized(self.tokenizer, [texts[i] for i in own], self.max_length, **how)
            made.append({**batch, "labels": torch.tensor([labels[i] for i in own])})
        return made

    def batches(self, size: int, rows: int) -> Sequence[speed.Batch]:
        texts = self.task.texts(self.task.eval)
        timed = texts[:: max(1, len(texts) // rows)][:rows]
        return speed.batches_of_texts(self.tokenizer, timed, size, self.max_length, "cpu")


class RegressionJob(TaskJob):
    """Regression: labels are numbers, and the head has one output."""

    regression, labels = True, "numbers"
    metrics = (
        Metric("pearson", "Pearson"),
        Metric("spearman", "Spearman"),
        Metric("mse", "MSE"),
        Metric("teacher_mse", "MSE from the teacher"),
    )
    legend = "Pearson's and Spearman's correlation with the labels; mean squared errors in squares of the labels' unit."

    @property
    def config(self) -> Mapping[str, Any]:
        return {**classes_of_head(["LABEL_0"]), "problem_type": "regression"}

    def match_classes(self, classes: Sequence[str], kept: bool) -> None:
        """A number has no classes."""

    def _labels(self) -> dict[str, str]:
        labels = self.task.train["label"]
        return {"numbers": f"{min(labels):g} to {max(labels):g}"}

    def _judge(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> dict[str, float]:
        """Outputs of a model and its teacher [N, 1], labels [N]."""
        predicted = logits[:, 0]
        row = {name: getattr(metrics, name)(predicted, labels) for name in ("pearson", "spearman", "mse")}
        return row if taught is None else row | {"teacher_mse": metrics.mse(predicted, taught[:, 0])}


class MultiLabelJob(TaskJob):
    """Classification of rows that may have any number of labels each."""

    labels = "lists of classes"
    metrics = (
        Metric("micro_f1", "micro-F1", True),
        Metric("macro_f1", "macro-F1", True),
        Metric("mean_ap", "mean AP", True),
        Metric("agreement", "agreement", True),
        Metric("kl", "KL"),
    )
    legend = (
        "F1 of labels whose probability is above ½, over all labels of all rows and as the mean over labels; mean over "
        "labels of the average precision; agreement: the share of labels for which it decides as the teacher does; KL "
        "from the teacher in nats a label."
    )

    @property
    def config(self) -> Mapping[str, Any]:
        return multi_label(self.task.label_names)

    def _judge(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> dict[str, float]:
        """Logits of a model and its teacher [N, K], labels [N, K]."""
        probabilities = logits.double().sigmoid().numpy()
        row = multi_label_scores((logits > 0).numpy(), labels.bool().numpy(), probabilities)
        if taught is None:
            return row
        both = [torch.stack([torch.zeros_like(x), x], dim=-1).flatten(0, 1) for x in (logits, taught)]  # [N·K, 2]
        return row | {"agreement": float(((logits > 0) == (taught > 0)).double().mean()), "kl": metrics.mean_kl(*both)}


def _labels_of(task: Task) -> str:
    if task.regression:
        return RegressionJob.labels
    return MultiLabelJob.labels if task.multi_label else TaskJob.labels


def task_job(task: Task, max_length: int = 128) -> TaskJob:
    """The job that fits the labels of a task."""
    kinds = {kind.labels: kind for kind in (TaskJob, RegressionJob, MultiLabelJob)}
    return kinds[_labels_of(task)](task, max_length)
