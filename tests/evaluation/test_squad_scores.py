"""SQuAD's scores: by hand, beside torchmetrics, and beside the rules of the 2.0 script written out once more."""

from __future__ import annotations

import collections
import random
import re
import string

import numpy as np
import pytest

from distilbert_fast.evaluation.squad_scores import (
    normalized,
    squad_errors,
    squad_scores,
    squad_v2_errors,
    squad_v2_scores,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tsat.", "cat sat"),
        ("a.n. the-other", "theother"),  # punctuation goes first, and leaves an article
        ("An apple a day", "apple day"),
        ("thé «x»", "thé «x»"),  # only ASCII punctuation goes
        ("A", ""),
        ("  \n", ""),
        ("Athens", "athens"),
    ],
)
def test_what_of_an_answer_is_compared(text, expected):
    assert normalized(text) == expected


def test_squad_by_hand():
    gold = {"1": ["the cat", "a small cat"], "2": ["1,000 dogs"], "3": ["x"], "4": ["The"]}
    predicted = {"1": "small cat", "2": "dogs", "4": "a", "5": "of no question"}
    # 1: right; 2: precision 1, recall 1/2; 3: none; 4: both are empty: exact, but without a word in common
    assert squad_scores(gold, predicted) == {"exact_match": 100 * 2 / 4, "f1": 100 * (1 + 2 / 3) / 4}
    spread = squad_errors(gold, predicted)
    assert spread == pytest.approx({"exact_match": 100 * 0.5 / 2, "f1": 100 * np.std([1, 2 / 3, 0, 0]) / 2})
    with pytest.raises(ValueError, match=r"^squad_scores: gold: question '1' has no answer, .* use squad_v2$"):
        squad_scores({"1": []}, {"1": ""})
    with pytest.raises(ValueError, match=r"^squad_scores: gold must hold a question, got none$"):
        squad_scores({}, {})


def _texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["the", "a", "cat", "Cat,", "dog", "small", "old-dog", "1,000", "AN", "", "»", "sat."]
    return [" ".join(draw.choices(words, k=draw.randint(0, 5))) for _ in range(count)]


def test_squad_equals_torchmetrics():
    from torchmetrics.functional.text import squad

    answers = zip(_texts(400, 1), _texts(400, 2), strict=True)
    gold = {str(at): [*pair] for at, pair in enumerate(answers)}
    # of two answers without a word torchmetrics' F1 is 1, as in SQuAD 2.0, and that of the 1.1 script 0
    predicted = {str(at): text for at, text in enumerate(_texts(400, 3)) if normalized(text)}
    gold = {name: texts for name, texts in gold.items() if name in predicted}
    theirs = squad(
        [{"id": at, "prediction_text": text} for at, text in predicted.items()],
        [{"id": at, "answers": {"text": texts, "answer_start": [0]}} for at, texts in gold.items()],
    )
    mine = squad_scores(gold, predicted)
    assert mine == pytest.approx({name: float(value) for name, value in theirs.items()}, rel=1e-6)  # theirs is float32


