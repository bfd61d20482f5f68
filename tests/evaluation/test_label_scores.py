"""Scores of labels, equal to scikit-learn's and SciPy's, and standard errors that are about right."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from distilbert_fast.evaluation.label_scores import class_scores, default_metrics, number_scores


@pytest.mark.parametrize("classes", [2, 4])
def test_class_scores_are_those_of_scikit_learn(classes):
    draw = np.random.default_rng(0)
    true = draw.integers(classes, size=300)
    predicted = np.where(draw.random(300) < 0.7, true, draw.integers(classes, size=300))
    found, errors = class_scores(default_metrics(classes), predicted, true)
    assert found["accuracy"] == metrics.accuracy_score(true, predicted)
    assert found["macro_f1"] == metrics.f1_score(true, predicted, average="macro")
    assert found["matthews_correlation"] == metrics.matthews_corrcoef(true, predicted)
    assert ("f1" in found) is (classes == 2)
    if classes == 2:
        assert found["f1"] == metrics.f1_score(true, predicted)
    assert errors["accuracy"] == pytest.approx(np.std(true == predicted) / 300**0.5)
    draws = draw.integers(300, size=(500, 300))
    for name, of in (("matthews_correlation", metrics.matthews_corrcoef),):
        assert errors[name] == pytest.approx(np.std([of(true[at], predicted[at]) for at in draws]), rel=0.25)


def test_number_scores_are_those_of_scipy():
    draw = np.random.default_rng(1)
    true = draw.normal(size=200)
    predicted = (true + draw.normal(size=200)).astype(np.float32)
    found, errors = number_scores(default_metrics(0), predicted, true)
    assert found["pearson"] == stats.pearsonr(predicted.astype(float), true)[0]
    assert found["spearmanr"] == stats.spearmanr(predicted, true)[0]
    assert found["mse"] == np.mean((predicted.astype(float) - true) ** 2)
    assert errors["pearson"] == pytest.approx((1 - found["pearson"] ** 2) / 200**0.5, rel=0.35)


def test_constant_answers():
    found, errors = class_scores(("accuracy", "f1", "macro_f1", "matthews_correlation"), [0, 0, 0], [0, 0, 0])
    assert found == {"accuracy": 1, "f1": 0, "macro_f1": 1, "matthews_correlation": 0}
    assert errors["accuracy"] == 0
    assert class_scores(("matthews_correlation",), [1, 1, 1], [0, 1, 0])[0] == {"matthews_correlation": 0}
    for numbers in ([[1.0, 1.0], [2.0, 3.0]], [[2.0, 3.0], [1.0, 1.0]]):  # one side is constant: SciPy says nan
        found, errors = number_scores(default_metrics(0), *numbers)
        assert np.isnan([*map(found.get, ("pearson", "spearmanr")), errors["pearson"], errors["spearmanr"]]).all()
        assert found["mse"] == 2.5
    few = number_scores(("pearson",), [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])[1]  # a ninth of its samples are constant
    assert 0 < few["pearson"] < 2
