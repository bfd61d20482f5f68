"""In what distillations differ: masked language modelling, classification, question answering.

A job knows its data, the head of its models, how good a model is, and which students are worth comparing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from distilbert_fast.distillation.data import Corpus
    from distilbert_fast.evaluation.speed import Batch
    from distilbert_fast.evaluation.squad import Questions
    from distilbert_fast.evaluation.tasks import Task


@dataclass(frozen=True)
class Variant:
    """A student to train: of the recipe, or of one that lacks something.

    Attributes:
        name: of its directory.
        title: what tables call it.
        objective: settings of `DistillationArguments` in place of the recipe's.
        random: starts at random instead of from the teacher's layers.
    """

    name: str
    title: str
    objective: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False


class Metric(NamedTuple):
    """A number by which models are judged; ``share``: shown as a percentage."""

    name: str
    title: str
    share: bool = False


STUDENT = Variant("student", "distilled")
_NOTHING: Mapping[str, Any] = {}
_HEAD, _SHUFFLED = 50_000, 10_000  # rows of a stream: read before the first step; mixed with each other
_LABELS_ALONE: Mapping[str, Any] = {"alpha": 0.0}
_MLM_ALONE: Mapping[str, Any] = {
    "alpha_mlm": 1.0,
    **{f"alpha_{name}": 0.0 for name in ("ce", "cos", "mse", "hidden", "relation")},
}


class Job(Protocol):
    @property
    def kind(self) -> str:
        """ "mlm", "task" or "qa": an objective of DistillationArguments."""

    @property
    def head(self) -> str:
        """As in `load_with_head`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the teacher, beyond its checkpoint's."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The first is what counts."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """STUDENT comes first."""

    @property
    def untaught(self) -> Mapping[str, Any]:
        """The objective of a model that has no teacher."""

    @property
    def teacher_epochs(self) -> float:
        """For a teacher that has no head yet."""

    @property
    def max_length(self) -> int:
        """Tokens of a row."""

    @property
    def streaming(self) -> bool:
        """Whether its rows come from a stream without an end; then nobody knows their number."""

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        """Learn what the teacher calls its classes; ``kept``: its head is taken as it is. Before all else."""

    def describe(self) -> dict[str, Any]:
        """The data, for reports; "name" among them. What decides the result is all here."""

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        """Make the rows to train and evaluate on; what is worth keeping goes into ``directory``/corpus."""

    def rows(self) -> Any:
        """To train on."""

    def collator(self) -> Any: ...

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        """`metrics` of a model by name; those that compare it with its teacher only if there is one."""

    def timed(self, model: Any) -> Any:
        """The part of a model whose speed is measured."""

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        """Real inputs for it, padded to the longest of each batch."""


class MlmJob:
    """Masked language modelling on a corpus; held-out rows are masked once, 15 % of their tokens, all alike.

    Args:
        data, text_column, split, packing, max_length, min_length, holdout: see `load_corpus`.
        probability, smoothing: see `Masking`.
        seed: of hold-out and masks, and of a stream's order.
        streaming: rows are read while training, again and again, shuffled within 10,000 of them. Of the first 50,000
            those held out are evaluated on, and the others are counted for ``smoothing``.
    """

    kind, head, config = "mlm", "MaskedLM", _NOTHING
    teacher_epochs = 1.0
    metrics = (
        Metric("mlm", "MLM loss"),
        Metric("perplexity", "perplexity"),
        Metric("kl", "KL"),
        Metric("cos", "1 - cos"),
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

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        """A vocabulary has no classes."""

    def describe(self) -> dict[str, Any]:
        masking = {"probability": self.probability, "smoothing": self.smoothing}
        read = {}
        if self.corpus is not None:
            head = "at its head " if self.streaming else ""
            read = {"rows": f"{head}{self.corpus.report}", "fingerprint": self.corpus.fingerprint}
        stream = {"streaming": True} if self.streaming else {}
        return {
            "name": ", ".join(self.data),
            "max_length": self.max_length,
            **self.reading,
            **masking,
            **read,
            **stream,
        }

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        from distilbert_fast.distillation.data import load_corpus
        from distilbert_fast.distillation.masking import MaskedDataset, MaskedStream, Masking

        self.tokenizer = tokenizer
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
            shuffled = corpus.train.shuffle(seed=self.seed, buffer_size=_SHUFFLED)
            self._rows: Any = MaskedStream(shuffled, masking, endless=True)
        else:
            self._rows = MaskedDataset(corpus.train, masking)
        self.holdout = MaskedDataset(corpus.holdout, Masking(tokenizer, None, seed=self.seed), cycle=1)

    def rows(self) -> Any:
        return self._rows

    def collator(self) -> Any:
        from distilbert_fast.distillation.masking import pad_collator

        return pad_collator(self.tokenizer)

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        import torch

        from distilbert_fast.distillation.masked_lm import MlmObjective
        from distilbert_fast.distillation.teacher import ModelTeacher

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
        collate = self.collator()
        for start in range(0, rows, size):
            yield collate([self.holdout[at] for at in range(start, min(start + size, rows))])


class TaskJob:
    """Text classification; see `load_task` for the data."""

    kind, head, streaming = "task", "SequenceClassification", False
    teacher_epochs = 3.0
    metrics = (
        Metric("accuracy", "accuracy", True),
        Metric("matthews", "Matthews"),
        Metric("macro_f1", "macro-F1", True),
        Metric("agreement", "agreement", True),
        Metric("kl", "KL"),
    )
    untaught = _LABELS_ALONE
    variants = (
        STUDENT,
        Variant("without-teacher", "fine-tuned without a teacher", _LABELS_ALONE),
        Variant("random-init", "random start", random=True),
    )

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
            "classes": ", ".join(task.label_names),
            "fingerprint": task.fingerprint[:12],
            "max_length": self.max_length,
        }

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        from datasets import Dataset

        self.tokenizer = tokenizer
        encoded = tokenizer(list(self.task.train["sentence"]), truncation=True, max_length=self.max_length)
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
            return metrics.predictions(of, self.tokenizer, self.task.eval["sentence"], max_length=self.max_length)

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

        sentences = list(self.task.eval["sentence"])
        timed = sentences[:: max(1, len(sentences) // rows)][:rows]
        return speed.batches(self.tokenizer, timed, size, self.max_length, "cpu")


class QaJob:
    """Extractive question answering on files of SQuAD's form; see `evaluation.squad`."""

    kind, head, config, streaming = "qa", "QuestionAnswering", _NOTHING, False
    teacher_epochs = 3.0
    metrics = (Metric("f1", "F1"), Metric("exact_match", "exact match"))
    untaught = _LABELS_ALONE
    variants = TaskJob.variants

    def __init__(self, train: Questions, held_out: Questions, max_length: int = 384, stride: int = 128) -> None:
        self.train, self.held_out, self.max_length, self.stride = train, held_out, max_length, stride

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        """A head for answers has no classes."""

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
        from distilbert_fast.evaluation.squad import Windows

        self._train = Windows(self.train, tokenizer, self.max_length, self.stride)
        self._held = Windows(self.held_out, tokenizer, self.max_length, self.stride)

    def rows(self) -> Any:
        return self._train.rows

    def collator(self) -> Any:
        return self._train.collator()

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        return self._held.score(model)

    def timed(self, model: Any) -> Any:
        return model

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        return self._held.batches(size, rows)