def official_v2(gold, preds, na_probs, threshold):
    """The 2.0 script's functions, one after another, as it has them."""

    def normalize(s):
        def remove_articles(text):
            return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

        exclude = set(string.punctuation)
        return " ".join(remove_articles("".join(ch for ch in s.lower() if ch not in exclude)).split())

    def tokens(s):
        return normalize(s).split() if s else []

    def compute_f1(a_gold, a_pred):
        gold_toks, pred_toks = tokens(a_gold), tokens(a_pred)
        num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
        if len(gold_toks) == 0 or len(pred_toks) == 0:
            return int(gold_toks == pred_toks)
        if num_same == 0:
            return 0
        precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
        return (2 * precision * recall) / (precision + recall)

    exact, f1 = {}, {}
    for qid, answers in gold.items():
        if qid not in preds:
            continue
        kept = [a for a in answers if normalize(a)] or [""]
        exact[qid] = max(int(normalize(a) == normalize(preds[qid])) for a in kept)
        f1[qid] = max(compute_f1(a, preds[qid]) for a in kept)
    has = {qid: bool(answers) for qid, answers in gold.items()}

    def apply(scores):
        return {qid: float(not has[qid]) if na_probs[qid] > threshold else s for qid, s in scores.items()}

    exact_t, f1_t = apply(exact), apply(f1)
    out = {
        "exact": 100.0 * sum(exact_t.values()) / len(exact_t),
        "f1": 100.0 * sum(f1_t.values()) / len(exact_t),
        "total": len(exact_t),
    }
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        if ids := [k for k, v in has.items() if v is wanted and k in exact]:
            out[f"{prefix}_exact"] = 100.0 * sum(exact_t[k] for k in ids) / len(ids)
            out[f"{prefix}_f1"] = 100.0 * sum(f1_t[k] for k in ids) / len(ids)
            out[f"{prefix}_total"] = len(ids)
    for name, scores in (("exact", exact), ("f1", f1)):
        cur = best = sum(1 for k in has if not has[k])
        best_thresh = 0.0
        for qid in sorted(na_probs, key=lambda k: na_probs[k]):
            if qid not in scores:
                continue
            cur += scores[qid] if has[qid] else (-1 if preds[qid] else 0)
            if cur > best:
                best, best_thresh = cur, na_probs[qid]
        out[f"best_{name}"], out[f"best_{name}_thresh"] = 100.0 * best / len(scores), best_thresh
    return out


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_squad_v2_to_the_last_digit(seed, threshold):
    draw = random.Random(seed)
    answers = zip(_texts(301, seed), _texts(301, seed + 10), strict=True)
    gold = {f"q{at}": [*pair] if draw.random() < 0.6 else [] for at, pair in enumerate(answers)}
    predicted = {f"q{at}": text for at, text in enumerate(_texts(301, seed + 20)) if draw.random() < 0.95}
    predicted = {"extra": "cat", **predicted}
    no_answer = {at: draw.choice([0.0, 0.25, draw.random()]) for at in predicted}
    assert squad_v2_scores(gold, predicted, no_answer, threshold) == official_v2(gold, predicted, no_answer, threshold)
    zeros = dict.fromkeys(predicted, 0.0)
    assert squad_v2_scores(gold, predicted) == official_v2(gold, predicted, zeros, 1.0)


def test_squad_v2_by_hand():
    gold = {"1": ["cat"], "2": [], "3": ["the"], "4": ["dog"], "5": []}
    predicted = {"1": "the cat", "2": "", "3": "", "5": "dog", "other": "x"}
    # 3: an answer that is an article counts as "", yet the question has an answer; 4 has no prediction and is left out
    assert squad_v2_scores(gold, predicted, {"1": 0.1, "2": 0.9, "3": 0.2, "5": 0.3, "other": 0.0}) == {
        **{"exact": 75.0, "f1": 75.0, "total": 4},
        **{"HasAns_exact": 100.0, "HasAns_f1": 100.0, "HasAns_total": 2},
        **{"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2},
        # 2 without answer at the start, + 1, + 3; then 5 takes one away again
        **{"best_exact": 100.0, "best_exact_thresh": 0.2, "best_f1": 100.0, "best_f1_thresh": 0.2},
    }
    assert squad_v2_errors(gold, predicted) == pytest.approx({"exact": 25 * 0.75**0.5, "f1": 25 * 0.75**0.5})
    assert "HasAns_exact" not in squad_v2_scores({"2": []}, {"2": ""})
    with pytest.raises(ValueError, match=r"^squad_v2_scores: no_answer must have the probability of question '2', got"):
        squad_v2_scores(gold, predicted, {"1": 0.5})
    with pytest.raises(ValueError, match=r"^squad_v2_scores: predicted must hold an answer to a question of gold, got"):
        squad_v2_scores(gold, {"other": ""})
