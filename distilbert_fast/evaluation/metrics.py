"""Predictions of classifiers and regressions, how right they are, and how closely they follow a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distilbert_fast.data.sentences import Text, by_length, tokenized
from distilbert_fast.data.tokens import Pieces
from distilbert_fast.evaluation import label_scores
from distilbert_fast.evaluation.entity_scores import entity_scores
from distilbert_fast.ops.kl_div import kl_div

Watch = Callable[[Sequence[Any]], Iterable[Any]]  # gives what it is given; a progress bar, say


@torch.inference_mode()
def predictions(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    batch_size: int = 32,
    max_length: int = 128,
    in_order: bool = False,
    watch: Watch = iter,
) -> Tensor:
    """The logits of a sequence classifier, fp32 [len(texts), labels] on the CPU, in the order given.

    ``in_order``: batches follow that order, as those of a Trainer do; else rows of one length meet. ``watch`` sees the
    batches go by. The model is left in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    encoded = tokenized(tokenizer, texts, max_length)["input_ids"]
    logits: list[Tensor] = [torch.empty(0)] * len(texts)
    for rows in watch(by_length(list(map(len, encoded)), batch_size, in_order)):
        batch = tokenized(tokenizer, [texts[i] for i in rows], max_length, padding=True, return_tensors="pt")
        for i, row in zip(rows, model(**batch.to(device)).logits.float().cpu(), strict=True):
            logits[i] = row
    return torch.stack(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of `logits` [N, labels] whose largest entry is at `labels` [N]."""
    return label_scores.accuracy(*_classes(logits, labels))


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of each class, averaged with equal weight over the classes that occur in the labels or predictions."""
    return label_scores.macro_f1(*_classes(logits, labels))


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of predicted and true classes, -1 to 1; 0 is chance, also for a constant answer."""
    return label_scores.matthews_correlation(*_classes(logits, labels))


def _classes(logits: Tensor, labels: Tensor) -> tuple[Any, Any]:
    return logits.argmax(dim=1).numpy(), labels.numpy()


def agreement(logits: Tensor, teacher_logits: Tensor) -> float:
    """The share of rows where student and teacher [N, labels] choose the same class, right or wrong."""
    return accuracy(logits, teacher_logits.argmax(dim=1))


def mean_kl(logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean over rows of KL(teacher ‖ student) in nats, at temperature 1."""
    return float(kl_div(logits, teacher_logits))


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of numbers [N], -1 to 1; NaN where one side has a single value."""
    return label_scores.pearson(*_numbers(predicted, labels))


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Spearman's correlation, of the ranks of numbers [N], -1 to 1; NaN where one side has a single value."""
    return label_scores.spearmanr(*_numbers(predicted, labels))


def mse(predicted: Tensor, labels: Tensor) -> float:
    """Mean squared error of numbers [N]."""
    return label_scores.mse(*_numbers(predicted, labels))


def _numbers(*given: Tensor) -> list[Any]:
    return [numbers.double().numpy() for numbers in given]


def tag_scores(pieces: Pieces, model: Any, teacher: Any = None) -> dict[str, float]:
    """Accuracy over all words; entity F1, where tags mark entities; agreement and KL, where there is a teacher."""
    logits, scheme = pieces.logits(model), pieces.task.scheme
    chosen = pieces.chosen(logits)  # [W]
    row = {"accuracy": float((chosen == pieces.truth).double().mean())}
    if scheme is not None:
        row = {"f1": entity_scores(pieces.tags(chosen), pieces.tags(pieces.truth), scheme)[0].f1, **row}
    if teacher is not None:
        taught = pieces.logits(teacher)
        row |= {"agreement": agreement(logits, taught), "kl": mean_kl(logits, taught)}
    return row
