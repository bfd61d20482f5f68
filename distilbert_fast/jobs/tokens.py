"""Distillation of a tagger: every word has a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import DataCollatorForTokenClassification

from distilbert_fast.data.tokens import Pieces, TagTask
from distilbert_fast.evaluation.metrics import tag_scores
from distilbert_fast.evaluation.speed import Batch
from distilbert_fast.jobs.job import Job, Metric
from distilbert_fast.modeling.loading import classes_of_head


class TokensJob(Job):
    """Token classification: entities, or any tags of words; see `load_tokens` for the data, `Pieces` for its rows."""

    kind, name, head = "task", "tokens", "TokenClassification"

    def __init__(self, task: TagTask, max_length: int = 128) -> None:
        self.task, self.max_length = task, max_length

    @property
    def metrics(self) -> tuple[Metric, ...]:
        entities = (Metric("f1", "entity F1", True),) if self.task.has_entities else ()
        return (
            *entities,
            Metric("accuracy", "accuracy", True),
            Metric("agreement", "agreement", True),
            Metric("kl", "KL"),
        )

    @property
    def legend(self) -> str:
        entities = (
            "F1 of entities found whole and with their type, as CoNLL scores them; " if self.task.has_entities else ""
        )
        return (
            f"{entities}accuracy over all words, also of long sentences, which are cut between words into rows; "
            "agreement: the share of words for which it chooses the teacher's tag; KL from the teacher in nats a word."
        )

    @property
    def config(self) -> Mapping[str, Any]:
        return classes_of_head(self.task.tag_names)

    def match_classes(self, classes: Sequence[str], kept: bool) -> None:
        self.task = self.task.for_classes(classes, kept)

    def describe(self) -> dict[str, Any]:
        task = self.task
        return {
            "name": task.name,
            "train": len(task.train),
            "eval": len(task.eval),
            "words": sum(len(row.words) for rows in (task.train, task.eval) for row in rows),
            "tags": ", ".join(task.tag_names),
            "fingerprint": task.fingerprint[:12],
            "max_length": self.max_length,
        }

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        self.train_rows = Pieces(self.task, self.task.train, tokenizer, self.max_length).rows
        self._eval = Pieces(self.task, self.task.eval, tokenizer, self.max_length)
        self.collator = DataCollatorForTokenClassification(tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        return tag_scores(self._eval, model, teacher)

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        return self._eval.batches(size, rows)
