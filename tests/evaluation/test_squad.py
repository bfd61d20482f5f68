"""Windows that hold the answers they should, the best span of all, and SQuAD's scores of planted answers."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from demo_input import bert

pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from distilbert_fast.evaluation.squad import LONGEST, Question, Questions, Windows, _best_spans, load_squad

CONTEXT = "the old cat near a small dog with one saw on my drill and a hammer under your file"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bert(tmp_path_factory.mktemp("bert") / "bert"))


def questions(*answers: str) -> Questions:
    rows = [Question("one dog", CONTEXT, ((answer, CONTEXT.index(answer)),)) for answer in answers]
    return Questions("test", tuple(rows))


@pytest.mark.parametrize("max_length", [10, 12, 64])
def test_windows_hold_the_answer_or_say_that_they_do_not(tokenizer, max_length):
    asked = questions("cat", "small dog", "hammer under your file", "the")
    windows = Windows(asked, tokenizer, max_length, stride=2)
    found = set()
    for row, offsets, at in zip(windows.rows, windows.offsets, windows.question, strict=True):
        start, end = row["start_positions"], row["end_positions"]
        assert len(row["input_ids"]) <= max_length
        context = [place for place, inside in enumerate(row["answer_mask"]) if inside]
        assert [row["token_type_ids"][place] for place in context] == [1] * len(context)
        (text, begin), stop = asked.rows[at].answers[0], None
        stop = begin + len(text)
        if (start, end) != (0, 0):
            assert CONTEXT[offsets[start][0] : offsets[end][1]] == text
            assert row["answer_mask"][start] == row["answer_mask"][end] == 1
            found.add(at)
        else:  # it is not wholly in this window
            assert offsets[context[0]][0] > begin or offsets[context[-1]][1] < stop
    # a window of 10 tokens holds 5 of context, and two of them 2 tokens in common
    assert found == {0, 1, 2, 3} if max_length > 10 else found >= {0, 1, 3}


@pytest.mark.parametrize(
    ("max_length", "stride", "message"),
    [
        (5, 0, "Windows: max_length must be above 5, the longest question with [CLS] and [SEP]s, got 5"),
        (6, 1, "Windows: stride must be 0 to 0, below the context that the longest question leaves, got 1"),
        (10, 5, "Windows: stride must be 0 to 4, below the context that the longest question leaves, got 5"),
        (10, -1, "Windows: stride must be 0 to 4, below the context that the longest question leaves, got -1"),
    ],
)
def test_windows_without_room(tokenizer, max_length, stride, message):
    with pytest.raises(ValueError) as caught:
        Windows(questions("cat"), tokenizer, max_length, stride)
    assert str(caught.value) == message


def test_windows_with_just_enough_room(tokenizer):
    assert len(Windows(questions("cat"), tokenizer, 6, stride=0).rows) == len(CONTEXT.split())
    assert len(Windows(questions("cat"), tokenizer, 10, stride=4).rows) == len(CONTEXT.split()) - 4


def test_the_best_span_of_all():
    torch.manual_seed(0)
    start, end = torch.randn(5, 45), torch.randn(5, 45)
    allowed = torch.rand(5, 45) < 0.7
    score, first, last = _best_spans(start, end, allowed)
    for row in range(5):
        spans = [
            (float(start[row, i] + end[row, j]), i, j)
            for i, j in product(range(45), repeat=2)
            if allowed[row, i] and allowed[row, j] and i <= j < i + LONGEST
        ]
        best = max(spans)
        assert (int(first[row]), int(last[row])) == best[1:]
        assert float(score[row]) == pytest.approx(best[0])


class Knowing(torch.nn.Module):
    """Points at the tokens of one window's answer, whatever it is asked; the others' start and end are unsure."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.places = {tuple(row["input_ids"]): (row["start_positions"], row["end_positions"]) for row in windows.rows}

    def forward(self, input_ids, attention_mask, **_):
        logits = torch.zeros(2, *input_ids.shape)
        for at, (ids, real) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            start, end = self.places[tuple(ids[real].tolist())]
            logits[0, at, start] = logits[1, at, end] = (
                5.0  # on the first token, where no answer may be, if there is none
            )
        return type("Output", (), {"start_logits": logits[0], "end_logits": logits[1]})


def test_scores(tokenizer):
    asked = questions("cat", "dog", "saw", "drill")
    windows = Windows(asked, tokenizer, 12, stride=4)
    one = Windows(questions("dog"), tokenizer, 12, stride=4)
    # the four share their windows, so that a model can know one answer only
    assert Windows(asked, tokenizer, 12, stride=4).score(Knowing(one)) == {"exact_match": 25.0, "f1": 25.0}
    assert one.score(Knowing(one)) == {"exact_match": 100.0, "f1": 100.0}
    two = Windows(questions("small dog"), tokenizer, 12, stride=4)
    assert two.score(Knowing(one)) == {"exact_match": 0.0, "f1": pytest.approx(200 / 3)}  # half of it: 2·1·½ / 1½
    batch = windows.batches(3, 5)
    assert [len(inputs["input_ids"]) for inputs in batch] == [3, 2]
    assert set(batch[0]) == {"input_ids", "attention_mask", "token_type_ids"}


def write(path, answers):
    qas = [{"question": "one dog", "answers": answers}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return path


def test_files(tmp_path):
    good = write(tmp_path / "good.json", [{"text": "cat", "answer_start": 8}])
    train, held_out = load_squad(good, good)
    assert len(train) == len(held_out) == 1 and train.fingerprint == held_out.fingerprint
    (tmp_path / "list.json").write_text("[]")
    for path, message in (
        (tmp_path / "nowhere.json", "no such file"),
        (tmp_path / "list.json", "is not of SQuAD's form: TypeError"),
        (write(tmp_path / "none.json", []), r"each question must have an answer \(SQuAD 1.1\), got none for 'one dog'"),
        (write(tmp_path / "moved.json", [{"text": "cat", "answer_start": 9}]), "no answer 'cat' stands at 9"),
    ):
        with pytest.raises(ValueError, match=f"^load_squad: data: .*{message}"):
            load_squad(path, good)
    with pytest.raises(ValueError, match="expected enough contexts to hold some out"):
        load_squad(good)
