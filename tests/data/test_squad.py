"""Windows that hold the answers they should, the best span of all, and SQuAD's scores of planted answers."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from demo_input import bert

pytest.importorskip("datasets")

from distilbert_fast.data.squad import (
    LONGEST,
    N_BEST,
    Question,
    Questions,
    Windows,
    _best_span,
    load_squad,
    read_answers,
    read_asked,
)
from distilbert_fast.evaluation.squad_scores import squad_scores

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
    for row in range(5):
        likely = [set(logits[row].topk(N_BEST).indices.tolist()) for logits in (start, end)]
        spans = [
            (float(start[row, i] + end[row, j]), i, j)
            for i, j in product(*likely)
            if allowed[row, i] and allowed[row, j] and i <= j < i + LONGEST
        ]
        found = _best_span(start[row].numpy(), end[row].numpy(), allowed[row].numpy())
        assert found[1:] == max(spans)[1:]
        assert found[0] == pytest.approx(max(spans)[0])
    assert _best_span(start[0].numpy(), end[0].numpy(), np.zeros(45, dtype=bool))[0] == -1e9


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


def scores(windows, model):
    gold = {str(at): [text for text, _ in row.answers] for at, row in enumerate(windows.questions.rows)}
    return squad_scores(gold, {str(at): answer.text for at, answer in enumerate(windows.answers(model))})


def test_a_question_without_answer(tokenizer):
    rows = (Question("one dog", CONTEXT, ()), Question("one dog", CONTEXT, (("cat", CONTEXT.index("cat")),)))
    windows = Windows(Questions("test", rows), tokenizer, 64, stride=2)
    assert [(row["start_positions"], row["end_positions"]) for row in windows.rows] == [(0, 0), (6, 6)]
    one = Windows(Questions("test", rows[:1]), tokenizer, 12, stride=2)
    (answer,) = one.answers(Knowing(one))
    assert answer.null_odds == 10 and answer.text in CONTEXT
    (answer,) = windows.answers(Knowing(windows))[:1]
    assert (answer.text, answer.null_odds) == ("cat", -10)


def test_scores(tokenizer):
    asked = questions("cat", "dog", "saw", "drill")
    windows = Windows(asked, tokenizer, 12, stride=4)
    one = Windows(questions("dog"), tokenizer, 12, stride=4)
    # the four share their windows, so that a model can know one answer only
    assert scores(Windows(asked, tokenizer, 12, stride=4), Knowing(one)) == {"exact_match": 25.0, "f1": 25.0}
    assert scores(one, Knowing(one)) == {"exact_match": 100.0, "f1": 100.0}
    two = Windows(questions("small dog"), tokenizer, 12, stride=4)
    assert scores(two, Knowing(one)) == {"exact_match": 0.0, "f1": pytest.approx(200 / 3)}  # half of it: 2·1·½ / 1½
    batch = windows.batches(3, 5)
    assert [len(inputs["input_ids"]) for inputs in batch] == [3, 2]
    assert set(batch[0]) == {"input_ids", "attention_mask", "token_type_ids"}


# white space, control characters and marks that normalizers drop
OUTER = ["", " ", "\n", "\t\r\n", "\u00a0", "\u200b", "\ufeff", "\u0301", "\x00", " \u200b \u2060"]


@pytest.mark.parametrize("before", OUTER)
@pytest.mark.parametrize("after", OUTER)
def test_answers_whose_outer_characters_no_token_covers(tokenizer, before, after):
    """Their label is what tokens cover of them, not the first token, which says that there is no answer."""
    context = f"the old cat near {before}a small dog{after} with one saw"
    begin = context.index("a small") - len(before)
    answer = context[begin : context.index(" with one")]
    asked = Questions("test", (Question("one dog", context, ((answer, begin),), "q1"),))
    windows = Windows(asked, tokenizer, 64, stride=2)
    plain = Windows(
        Questions("test", (Question("one dog", context, (("a small dog", context.index("a small")),)),)),
        tokenizer,
        64,
        stride=2,
    )
    for row, offsets in zip(windows.rows, windows.offsets, strict=True):
        assert context[offsets[row["start_positions"]][0] : offsets[row["end_positions"]][1]].strip() == "a small dog"
    assert [row["end_positions"] for row in windows.rows] == [row["end_positions"] for row in plain.rows]


@pytest.mark.parametrize("max_length", [10, 12])
def test_an_answer_that_a_window_cuts_is_not_trimmed(tokenizer, max_length):
    """What another window covers of an answer counts."""
    answer = "hammer under your"
    asked = Questions("test", (Question("one dog", CONTEXT, ((f"{answer} ", CONTEXT.index(answer)),)),))
    windows = Windows(asked, tokenizer, max_length, stride=2)
    held = [
        CONTEXT[offsets[row["start_positions"]][0] : offsets[row["end_positions"]][1]]
        for row, offsets in zip(windows.rows, windows.offsets, strict=True)
        if row["end_positions"]
    ]
    assert set(held) == {answer} and len(held) < len(windows.rows)


@pytest.mark.parametrize("answer", ["\u200b", "\u2060\u200b"])
def test_answers_of_which_nothing_is_left(tokenizer, answer):
    asked = Questions("test", (Question("one dog", f"the {answer} cat", ((answer, 4),), "q7"),))
    with pytest.raises(ValueError) as caught:
        Windows(asked, tokenizer, 64, stride=2)
    assert str(caught.value) == (
        f"Windows: questions: question 'q7': no token covers a character of its answer {answer!r}"
    )


def write(path, answers, **more):
    qas = [{"question": "one dog", "answers": answers, **more}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return path


def asked(answers, context=CONTEXT, **more):
    qa = {"question": "one dog", "id": "q7", "answers": answers, **more}
    return {"data": [{"paragraphs": [{"context": context, "qas": [qa]}]}]}


CAT = {"text": "cat", "answer_start": 8}
NOT_1_1 = "question 'q7': each question must have an answer (SQuAD 1.1), got none for 'one dog'"
BAD = [
    (asked([CAT | {"answer_start": "8"}]), "question 'q7': expected an integer as answer_start, got '8'"),
    (asked([CAT | {"answer_start": 8.0}]), "question 'q7': expected an integer as answer_start, got 8.0"),
    (asked([CAT | {"answer_start": None}]), "question 'q7': expected an integer as answer_start, got None"),
    (asked([CAT | {"answer_start": True}]), "question 'q7': expected an integer as answer_start, got True"),
    (asked([CAT | {"text": ["cat"]}]), "question 'q7': expected a text as text, got ['cat']"),
    (asked([{"text": "cat"}]), "question 'q7': expected an object with answer_start, got {'text': 'cat'}"),
    (asked({"text": ["cat"], "answer_start": [8]}), "question 'q7': expected a list as answers, got {'text'"),
    (asked(["cat"]), "question 'q7': expected an object with text, got 'cat'"),
    (asked([CAT], question=7), "question 'q7': expected a text as question, got 7"),
    (asked([CAT], context=None), "article 1: paragraph 1: expected a text as context, got None"),
    (asked([CAT], is_impossible="no"), "question 'q7': expected true or false as is_impossible, got 'no'"),
    (["data"], "expected an object with data, got ['data']"),
    ({"q7": "cat"}, "expected an object with data, got {'q7': 'cat'}"),
    (
        {"data": [{"paragraphs": []}, {"title": "x"}]},
        "article 2: expected an object with paragraphs, got {'title'",
    ),
    (asked([{"text": "", "answer_start": -1}]), "question 'q7': no answer '' stands at -1 of its context"),
    (asked([{"text": "file", "answer_start": -4}]), "question 'q7': no answer 'file' stands at -4 of its context"),
    (asked([{"text": "cat", "answer_start": 10**30}]), "question 'q7': no answer 'cat' stands at 10000000000000000"),
    (asked([{"text": "", "answer_start": 8}]), "question 'q7': expected an answer with more than white space, got ''"),
    (asked([CAT, {"text": " ", "answer_start": 3}]), "question 'q7': expected an answer with more than white space"),
    (asked([], is_impossible=True), NOT_1_1 + ", which is_impossible (SQuAD 2.0)"),
    (asked([{"text": "", "answer_start": -1}], is_impossible=True), NOT_1_1 + ", which is_impossible (SQuAD 2.0)"),
    (asked([CAT], is_impossible=True), NOT_1_1 + ", which is_impossible (SQuAD 2.0)"),
    (asked([]), NOT_1_1),
    (asked([], id=None), "question 1: each question must have an answer (SQuAD 1.1), got none for 'one dog'"),
    (
        asked([CAT], question="\ud83d dog"),
        "question 'q7': expected a text as question, got the lone surrogate '\\ud83d' at",
    ),
    (
        asked([CAT], context=f"{CONTEXT} \udc00"),
        "question 'q7': expected a text as context, got the lone surrogate '\\udc00'",
    ),
    (asked([CAT], id="\ud83d"), "question '\\ud83d': expected a text as id, got the lone surrogate '\\ud83d' at char"),
    (asked([CAT], id=[7]), "question 1: expected a text or an integer as id, got [7]"),
    (asked([CAT], id=False), "question 1: expected a text or an integer as id, got False"),
    (asked([CAT], question=" \n"), "question 'q7': expected a question of visible characters, got ' \\n'"),
    (asked([CAT], id=0, question="\u200b"), "question 0: expected a question of visible characters, got '\\u200b'"),
    ({"data": [{"paragraphs": [{"context": "a", "qas": ["q"]}]}]}, "question 1: expected an object with question, got"),
    ({"data": []}, "holds no questions"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_is_wrong_in_a_file_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.json", [CAT])
    (tmp_path / "x.json").write_text(json.dumps(content))
    for arguments, argument in ((("x.json",), "data"), (("good.json", "x.json"), "eval_data")):
        with pytest.raises(ValueError) as caught:
            load_squad(*arguments)
        between = " " if message.startswith(("is", "holds")) else ": "
        assert str(caught.value).startswith(f"load_squad: {argument}: 'x.json'{between}{message}")


def test_ids_that_are_integers(tmp_path):
    """As GermanQuAD has them; 0 is one."""
    for given, text in ((0, "0"), (7, "7"), (None, ""), ("", "")):
        path = write(tmp_path / "x.json", [CAT], id=given)
        assert load_squad(path, path)[0].rows[0].id == read_asked("op", "data", path).rows[0].id == text
        if text:
            assert read_answers("op", "data", path) == {text: ["cat"]}
    write(path, [CAT], id=None)
    with pytest.raises(ValueError, match=r"^op: data: '.*x\.json': question 1: expected a text as id, got None$"):
        read_answers("op", "data", path)
    content = asked([CAT], id=7)
    content["data"] += asked([CAT], id="7")["data"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^op: data: '.*x\.json': the question '7' is there more than once$"):
        read_answers("op", "data", path)


def test_files_of_other_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.json", [CAT], is_impossible=False, id="q7")
    content = good.read_bytes()
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + content.replace(b", ", b",\r\n"))
    (one,), (other,) = load_squad(good, good)[0].rows, load_squad(marked, marked)[0].rows
    assert one == other == Question("one dog", CONTEXT, (("cat", 8),), "q7")
    # a character that JSON writes in two halves
    write(tmp_path / "x.json", [CAT])
    smiling = (tmp_path / "x.json").read_text().replace("one dog", "one \\ud83d\\ude00")
    (tmp_path / "x.json").write_text(smiling)
    assert load_squad("x.json", "x.json")[0].rows[0].text == "one \U0001f600"
    for name, data, message in (
        ("empty", b"", " is empty"),
        ("mark", b"\xef\xbb\xbf", " is empty"),
        ("latin", content.replace(b"dog", b"d\xf6g"), ": line 1: expected UTF-8, got byte 0xf6 (invalid"),
        ("wide", content.decode().encode("utf-16"), ": expected UTF-8, got UTF-16"),
        ("nul", content.replace(b"{", b"\n{\0", 1), ": line 2 holds a NUL byte, which no text has"),
        ("torn", content[:-9], " is not of SQuAD's form: JSONDecodeError: "),
        ("deep", b"[" * 99999, " is not of SQuAD's form: RecursionError: "),
        ("long", b"9" * 9999, " is not of SQuAD's form: ValueError: "),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as caught:
            load_squad(name)
        assert str(caught.value).startswith(f"load_squad: data: {name!r}{message}")


def test_files(tmp_path):
    good = write(tmp_path / "good.json", [{"text": "cat", "answer_start": 8}])
    train, held_out = load_squad(good, good)
    assert len(train) == len(held_out) == 1 and train.fingerprint == held_out.fingerprint
    (tmp_path / "list.json").write_text("[]")
    for path, message in (
        (tmp_path / "nowhere.json", "no such file"),
        (tmp_path / "list.json", ": expected an object with data"),
        (write(tmp_path / "none.json", []), r"each question must have an answer \(SQuAD 1.1\), got none for 'one dog'"),
        (write(tmp_path / "moved.json", [{"text": "cat", "answer_start": 9}]), "no answer 'cat' stands at 9"),
    ):
        with pytest.raises(ValueError, match=f"^load_squad: data: .*{message}"):
            load_squad(path, good)
    with pytest.raises(ValueError, match="expected enough contexts to hold some out"):
        load_squad(good)


def test_answers_that_no_window_holds_are_counted_in_one_warning(tokenizer, caplog):
    long = "small dog with one saw on my drill"
    Windows(questions("cat", long, long, "the"), tokenizer, 10, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "test: 2 of 4 questions have an answer that no window holds whole: it is longer than max_length 10 and "
        "stride 2 leave room for"
    ]
    caplog.clear()
    Windows(questions("cat", long), tokenizer, 64, 2)
    assert not caplog.records


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["Paris", "Paris ", " Paris", " \n Paris  ", "in Paris ", "Paris  \n", "born  in"])
def test_no_token_after_an_answer_that_ends_with_white_space(answer, trim):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    context = "He was born  in \n Paris  \n in 1900."
    context = context if answer in context else "He was born in Paris in 1900."
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([context] * 3, trainer)
    model.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>"
    )
    asked = Questions("test", (Question("where", context, ((answer, context.index(answer)),)),))
    windows = Windows(asked, tokenizer, 64, 4)
    row, offsets = windows.rows[0], windows.offsets[0]
    start, end = row["start_positions"], row["end_positions"]
    assert start > 0
    assert context[offsets[start][0] : offsets[end][1]].strip() == answer.strip()
