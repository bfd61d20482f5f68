"""Distillation by masked language modelling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distilbert_fast.data.corpus import Corpus, load_corpus
from distilbert_fast.data.masking import MaskedDataset, MaskedStream, Masking, pad_collator
from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.teachers.model import ModelTeacher
from distilbert_fast.evaluation.speed import Batch
from distilbert_fast.jobs.job import STUDENT, Job, Metric, Variant

_HEAD, _SHUFFLED = 50_000, 10_000  # rows of a stream: read before the first step; mixed with each other
_MLM_ALONE: Mapping[str, Any] = {
    "alpha_mlm": 1.0,
    **{f"alpha_{name}": 0.0 for name in ("ce", "cos", "mse", "hidden", "relation")},
}


class MlmJob(Job):
    """Masked language modelling on a corpus; held-out rows are masked once, 15 % of their tokens, all alike.

    Args:
        data, text_column, split, packing, max_length, min_length, holdout: see `load_corpus`.
        probability, smoothing: see `Masking`.
        seed: of hold-out and masks, and of a stream's order.
        streaming: rows are read while training, again and again, shuffled within 10,000 of them. Of the first 50,000
            those held out are evaluated on, and the others are counted for ``smoothing``.
    """

    kind, name, head = "mlm", "mlm", "MaskedLM"
    teacher_epochs = 1.0
    metrics = (
        Metric("mlm", "MLM loss"),
        Metric("perplexity", "perplexity"),
        Metric("kl", "KL"),
        Metric("cos", "1 - cos"),
    )
    legend = (
        "MLM loss in nats a masked token, on held-out rows masked once, 15 % of their tokens, all tokens alike; KL "
        "from the teacher in nats a token at temperature 1; 1 - cos of the last hidden states."
    )
    untaught = _MLM_ALONE
    variants = (
        STUDENT,
        Variant("without-kl", "without KL", {"alpha_ce": 0.0}),
        Variant("without-cos", "without cosine", {"alpha_cos": 0.0}),
        Variant("without-mlm", "without MLM", {"alpha_mlm": 0.0}),
        Variant("random-init", "random start", random=True),
        Variant("without-teacher", "random start, no teacher", _MLM_ALONE, random=True),
    )

    def __init__(
        self,
        data: Sequence[str],
        text_column: str | None = None,
        split: str = "train",
        packing: str = "full_sentences",
        max_length: int = 128,
        min_length: int = 12,
        holdout: float = 0.02,
        probability: float = 0.15,
        smoothing: float = 0.7,
        seed: int = 0,
        streaming: bool = False,
    ) -> None:
        self.data, self.max_length, self.seed, self.streaming = list(data), max_length, seed, streaming
        self.probability, self.smoothing = probability, smoothing
        self.reading: dict[str, Any] = {
            "text_column": text_column,
            "split": split,
            "packing": packing,
            "min_length": min_length,
            "holdout": holdout,
        }
        self.corpus: Corpus | None = None

    def describe(self) -> dict[str, Any]:
        described = {"name": ", ".join(self.data), "max_length": self.max_length, **self.reading}
        described |= {"probability": self.probability, "smoothing": self.smoothing}
        if self.corpus is not None:
            head = "at its head " if self.streaming else ""
            described |= {"rows": f"{head}{self.corpus.report}", "fingerprint": self.corpus.fingerprint}
        return described | ({"streaming": True} if self.streaming else {})

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        corpus = self.corpus = load_corpus(
            self.data[0] if len(self.data) == 1 else self.data,
            tokenizer,
            max_length=self.max_length,
            cache_dir=directory / "corpus",
            streaming=self.streaming,
            head=_HEAD if self.streaming else 0,
            seed=self.seed,
            **self.reading,
        )
        if corpus.holdout is None or len(corpus.holdout) == 0:
            raise ValueError(f"holdout must leave a row to evaluate on, got {self.reading['holdout']}")
        counts, p = corpus.token_counts, self.probability
        masking = Masking(tokenizer, counts, p, smoothing=self.smoothing, seed=self.seed)
        if self.streaming:
            self.train_rows = MaskedStream(corpus.train.shuffle(seed=self.seed, buffer_size=_SHUFFLED), masking)
        else:
            self.train_rows = MaskedDataset(corpus.train, masking)
        self.holdout = MaskedDataset(corpus.holdout, Masking(tokenizer, None, seed=self.seed), cycle=1)
        self.collator = pad_collator(tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        as_wide = teacher is not None and teacher.config.hidden_size == model.config.hidden_size
        objective = MlmObjective(1.0, kl=float(teacher is not None), mlm=1.0, cos=float(as_wide))
        taught = None if teacher is None else ModelTeacher(teacher.eval(), "model")
        device, totals = next(model.eval().parameters()).device, torch.zeros(2, len(objective.names))
        with torch.no_grad():
            for batch in self._held_out(32, len(self.holdout)):
                placed = {name: x.to(device) for name, x in batch.items()}
                sums = objective(model, taught, placed, 0.0).sums
                totals += torch.stack([sums, objective.counts(placed).to(sums.dtype)]).cpu()
        means = dict(zip(objective.names, (totals[0] / totals[1].clamp(min=1)).tolist(), strict=True))
        row = {metric.name: means[metric.name] for metric in self.metrics if metric.name in means}
        return row | {"perplexity": math.exp(min(row["mlm"], 700.0))}

    def timed(self, model: Any) -> Any:
        return model.base_model

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        batches = self._held_out(size, min(rows, len(self.holdout)))
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]

    def _held_out(self, size: int, rows: int) -> Iterator[dict[str, Any]]:
        for start in range(0, rows, size):
            yield self.collator([self.holdout[at] for at in range(start, min(start + size, rows))])
