"""Distillation by masked language modelling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.distill_jobs.job import NOTHING, STUDENT, Metric, Variant

if TYPE_CHECKING:
    from distilbert_fast.distillation.data import Corpus
    from distilbert_fast.evaluation.speed import Batch

_MLM_ALONE: Mapping[str, Any] = {
    "alpha_mlm": 1.0,
    **{f"alpha_{name}": 0.0 for name in ("ce", "cos", "mse", "hidden", "relation")},
}


class MlmJob:
    """Masked language modelling on a corpus; held-out rows are masked once, 15 % of their tokens, all alike.

    Args:
        data, text_column, split, packing, max_length, min_length, holdout: see `load_corpus`.
        probability, smoothing: see `Masking`.
        seed: of hold-out and masks.
    """

    kind, name, head, config = "mlm", "mlm", "MaskedLM", NOTHING
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
    ) -> None:
        self.data, self.max_length, self.seed = list(data), max_length, seed
        self.probability, self.smoothing = probability, smoothing
        self.reading: dict[str, Any] = {
            "text_column": text_column,
            "split": split,
            "packing": packing,
            "min_length": min_length,
            "holdout": holdout,
        }
        self.corpus: Corpus | None = None

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        """A vocabulary has no classes."""

    def describe(self) -> dict[str, Any]:
        masking = {"probability": self.probability, "smoothing": self.smoothing}
        read = {}
        if self.corpus is not None:
            read = {"rows": str(self.corpus.report), "fingerprint": self.corpus.fingerprint}
        return {"name": ", ".join(self.data), "max_length": self.max_length, **self.reading, **masking, **read}

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        from distilbert_fast.distillation.data import load_corpus
        from distilbert_fast.distillation.masking import MaskedDataset, Masking

        self.tokenizer, self.scratch = tokenizer, directory / "checkpoints" / "evaluation"
        corpus = self.corpus = load_corpus(
            self.data[0] if len(self.data) == 1 else self.data,
            tokenizer,
            max_length=self.max_length,
            cache_dir=directory / "corpus",
            seed=self.seed,
            **self.reading,
        )
        if corpus.holdout is None or len(corpus.holdout) == 0:
            raise ValueError(f"holdout must leave a row to evaluate on, got {self.reading['holdout']}")
        counts, p = corpus.token_counts, self.probability
        self._rows = MaskedDataset(
            corpus.train, Masking(tokenizer, counts, p, smoothing=self.smoothing, seed=self.seed)
        )
        self.holdout = MaskedDataset(corpus.holdout, Masking(tokenizer, None, seed=self.seed), cycle=1)

    def rows(self) -> Any:
        return self._rows

    def collator(self) -> Any:
        from distilbert_fast.distillation.masking import pad_collator

        return pad_collator(self.tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        from transformers import PrinterCallback

        from distilbert_fast.distillation.arguments import DistillationArguments
        from distilbert_fast.distillation.trainer import DistillationTrainer

        as_wide = teacher is not None and teacher.config.hidden_size == model.config.hidden_size
        arguments = DistillationArguments(
            objective="mlm",
            temperature=1.0,
            teacher_precision="model",
            alpha_mlm=1.0,
            alpha_ce=float(teacher is not None),
            alpha_cos=float(as_wide),
            per_device_eval_batch_size=32,
            output_dir=str(self.scratch),  # Trainer makes it
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DistillationTrainer(
            model, teacher, arguments, eval_dataset=self.holdout, data_collator=self.collator()
        )
        trainer.remove_callback(PrinterCallback)
        found = trainer.evaluate()
        row = {metric.name: found[f"eval_{metric.name}"] for metric in self.metrics if f"eval_{metric.name}" in found}
        return row | {"perplexity": math.exp(min(row["mlm"], 700.0))}

    def timed(self, model: Any) -> Any:
        return model.base_model

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        collate = self.collator()
        held = [self.holdout[i] for i in range(min(rows, len(self.holdout)))]
        batches = [collate(held[start : start + size]) for start in range(0, len(held), size)]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
