"""Predictor: its answers are those of transformers' pipelines and of sentence-transformers, row for row."""

from __future__ import annotations

import copy
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from demo_input import bert as small_bert
from tiny_models import SENTENCES

import distilbert_fast
from distilbert_fast import Predictor, explain
from distilbert_fast.modeling.loading import CheckpointError
from distilbert_fast.serving.answers import best_answers
from distilbert_fast.serving.pool import worker_threads
from distilbert_fast.serving.tasks import STRATEGIES

LONG = " ".join(SENTENCES)


def with_head(directory, kind, seed=1, factor=20, **config):
    """A real encoder with a random head, far from undecided."""
    torch.manual_seed(seed)
    model = kind.from_pretrained(directory, **config).eval()
    with torch.no_grad():
        for name in ("classifier", "qa_outputs"):
            if hasattr(model, name):
                getattr(model, name).weight.mul_(factor)
    return model


@pytest.fixture(scope="module")
def classifier(bert_dir):
    return with_head(bert_dir, transformers.BertForSequenceClassification, num_labels=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_bert(tmp_path_factory.mktemp("small") / "bert")


def pipeline(task, model, tokenizer, **options):
    """transformers' own, on a model that is not optimized."""
    return transformers.pipeline(task, model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu", **options)


def assert_same(found, wanted, tolerance=2e-5):
    """Labels and places equal, numbers near."""
    assert type(found) is type(wanted) or isinstance(wanted, (float, np.floating))
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert_same(found[name], value, tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(wanted, (float, np.floating)):
        assert found == pytest.approx(float(wanted), abs=tolerance, rel=tolerance)
    else:
        assert found == wanted


def test_classification_is_the_pipelines(classifier, tokenizer):
    texts = [*SENTENCES, LONG[:600]]
    theirs, model = pipeline("text-classification", classifier, tokenizer), copy.deepcopy(classifier)
    for options in (
        {"top_k": 1},
        {"top_k": None},
        {"top_k": 3, "function_to_apply": "sigmoid"},
        {"top_k": None, "function_to_apply": "none"},
    ):
        predictor = Predictor(model, tokenizer=tokenizer, batch_tokens=64, **options)
        assert_same(predictor(texts), theirs(texts, **options))
    assert explain(model).served > 12 and not explain(model).fallbacks


@pytest.mark.parametrize("config", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_functions_follow_the_config(small, config):
    model = with_head(small, transformers.BertForSequenceClassification, **{"num_labels": 3} | config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    pairs = [("the old cat", "my dog"), ("a hammer", "near the small saw and the drill")]
    wanted = pipeline("text-classification", model, tokenizer)(
        [{"text": a, "text_pair": b} for a, b in pairs], top_k=None
    )
    assert_same(Predictor(model, tokenizer=tokenizer, top_k=None)(pairs), wanted)


def test_regression_and_reranking(small):
    kind = transformers.BertForSequenceClassification
    model = with_head(small, kind, num_labels=1, problem_type="regression")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    wanted = pipeline("text-classification", model, tokenizer)("the old cat", top_k=1)
    predictor = Predictor(model, tokenizer=tokenizer)
    found = predictor("the old cat")
    assert isinstance(found, float) and found == pytest.approx(wanted[0]["score"], abs=1e-5)
    assert predictor.task.fields(found) == {"score": found}

    from sentence_transformers import CrossEncoder

    model.config.problem_type = None
    model.save_pretrained(small.parent / "cross")
    tokenizer.save_pretrained(small.parent / "cross")
    pairs = [("the old cat", "my dog"), ("the old cat", "a hammer near the small saw and the drill")]
    cross = CrossEncoder(str(small.parent / "cross"), device="cpu").predict(pairs)
    scores = Predictor.load(small.parent / "cross", "reranking")(pairs)
    assert scores == pytest.approx(cross.tolist(), abs=1e-5)
    two = with_head(small, kind, num_labels=2)
    with pytest.raises(ValueError, match="Predictor: model must be one with 1 label for reranking, got one with 2"):
        Predictor(two, "reranking", tokenizer)


def test_rows_are_a_text_a_pair_or_a_list(classifier, tokenizer):
    predictor = Predictor(copy.deepcopy(classifier), tokenizer=tokenizer)
    wanted = predictor(SENTENCES)
    assert predictor(iter(SENTENCES)) == predictor(np.array(SENTENCES)) == wanted
    for rows in (None, 3, {"text": "a"}, {"a", "b"}, b"a"):
        kind = "None" if rows is None else type(rows).__name__
        message = f"^Predictor: rows must be a text, a pair of texts or a list of them, got {kind}$"
        with pytest.raises(TypeError, match=message):
            predictor(rows)
    with pytest.raises(TypeError, match=r"^Predictor: rows must be a text, .*, got str$"):
        predictor.encode("a text")
    for model in (None, {}, iter(())):
        with pytest.raises(TypeError, match=r"^Predictor: model must be a model of transformers"):
            Predictor(model, tokenizer=tokenizer)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_those_of_pipelines(bert, tokenizer, pooling):
    texts = SENTENCES[:5]
    features = [np.array(rows[0]) for rows in pipeline("feature-extraction", bert, tokenizer)(texts)]
    wanted = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.max(0)}[pooling]
    predictor = Predictor(copy.deepcopy(bert), tokenizer=tokenizer, pooling=pooling)
    for found, rows in zip(predictor(texts), features, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted(rows), atol=2e-5)
    assert not explain(predictor.model).fallbacks


def test_embeddings_are_those_of_sentence_transformers(bert_dir):
    from sentence_transformers import SentenceTransformer, quantize_embeddings

    texts = [*SENTENCES, LONG * 3]  # beyond the 256 tokens that the directory says
    model = SentenceTransformer(str(bert_dir), device="cpu")
    wanted = model.encode(texts)
    predictor = Predictor.load(bert_dir)
    assert predictor.max_length == 256 and predictor.task.normalize and predictor.task.pooling == "mean"
    np.testing.assert_allclose(np.stack(predictor(texts)), wanted, atol=2e-5)

    def again(**options):
        return Predictor(predictor.model, "embedding", predictor.tokenizer, max_length=256, **options)(texts)

    short = np.stack(again(dimensions=100, normalize=True))
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    model.truncate_dim = 100
    np.testing.assert_allclose(short, model.encode(texts, normalize_embeddings=True), atol=2e-5)
    assert again(dtype="float16")[0].dtype == np.float16
    coded = again(dtype="int8")
    assert coded[0].values.dtype == np.int8 and max(abs(coded[0].values.astype(int))) == 127
    full = np.stack(again())
    np.testing.assert_allclose(coded[0].values * coded[0].scale, full[0], atol=coded[0].scale / 2 + 1e-7)
    for dtype in ("binary", "ubinary"):
        np.testing.assert_array_equal(np.stack(again(dtype=dtype)), quantize_embeddings(full, dtype))


@pytest.fixture(scope="module")
def tagger(bert_dir):
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return with_head(bert_dir, transformers.BertForTokenClassification, num_labels=5, **names)


def test_entities_are_the_pipelines(tagger, tokenizer):
    texts = ["Unflinchingly Kühlschrank 😀 said, in Mönchengladbach.", *SENTENCES[:8]]
    theirs, model = pipeline("token-classification", tagger, tokenizer), copy.deepcopy(tagger)
    for strategy in STRATEGIES:
        wanted = theirs(texts, aggregation_strategy=strategy)
        found = Predictor(model, None, tokenizer, aggregation_strategy=strategy)(texts)
        assert_same(found, wanted)
        assert sum(map(len, found)) > 20
    assert explain(model).served == len(STRATEGIES) and not explain(model).fallbacks


def test_entities_of_long_texts(tagger, bert_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_dir, model_max_length=40)
    model = copy.deepcopy(tagger)
    wanted = pipeline("token-classification", tagger, tokenizer, aggregation_strategy="simple", stride=9)(LONG)
    assert_same(Predictor(model, None, tokenizer, stride=9)(LONG), wanted)
    cut = pipeline("token-classification", tagger, tokenizer, aggregation_strategy="simple")(LONG)
    predictor = Predictor(model, None, tokenizer, ignore_labels=["O", "LOC"])
    assert_same(predictor([LONG]), [[entity for entity in cut if entity["entity_group"] != "LOC"]])
    assert [row.truncated for row in predictor.encode([LONG, "No."])] == [True, False]


# What the pipeline "question-answering" of transformers 4.57.1 answered to the same model. transformers 5 has none.
SWALLOW, HONEY = "unladen swallow? Water boils at 100 °C at sea", "bread with honey on her porch"
ANSWERS = [
    ({}, [[(0.000662728, 356, SWALLOW)], [(0.154368, 50, HONEY)]]),
    (
        {"top_k": 3, "handle_impossible_answer": True},
        [
            [(0.000662728, 356, SWALLOW), (0.000233741, 356, f"{SWALLOW} level,"), (0.000216192, 356, SWALLOW[:28])],
            [(0.154368, 50, HONEY), (0.0990854, 43, f"we ate {HONEY}"), (0.098314, 56, HONEY[6:])],
        ],
    ),
    ({"max_length": 60, "stride": 12}, [[(0.220873, 199, "audience, which had paid")], [(0.154368, 50, HONEY)]]),
    (
        {"top_k": 2, "max_answer_len": 4, "align_to_words": False, "max_length": 70},
        [
            [(0.692268, 926, "update"), (0.0669950, 990, "stolen")],
            [(0.0722127, 61, HONEY[11:]), (0.0337569, 67, HONEY[17:])],
        ],
    ),
]


def questions():
    return [("Where was the letter?", LONG), ("Who kept bees?", SENTENCES[13])]


@pytest.mark.parametrize(("options", "wanted"), ANSWERS, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_answers_are_the_pipelines(bert_dir, tokenizer, options, wanted):
    model = with_head(bert_dir, transformers.BertForQuestionAnswering)
    found = Predictor(model, tokenizer=tokenizer, **options)(questions())
    for (_, context), answers, known in zip(questions(), found, wanted, strict=True):
        answers = answers if isinstance(answers, list) else [answers]
        assert [(one["start"], one["answer"]) for one in answers] == [(start, text) for _, start, text in known]
        assert [one["score"] for one in answers] == pytest.approx([score for score, _, _ in known], rel=1e-3)
        assert all(context[one["start"] : one["end"]] == one["answer"] for one in answers)
    assert not explain(model).fallbacks


def test_no_answer_may_be_the_best(small):
    """By hand: start and end point at [CLS], with a share of 1 / (1 + 3 / e³) each."""
    model = with_head(small, transformers.BertForQuestionAnswering)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    with torch.no_grad():
        model.qa_outputs.weight.zero_()
    predictor = Predictor(model, None, tokenizer, handle_impossible_answer=True)
    scored = best_answers(
        "cat dog saw",
        predictor.encode([("old", "cat dog saw")])[0].windows,  # [CLS] old [SEP] cat dog saw [SEP]
        [(np.array([3, 9, 9, 0, 0, 0, 9], dtype=np.float32),) * 2],
        tokenizer.cls_token_id,
        *(2, 15, True, True),
    )
    share = 1 / (1 + 3 * np.exp(-3))
    assert scored[0] == {"score": pytest.approx(share**2, rel=1e-5), "start": 0, "end": 0, "answer": ""}
    assert scored[1]["score"] == pytest.approx((share * np.exp(-3)) ** 2, rel=1e-4)
    assert predictor(("old", "cat dog saw"))["answer"] in ("", "cat", "cat dog", "cat dog saw", "dog", "dog saw", "saw")


def test_threads_get_what_one_gets(classifier, tokenizer):
    """Two predictors of one tokenizer, with other lengths, in four threads."""
    model = copy.deepcopy(classifier)
    short, whole = (Predictor(model, None, tokenizer, max_length=n, top_k=None) for n in (8, None))
    wanted = {id(one): one.compute(one.encode(SENTENCES)) for one in (short, whole)}
    faults = []

    def work(one):
        for _ in range(2):
            if one.compute(one.encode(SENTENCES)) != wanted[id(one)]:
                faults.append(one.max_length)

    threads = [threading.Thread(target=work, args=(one,)) for one in (short, whole) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and wanted[id(short)] != wanted[id(whole)]


def test_a_pool_gets_what_one_gets(classifier, tokenizer):
    """Its threads share those of torch, and leave torch as many as it had."""
    predictor = Predictor(copy.deepcopy(classifier), None, tokenizer, batch_tokens=40, top_k=None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with worker_threads(torch.device("cpu")) as threads:
            assert [*threads.map(lambda _: torch.get_num_threads(), range(9))] == [1] * 9
            assert torch.get_num_threads() == 3
            finish = [predictor.start(predictor.encode(texts), threads) for texts in (SENTENCES, [LONG], [])]
            found = [one() for one in finish]
        torch.set_num_threads(1)  # as each of the pool has: the sums of torch's heads depend on it
        wanted = [predictor(texts) for texts in (SENTENCES, [LONG], [])]
    finally:
        torch.set_num_threads(before)
    assert found == wanted and found[2] == []


def test_what_is_cut_off_is_said(classifier, tokenizer, caplog):
    predictor = Predictor(copy.deepcopy(classifier), None, tokenizer, max_length=16)
    with caplog.at_level(logging.WARNING):
        predictor(["No.", LONG])
    assert caplog.messages == ["Predictor: 1 of 2 texts are longer than max_length 16"]
    batches = predictor.encode([LONG, "x" * 1_000_000])
    assert [row.tokens for row in batches] == [16, 3] and batches[0].truncated


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "expected a text, got None"),
        (3.5, "expected a text, got 3.5"),
        (["a", "b"], "expected a text or a pair of texts, got ['a', 'b']"),
        ("", "an empty text"),
        (" \n", "an empty text"),
        ("a\0b", "a text holds a NUL byte"),
        ("half \ud83d", "expected a text, got the lone surrogate '\\ud83d' at character 5"),
        (("a", None), "the second text: expected a text, got None"),
    ],
)
def test_rows_that_are_none(classifier, tokenizer, row, message):
    predictor = Predictor(classifier, None, tokenizer)
    with pytest.raises(ValueError) as raised:
        predictor(["fine", row])
    assert str(raised.value) == f"Predictor: row 1: {message}"
    answers = predictor.compute(predictor.encode(["fine", row, "fine"]))
    assert answers[1] is None and answers[0] == answers[2] is not None


def test_questions_that_leave_no_room(bert_dir, tokenizer):
    model = with_head(bert_dir, transformers.BertForQuestionAnswering)
    predictor = Predictor(model, None, tokenizer, max_length=64, stride=20)
    rows = predictor.encode([(SENTENCES[3] + LONG, "Yes."), (SENTENCES[3], "Yes."), (SENTENCES[3], LONG)])
    assert rows[0].refused.startswith("question: its ") and rows[0].refused.endswith(
        "tokens leave no room for more than 20 tokens beside it in a window of 64"
    )
    assert rows[1].refused is None and rows[2].refused.endswith("in a window of 64")
    assert predictor.encode(["Why?"])[0].refused == "expected a pair of texts, question and context, got 'Why?'"


def test_arguments_that_are_refused(classifier, bert, tokenizer, small, tmp_path):
    def refused(message, error=ValueError, model=classifier, task=None, tokenizer=tokenizer, **options):
        with pytest.raises(error) as raised:
            Predictor(model, task, tokenizer, **options)
        assert str(raised.value) == f"Predictor: {message}"

    names = (
        "'text-classification', 'regression', 'embedding', 'token-classification', 'question-answering', 'reranking'"
    )
    refused(f"task must be one of {names}, got 'ner'", task="ner")
    refused("top_k must be an integer from 1 on, got 0", top_k=0)
    refused("function_to_apply must be one of 'sigmoid', 'softmax', 'none', got 'tanh'", function_to_apply="tanh")
    refused(
        "option of text-classification must be one of top_k, function_to_apply, got stride", error=TypeError, stride=3
    )
    refused("max_length must be 1 to 512, what model and tokenizer take, got 600", max_length=600)
    refused("max_length must be 3 or more, to leave room for text, got 2", max_length=2)
    refused("batch_tokens must be an integer from 1 on, got 0", batch_tokens=0)
    refused("tokenizer must be given (Predictor.load reads it with the model), got None", TypeError, tokenizer=None)
    refused(
        "model must be a …ForTokenClassification for token-classification, got BertForSequenceClassification",
        TypeError,
        task="token-classification",
    )
    refused("dimensions must be 1 to 384, what the model has, got 385", model=bert, dimensions=385)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=24, num_attention_heads=2))
    refused("task must be given for a model whose head tells none, got None for BertForMaskedLM", TypeError, masked)
    with pytest.raises(CheckpointError, match="lacks 2 tensors that BertForTokenClassification needs, or"):
        Predictor.load(small, "token-classification")
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    place = small_bert(tmp_path / "dense")
    (place / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="expected Transformer, Pooling and Normalize, got Dense; use sentence-tr"):
        Predictor.load(place, "embedding")


def test_what_is_given_stays(classifier, tokenizer):
    model = copy.deepcopy(classifier)
    before = tokenizer.backend_tokenizer.to_str()
    distilbert_fast.optimize(model, "int8")
    predictor = Predictor(model, None, tokenizer, max_length=16)
    assert explain(predictor.model).engine.startswith("int8") and predictor.model is model
    assert tokenizer.backend_tokenizer.to_str() == before
    assert Predictor(model, None, tokenizer, "fp32") and explain(model).engine.startswith("fp32")


def test_a_checkpoint_that_is_written_over_changes_nothing(classifier, tokenizer, tmp_path):
    """As `cp` does it, which cuts the file first; what is mapped would end the process."""
    for part in (classifier, tokenizer):
        part.save_pretrained(tmp_path)
    predictor = Predictor.load(tmp_path)
    wanted = predictor("a charming journey")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert predictor("a charming journey") == wanted
