"""Distillation on questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilbert_fast.data.squad import Questions, Windows
from distilbert_fast.evaluation.speed import Batch
from distilbert_fast.evaluation.squad_scores import squad_scores, squad_v2_scores
from distilbert_fast.jobs.job import Job, Metric


class QaJob(Job):
    """Extractive question answering on files of SQuAD's form, 1.1 or 2.0; see `data.squad`."""

    kind, name, head = "qa", "qa", "QuestionAnswering"
    metrics = (Metric("f1", "F1"), Metric("exact_match", "exact match"))
    legend = (
        "F1 and exact match in percent, as SQuAD counts them; where questions may have no answer, as SQuAD 2.0 does."
    )

    def __init__(self, train: Questions, held_out: Questions, max_length: int = 384, stride: int = 128) -> None:
        self.train, self.held_out, self.max_length, self.stride = train, held_out, max_length, stride

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.train.name,
            "train": len(self.train),
            "eval": len(self.held_out),
            "fingerprint": f"{self.train.fingerprint[:12]}, {self.held_out.fingerprint[:12]}",
            "max_length": self.max_length,
            "stride": self.stride,
        }

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        train = Windows(self.train, tokenizer, self.max_length, self.stride)
        self._eval = Windows(self.held_out, tokenizer, self.max_length, self.stride)
        self.train_rows, self.collator = train.rows, train.collator()

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        found = self._eval.answers(model)
        gold = {str(at): [text for text, _ in row.answers] for at, row in enumerate(self.held_out.rows)}
        predicted = {str(at): answer.text for at, answer in enumerate(found)}
        if all(gold.values()):
            return squad_scores(gold, predicted)
        odds = {str(at): answer.null_odds for at, answer in enumerate(found)}
        scores = squad_v2_scores(gold, predicted, odds, threshold=0.0)
        return {"exact_match": scores["exact"], "f1": scores["f1"]}

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        return self._eval.batches(size, rows)
