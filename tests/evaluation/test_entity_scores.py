"""Precision, recall and F1 of entities, over all and by type."""

from __future__ import annotations

import numpy as np
import pytest

from distilbert_fast.evaluation.entity_scores import EntityScore, entity_errors, entity_scores


def split(*sentences: str) -> list[list[str]]:
    return [tags.split() for tags in sentences]


def test_by_hand():
    true = split("B-PER I-PER O B-LOC", "O B-ORG I-ORG")
    assert entity_scores(true, true)[0] == (3, 3, 3)
    # one right, one of another type, one too short, one that is not there: precision 1/4, recall 1/3
    total, kinds = entity_scores(split("B-PER I-PER O B-ORG", "I-LOC B-ORG O"), true)
    assert (total.precision, total.recall, total.f1) == (1 / 4, 1 / 3, 2 / 7)
    assert kinds == {"LOC": (1, 1, 0), "ORG": (1, 2, 0), "PER": (1, 1, 1)}
    assert kinds["ORG"].as_dict() == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    # the same place in another sentence is another entity
    assert entity_scores(split("B-X", "O"), split("O", "B-X"))[0] == (1, 1, 0)
    # a sentence of which the tags could be of another scheme than those of all
    true = split("I-B O", "X-B X-I")
    assert entity_scores([["X-B", "O"], true[1]], true)[0].f1 == 0.5


def test_no_entities():
    assert entity_scores([["O"]], [["O"]]) == (EntityScore(0, 0, 0), {})
    assert (EntityScore(0, 0, 0).precision, EntityScore(0, 0, 0).recall, EntityScore(0, 0, 0).f1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("true", "found", "f1"),
    [  # seqeval's own cases, in its default mode
        (
            ("O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"),
            ("O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"),
            0.5,
        ),
        (("B-NP I-NP O",), ("I-NP I-NP O",), 1.0),
        (("B-ORG I-ORG",), ("I-ORG I-ORG",), 1.0),
        (("NP-B NP-I O",), ("NP-I NP-I O",), 1.0),
        (("S-X B-Y E-Y",), ("B-X I-Y I-Y",), 1.0),
    ],
)
def test_as_seqeval_counts(true, found, f1):
    assert entity_scores(split(*found), split(*true))[0].f1 == f1


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match=r"^entity_scores: expected tags such as B-PER, I-PER and O, got DET, NOUN$"):
        entity_scores([["DET"]], [["NOUN"]])
    with pytest.raises(ValueError, match=r"^entity_scores: expected as many predicted as true tags, got 1, 2$"):
        entity_scores([["B-X"]], [["B-X", "O"]])


def test_standard_errors_are_those_of_a_share():
    draw = np.random.default_rng(0)
    right = draw.random(400) < 0.7
    found = [["B-X"] if one else ["B-Y"] for one in right]
    errors = entity_errors(found, [["B-X"]] * 400)
    share = right.mean()
    for name in ("precision", "recall", "f1"):  # one entity a sentence: all are the share that is right
        assert errors[name] == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.2)
    assert entity_errors([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}
