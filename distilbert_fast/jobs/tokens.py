"""Distillation of a tagger: every word has a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.jobs.job import LABELS_ALONE, TASK_VARIANTS, Metric, classes_of_head

if TYPE_CHECKING:
    from distilbert_fast.data.tokens import TagTask
    from distilbert_fast.evaluation.speed import Batch


class TokensJob:
    """Token classification: entities, or any tags of words; see `load_tokens` for the data, `Pieces` for its rows."""

    kind, name, head, streaming = "task", "tokens", "TokenClassification", False
    teacher_epochs = 3.0
    untaught = LABELS_ALONE
    variants = TASK_VARIANTS

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

    def meet(self, classes: Sequence[str], kept: bool) -> None:
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
        from distilbert_fast.data.tokens import Pieces

        self.tokenizer = tokenizer
        self._train = Pieces(self.task, self.task.train, tokenizer, self.max_length)
        self._held = Pieces(self.task, self.task.eval, tokenizer, self.max_length)

    def rows(self) -> Any:
        return self._train.rows

    def collator(self) -> Any:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(self.tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        from distilbert_fast.evaluation.metrics import tag_scores

        return tag_scores(self._held, model, teacher)

    def timed(self, model: Any) -> Any:
        return model

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        return self._held.batches(size, rows)
