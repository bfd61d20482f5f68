"""Scores of predicted classes and numbers, as scikit-learn and SciPy compute them, with their standard errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Scores = dict[str, float]
_RESAMPLES = 200  # of the bootstrap; its own error is a twentieth of what it finds


def accuracy(predicted: np.ndarray, true: np.ndarray, weight: Any = None) -> float:
    """The share of rows that are right."""
    return float(_metrics().accuracy_score(true, predicted, sample_weight=weight))


def f1(predicted: np.ndarray, true: np.ndarray, weight: Any = None) -> float:
    """F1 of class 1 of two classes; 0 where it neither occurs nor is predicted."""
    return float(_metrics().f1_score(true, predicted, sample_weight=weight, zero_division=0.0))


def macro_f1(predicted: np.ndarray, true: np.ndarray, weight: Any = None) -> float:
    """F1 of each class, averaged with equal weight over the classes that occur in labels or predictions."""
    return float(_metrics().f1_score(true, predicted, average="macro", sample_weight=weight, zero_division=0.0))


def matthews_correlation(predicted: np.ndarray, true: np.ndarray, weight: Any = None) -> float:
    """Matthews' correlation of predicted and true classes, -1 to 1; 0 is chance, also for a constant answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a single class, for which 0 is right
        return float(_metrics().matthews_corrcoef(true, predicted, sample_weight=weight))


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson's correlation of numbers, -1 to 1; NaN where one side has a single value: then there is none."""
    return _correlation("pearsonr", predicted, true)


def spearmanr(predicted: np.ndarray, true: np.ndarray) -> float:
    """Spearman's correlation, of the ranks of numbers, -1 to 1; NaN where one side has a single value."""
    return _correlation("spearmanr", predicted, true)


def mse(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean squared error of numbers."""
    return float(np.square(predicted - true).mean())


def multi_label_scores(predicted: np.ndarray, true: np.ndarray, probabilities: np.ndarray | None = None) -> Scores:
    """Scores of rows that have any number of K labels each, bool [N, K].

    "micro_f1" of all labels of all rows together; "macro_f1", the mean over labels that occur or are predicted; with
    probabilities [N, K] "mean_ap", the mean over labels that occur of their average precision. 0 for no labels.
    """
    f1, found, there = _metrics().f1_score, predicted.any(axis=0), true.any(axis=0)
    used = found | there
    scores = {"micro_f1": 0.0, "macro_f1": 0.0}
    for name in scores if used.any() else ():
        average = name.removesuffix("_f1")
        scores[name] = float(f1(true[:, used], predicted[:, used], average=average, zero_division=0.0))
    if probabilities is not None:
        precision = _metrics().average_precision_score
        scores["mean_ap"] = float(precision(true[:, there], probabilities[:, there])) if there.any() else 0.0
    return scores


def multi_label_errors(predicted: np.ndarray, true: np.ndarray, probabilities: np.ndarray | None = None) -> Scores:
    """The standard errors of `multi_label_scores`, by the bootstrap."""
    draws = np.random.default_rng(0).integers(len(true), size=(_RESAMPLES // 4, len(true)))
    given = (predicted, true, *(() if probabilities is None else (probabilities,)))
    samples = [multi_label_scores(*(each[draw] for each in given)) for draw in draws]
    return {name: float(np.std([one[name] for one in samples])) for name in samples[0]}


_OF_CLASSES: Mapping[str, Callable[..., float]] = {
    of.__name__: of for of in (accuracy, f1, macro_f1, matthews_correlation)
}
_OF_NUMBERS: Mapping[str, Callable[..., float]] = {of.__name__: of for of in (pearson, spearmanr, mse)}


def default_metrics(classes: int) -> tuple[str, ...]:
    """Of a task that names none: with so many classes, 0 for numbers."""
    if classes == 0:
        return ("pearson", "spearmanr", "mse")
    return ("accuracy", *(["f1"] if classes == 2 else []), "macro_f1", "matthews_correlation")


def class_scores(metrics: Sequence[str], predicted: Sequence[int], true: Sequence[int]) -> tuple[Scores, Scores]:
    """Metrics of predicted and true classes [N], by number, and their standard errors.

    That of the accuracy p is √(p(1 − p) / N); others are those of the jackknife (Quenouille, Tukey): with θᵢ the metric
    without row i and θ̄ their mean, √((N − 1) / N · Σ (θᵢ − θ̄)²).
    """
    mine, theirs = np.asarray(predicted), np.asarray(true)
    found = {name: _OF_CLASSES[name](mine, theirs) for name in metrics}
    # all that counts is how often each pair of classes occurs: rows of one pair are alike
    cells, counts = np.unique(np.stack([mine, theirs]), axis=1, return_counts=True)

    def error(name: str) -> float:
        if name == "accuracy":
            return math.sqrt(found[name] * (1 - found[name]) / len(mine))
        fewer = [counts - (np.arange(len(counts)) == at) for at in range(len(counts))]
        without = np.array([_OF_CLASSES[name](*cells[:, left > 0], left[left > 0]) for left in fewer if left.any()])
        if len(without) < 2:
            return 0.0
        mean = np.average(without, weights=counts)
        return float(np.sqrt((len(mine) - 1) / len(mine) * (counts * np.square(without - mean)).sum()))

    return found, {name: error(name) for name in metrics}


def number_scores(metrics: Sequence[str], predicted: Sequence[float], true: Sequence[float]) -> tuple[Scores, Scores]:
    """Metrics of predicted and true numbers [N], in float64, and their standard errors by the bootstrap.

    A metric that is undefined is NaN, and so is its error, from which samples in which it is undefined are left out.
    """
    mine, theirs = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(mine), size=(_RESAMPLES, len(mine)))
    found = {name: _OF_NUMBERS[name](mine, theirs) for name in metrics}

    def error(name: str) -> float:
        values = np.array([_OF_NUMBERS[name](mine[draw], theirs[draw]) for draw in draws])
        return math.nan if math.isnan(found[name]) else float(np.nanstd(values))

    return found, {name: error(name) for name in metrics}


def _metrics() -> Any:
    from sklearn import metrics

    return metrics


def _is_constant(numbers: np.ndarray) -> bool:
    return bool((numbers == numbers[0]).all())


def _correlation(name: str, predicted: np.ndarray, true: np.ndarray) -> float:
    from scipy import stats

    if _is_constant(predicted) or _is_constant(true):
        return math.nan
    return float(getattr(stats, name)(predicted, true)[0])
