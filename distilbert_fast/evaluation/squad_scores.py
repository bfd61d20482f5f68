"""Exact match and F1 of answers, as SQuAD's own scripts count them: evaluate-v1.1.py and evaluate-v2.0.py.

Answers are compared after `normalized`: lower case, no ASCII punctuation, no articles, one space between words. F1 is
that of the bags of words; of several gold answers the best counts. Sums are taken in the scripts' order and by the same
means, so that the last digit is theirs too. Rajpurkar et al.: SQuAD, arXiv:1606.05250; Rajpurkar, Jia, Liang:
arXiv:1806.03822.
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Mapping, Sequence

Gold = Mapping[str, Sequence[str]]  # the answers to each question by its id; none if it has no answer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """What of an answer is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_scores(gold: Gold, predicted: Mapping[str, str]) -> dict[str, float]:
    """ "exact_match" and "f1" in percent, of SQuAD 1.1.

    A question without a prediction counts as wrong; predictions of other questions do not count. Raises ValueError for
    a question without answers, and for none at all.
    """
    if not gold:
        raise ValueError("squad_scores: gold must hold a question, got none")
    totals: dict[str, float] = {}
    for name, scores in _of_questions(gold, predicted).items():
        total: float = 0
        for score in scores:  # the script adds them one by one, which sum() does not since Python 3.12
            total += score
        totals[name] = 100.0 * total / len(gold)
    return totals


def squad_errors(gold: Gold, predicted: Mapping[str, str]) -> dict[str, float]:
    """The standard errors of `squad_scores`, s / √N of the questions' scores, in percent."""
    return {name: _error(scores) for name, scores in _of_questions(gold, predicted).items()}


def _of_questions(gold: Gold, predicted: Mapping[str, str]) -> dict[str, list[float]]:
    exact: list[float] = []
    f1: list[float] = []
    for question, answers in gold.items():
        if not answers:
            raise ValueError(
                f"squad_scores: gold: question {question!r} has no answer, as only SQuAD 2.0's have; use squad_v2"
            )
        found = predicted.get(question)
        exact.append(0 if found is None else max(normalized(found) == normalized(answer) for answer in answers))
        f1.append(0 if found is None else max(_f1(found, answer, both_empty=0.0) for answer in answers))
    return {"exact_match": exact, "f1": f1}


def squad_v2_scores(
    gold: Gold,
    predicted: Mapping[str, str],
    no_answer: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> dict[str, float]:
    """The scores of SQuAD 2.0 in percent, by the names of its script.

    Args:
        gold: the answers of each question; empty for one that has none.
        predicted: an answer, or "" for none, by the question's id. A question without a prediction is left out of all
            counts but the start of the search for thresholds, as in the script.
        no_answer: the probability that a question has no answer, by its id; by default 0 for each prediction, as in
            Hugging Face's `evaluate`.
        threshold: above this probability the answer counts as none.

    Returns:
        "exact", "f1", "total"; the same with "HasAns_" and "NoAns_" before, where there are such questions;
        "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh": the best score over all thresholds, which the
        script takes of the predictions before `threshold`, in the order of `no_answer` where probabilities are equal.

    Raises ValueError where no question has a prediction, or one that has lacks its probability.
    """
    no_answer = dict.fromkeys(predicted, 0.0) if no_answer is None else no_answer
    raw, judged = _judged(gold, predicted, no_answer, threshold)
    exact = raw["exact"]
    result = _means(judged, "", [*exact])
    for prefix, has in (("HasAns_", True), ("NoAns_", False)):
        if questions := [question for question in exact if bool(gold[question]) is has]:
            result |= _means(judged, prefix, questions)
    for name, scores in raw.items():
        best, at = _best_threshold(gold, predicted, scores, no_answer)
        result |= {f"best_{name}": best, f"best_{name}_thresh": at}
    return result


def squad_v2_errors(
    gold: Gold,
    predicted: Mapping[str, str],
    no_answer: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> dict[str, float]:
    """The standard errors of "exact" and "f1" of `squad_v2_scores`, s / √N of the questions' scores, in percent."""
    no_answer = dict.fromkeys(predicted, 0.0) if no_answer is None else no_answer
    _, judged = _judged(gold, predicted, no_answer, threshold)
    return {name: _error([*scores.values()]) for name, scores in judged.items()}


def _error(scores: Sequence[float]) -> float:
    return 100 * statistics.pstdev(map(float, scores)) / math.sqrt(len(scores))


_Scores = dict[str, dict[str, float]]


def _judged(
    gold: Gold, predicted: Mapping[str, str], no_answer: Mapping[str, float], threshold: float
) -> tuple[_Scores, _Scores]:
    """ "exact" and "f1" of each question, 0 to 1, before and after the threshold."""
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    for question, answers in gold.items():
        if question in predicted:
            found, there = predicted[question], [answer for answer in answers if normalized(answer)] or [""]
            exact[question] = int(max(normalized(found) == normalized(answer) for answer in there))
            f1[question] = max(_f1(found, answer, both_empty=1.0) for answer in there)
    if not exact:
        raise ValueError("squad_v2_scores: predicted must hold an answer to a question of gold, got none")
    if absent := next((question for question in exact if question not in no_answer), None):
        raise ValueError(f"squad_v2_scores: no_answer must have the probability of question {absent!r}, got none")
    judged = {
        name: {
            question: float(not gold[question]) if no_answer[question] > threshold else score
            for question, score in scores.items()
        }
        for name, scores in (("exact", exact), ("f1", f1))
    }
    return {"exact": exact, "f1": f1}, judged


def _f1(found: str, answer: str, both_empty: float) -> float:
    """F1 of two bags of words; `both_empty` is that of two empty ones."""
    mine, theirs = normalized(found).split(), normalized(answer).split()
    if not mine and not theirs:
        return both_empty
    same = sum((Counter(mine) & Counter(theirs)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(mine), 1.0 * same / len(theirs)
    return (2 * precision * recall) / (precision + recall)


def _means(judged: Mapping[str, Mapping[str, float]], prefix: str, questions: Sequence[str]) -> dict[str, float]:
    total = len(questions)
    means = {name: 100.0 * sum(scores[one] for one in questions) / total for name, scores in judged.items()}
    return {f"{prefix}{name}": value for name, value in {**means, "total": total}.items()}


def _best_threshold(
    gold: Gold, predicted: Mapping[str, str], scores: Mapping[str, float], no_answer: Mapping[str, float]
) -> tuple[float, float]:
    """The best mean score in percent, and the threshold on `no_answer` that gives it."""
    current: float = sum(1 for answers in gold.values() if not answers)
    best, threshold = current, 0.0
    for question in sorted(no_answer, key=lambda name: no_answer[name]):
        if question not in scores:
            continue
        if gold[question]:
            current += scores[question]
        elif predicted[question]:
            current -= 1
        if current > best:
            best, threshold = current, no_answer[question]
    return 100.0 * best / len(scores), threshold
