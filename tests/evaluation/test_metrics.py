"""Metrics against their definitions, and predictions against one sentence at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch
from demo_input import bert, load_classifier, sentences
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score

from distilbert_fast.data.tags import scheme_of
from distilbert_fast.evaluation import metrics
from distilbert_fast.evaluation.entity_scores import entity_scores


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(1)
    return load_classifier(bert(tmp_path_factory.mktemp("m") / "bert"), ["a", "b", "c"], new_head=True)


def test_definitions():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 50, 4)
    labels = torch.randint(0, 3, (50,))  # class 3 is predicted but never right
    assert metrics.accuracy(logits, labels) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert metrics.macro_f1(logits, labels) == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert metrics.agreement(logits, teacher) == pytest.approx(
        float((logits.argmax(1) == teacher.argmax(1)).float().mean())
    )
    p, q = teacher.double().softmax(1), logits.double().softmax(1)
    assert metrics.mean_kl(logits, teacher) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert metrics.agreement(teacher, teacher) == 1
    assert metrics.mean_kl(teacher, teacher) == pytest.approx(0, abs=1e-6)


def test_predictions_come_in_the_order_given(classifier):
    model, tokenizer = classifier
    model.train()  # the caller may have forgotten
    texts = [text for text, _ in sentences(37, seed=3)]
    together = metrics.predictions(model, tokenizer, texts, batch_size=8)
    assert together.shape == (37, 3)
    assert together.dtype == torch.float32
    for text, row in zip(texts, together, strict=True):
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_predictions_cut_long_sentences(classifier):
    model, tokenizer = classifier
    long, cut = "cat " * 500, "cat " * 6  # [CLS], 6 words, [SEP]
    both = metrics.predictions(model, tokenizer, [long, cut], max_length=8)
    torch.testing.assert_close(both[0], both[1])


def test_predictions_for_pairs(classifier):
    """Token types tell the second sentence; too long a pair loses tokens of the longer one."""
    model, tokenizer = classifier
    texts = [text for text, _ in sentences(14, seed=4)]
    pairs = list(zip(texts[:7], texts[7:], strict=True))
    together = metrics.predictions(model, tokenizer, pairs, batch_size=3)
    for (first, second), row in zip(pairs, together, strict=True):
        encoded = tokenizer(first, second, return_tensors="pt")
        assert encoded["token_type_ids"].sum() == len(second.split()) + 1
        torch.testing.assert_close(row, model(**encoded).logits[0], rtol=1e-4, atol=1e-5)
    long, short, cut = "cat " * 500, "dog saw", "cat " * 4  # [CLS], 4 words, [SEP], 2 words, [SEP]
    made = metrics.predictions(model, tokenizer, [(long, short), (cut, short)], max_length=9)
    torch.testing.assert_close(made[0], made[1])
    made = metrics.predictions(model, tokenizer, [(short, long), (short, cut)], max_length=9)
    torch.testing.assert_close(made[0], made[1])


def test_numbers():
    torch.manual_seed(0)
    labels = torch.randint(0, 6, (60,)).float()  # with ties
    predicted = labels**3 + torch.randn(60)
    assert metrics.pearson(predicted, labels) == pytest.approx(pearsonr(predicted, labels).statistic)
    assert metrics.spearman(predicted, labels) == pytest.approx(spearmanr(predicted, labels).statistic)
    assert metrics.mse(predicted, labels) == pytest.approx(float(((predicted - labels) ** 2).mean()), rel=1e-6)
    assert metrics.spearman(labels**3, labels) == pytest.approx(1.0)
    for same in (metrics.pearson, metrics.spearman):
        assert math.isnan(same(torch.full((60,), 2.5), labels))  # a constant answer, as SciPy says


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", ""),
        ("O O", ""),
        ("B-PER I-PER O B-LOC", "PER:0:2 LOC:3:4"),
        ("B-PER B-PER", "PER:0:1 PER:1:2"),
        ("O I-PER I-PER O", "PER:1:3"),  # I- after O
        ("I-PER", "PER:0:1"),
        ("B-PER I-LOC I-LOC", "PER:0:1 LOC:1:3"),  # I- of another type
        ("I-PER B-PER I-PER", "PER:0:1 PER:1:3"),  # IOB1
        ("B-PER I-PER B-LOC I-LOC", "PER:0:2 LOC:2:4"),
        ("B-PER I-PER", "PER:0:2"),  # at the end
        ("S-PER I-PER", "PER:0:1 PER:1:2"),
        ("B-PER I-PER E-PER I-PER", "PER:0:3 PER:3:4"),
        ("E-PER E-PER S-LOC", "PER:0:1 PER:1:2 LOC:2:3"),
        ("B-A-B I-A-B", "A-B:0:2"),
        ("B I O I", ":0:2 :3:4"),  # one type without a name
        ("PER-B PER-I O LOC-B", "PER:0:2 LOC:3:4"),  # the mark after the type
        ("A-B-B A-B-I A-B-B", "A-B:0:2 A-B:2:3"),
        ("b-org i-org o b-org", "org:0:2 org:3:4"),
        ("B_PER I_PER O PER_B", None),
        ("PER_B PER_I O", "PER:0:2"),
        ("B-A_B I-A_B O", "A_B:0:2"),
        ("B-X L-X U-X I-X L-X B-X I-X", "X:0:2 X:2:3 X:3:5 X:5:7"),  # BILOU
        ("B-X M-X E-X S-X O M-X", "X:0:3 X:3:4 X:5:6"),  # BMES
        ("B E S B M E", ":0:2 :2:3 :3:6"),
        ("B-X E-X W-X", "X:0:2 X:2:3"),  # BMEWO
        ("I-X E-X I-X I-X O E-X", "X:0:2 X:2:4 X:5:6"),  # IOE
        ("PER PER O PER LOC", "PER:0:2 PER:3:4 LOC:4:5"),  # types alone
        ("B-X L-X E-X", None),  # of two schemes
        ("B-X X", None),
        ("NOUN VERB", None),
    ],
)
def test_entities_as_conll_has_them(tags, found):
    if found is None:
        with pytest.raises(ValueError, match=r"^entity_scores: expected tags such as B-PER, I-PER and O, got "):
            entity_scores([tags.split()], [tags.split()])
        return
    spans = {f"{kind}:{start}:{stop}" for kind, start, stop in entities(tags.split())}
    assert spans == set(found.split())


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    scheme = scheme_of(tags)
    return set() if scheme is None else scheme.entities(tags)


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Entities by the rules of conlleval.pl: where a chunk ends and where one starts, of a tag and the one before."""
    ends = {"EE", "EI", "EO", "EB", "ES", "SE", "SI", "SO", "SB", "SS", "BB", "BS", "BO", "IB", "IS", "IO"}
    starts = {"EE", "EI", "SE", "SI", "OE", "OI"}
    found, first = set(), 0
    mark, kind = "O", ""
    for at, tag in enumerate([*tags, "O"]):
        now, _, sort = tag.partition("-")
        if mark != "O" and (mark + now in ends or kind != sort):
            found.add((kind, first, at))
        if now in ("B", "S") or mark + now in starts or (now != "O" and kind != sort):
            first = at
        mark, kind = now, sort
    return found


@pytest.mark.parametrize("marks", ["BI", "I", "BIES", "IE", "BILU", "BMES", "BMEW"])
@pytest.mark.parametrize("form", ["{mark}-{kind}", "{kind}-{mark}", "{mark}_{kind}", "{kind}_{mark}", "lower"])
def test_entities_are_those_of_conlleval(marks, form):
    """Of tags in any order, right or wrong, in every form that files have."""
    draw = random.Random(f"{marks}{form}")
    same = str.maketrans("LUMW", "ESIS")
    for _ in range(60):
        pairs = [draw.choice([("O", ""), *((mark, kind) for mark in marks for kind in "XY")]) for _ in range(9)]
        plain = [f"{mark.translate(same)}-{kind}" if kind else "O" for mark, kind in pairs]
        template = "{mark}-{kind}" if form == "lower" else form
        written = [template.format(mark=mark, kind=f"T{kind}") if kind else "O" for mark, kind in pairs]
        if form == "lower":
            written = [tag.lower() for tag in written]
        expected = {(f"t{kind.lower()}" if form == "lower" else f"T{kind}", *at) for kind, *at in conlleval(plain)}
        assert entities(written) == expected
