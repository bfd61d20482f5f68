"""Files of predictions: each form that is read, and what is refused by file and line."""

from __future__ import annotations

import re

import pytest

from distilbert_fast.data.predictions import (
    read_label_lists,
    read_labels,
    read_no_answer,
    read_squad_predictions,
    read_tagged,
)
from distilbert_fast.data.published import PUBLISHED_TASKS


def file(tmp_path, text, name="pred.tsv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def labels(tmp_path, text, ids="0 1 2", task="rte", name="pred.tsv"):
    known = PUBLISHED_TASKS.get(task)
    classes = known.class_names if known else ("no", "Yes")
    return read_labels("evaluate", file(tmp_path, text, name), ids.split(), known, classes)


YES, NO = "entailment", "not_entailment"


@pytest.mark.parametrize(
    ("text", "ids", "name"),
    [
        (f"index\tprediction\n1\t{NO}\n0\t{YES}\n2\t{YES}\n", "0 1 2", "RTE.tsv"),
        (f"index\tprediction\n0\t{YES}\n1\t{NO}\n2\t{YES}\n", "40 41 50", "RTE.tsv"),  # by place
        (f"index\tprediction\n50\t{YES}\n41\t{NO}\n40\t{YES}\n", "40 41 50", "RTE.tsv"),  # by id
        (f"index\tprediction\n0\t{NO}\n1\t{YES}\n2\t{YES}\n", "2 0 1", "RTE.tsv"),  # by id, though places fit too
        (f"{YES}\n{NO}\n{YES}\n", "0 1 2", "pred.txt"),
        (f"prediction\n{YES}\n{NO}\n{YES}\n", "0 1 2", "pred.csv"),
        ("0\n1\n0\n", "0 1 2", "pred.txt"),
        (
            f'{{"idx": 1, "label": "{NO}"}}\n{{"idx": 0, "label": "{YES}"}}\n{{"idx": 2, "label": 0}}\n',
            "0 1 2",
            "RTE.jsonl",
        ),
    ],
)
def test_labels(tmp_path, text, ids, name):
    assert labels(tmp_path, text, ids, name=name) == [YES, NO, YES]


def test_labels_of_other_tasks(tmp_path):
    assert labels(tmp_path, "index\tprediction\n0\tyes\n1\tno\n2\tYES\n", task="mine") == ["Yes", "no", "Yes"]
    assert labels(tmp_path, "4\n1\n2\n", task="ag_news") == ["Sci/Tech", "World", "Sports"]  # as its files count
    assert labels(tmp_path, "3\n0\n1\n", task="ag_news") == ["Sci/Tech", "World", "Sports"]
    with pytest.raises(
        ValueError, match=r": expected names of classes, or a 0 or 4 that tells which number is the fir"
    ):
        labels(tmp_path, "3\n1\n2\n", task="ag_news")
    assert labels(tmp_path, "index\tprediction\n0\t1.5\n1\t2\n2\t-1e-2\n", task="stsb") == [1.5, 2, -0.01]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "index\tprediction\n0\tentailment\n1\tentailment\n",
            " lacks 1 of 3 rows of data: its indices must be 0 to 2, got none for 2",
        ),
        (
            "index\tprediction\n0\t0\n1\t0\n2\t0\n3\t0\n",
            ": line 5: expected the index of a row of data, 0 to 2, got '3'",
        ),
        ("index\tprediction\n0\t0\n1\t0\n1\t0\n2\t0\n", ": the index '1' is there more than once"),
        ("index\tprediction\n0\t0\n1\t0\t0\n2\t0\n", ": line 3: expected 2 columns as in line 1, got 3"),
        (
            "index\tprediction\n0\t0\n1\t\n2\t0\n",
            ": line 3: expected a label of entailment, not_entailment or 0 to 1, got ''",
        ),
        (
            "index\tprediction\n0\t0\n1\tmaybe\n2\t0\n",
            ": line 3: expected a label of entailment, not_entailment or 0 to 1, got 'maybe'",
        ),
        (
            "0\t1\n1\t1\n",
            ": line 1: expected a line of names, index and prediction, or one prediction a line, got '0\\t1'",
        ),
        ("0\n1\n", ": expected a prediction for each of the 3 rows of data, got 2"),
        ("", " is empty"),
    ],
)
def test_labels_that_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"^evaluate: predictions: '.*pred.tsv'{re.escape(message)}"):
        labels(tmp_path, text)


def test_squad(tmp_path):
    path = file(tmp_path, '{"a": "x", "b": ""}')
    assert read_squad_predictions("evaluate", path) == {"a": "x", "b": ""}
    assert read_no_answer("evaluate", file(tmp_path, '{"a": 0.5, "b": 3}')) == {"a": 0.5, "b": 3}
    for text, message in (
        ('{"a": "x"', " is not a JSON object of answers by the questions' ids: Expecting"),
        ('["x"]', " is not a JSON object of answers by the questions' ids: expected an object, got ['x']"),
        (
            '{"a": "x", "a": "y"}',
            " is not a JSON object of answers by the questions' ids: the question 'a' is there more",
        ),
        ('{"a": null}', ": question 'a': expected a text, got None"),
        ('{"a": ["x"]}', ": question 'a': expected a text, got ['x']"),
        ('{"a": 3}', ": question 'a': expected a text, got 3"),
    ):
        with pytest.raises(ValueError, match=rf"^evaluate: predictions: '.*pred.tsv'{re.escape(message)}"):
            read_squad_predictions("evaluate", file(tmp_path, text))
    for value in ("true", '"0.5"', "1e999"):
        with pytest.raises(ValueError, match=r"^evaluate: na_prob: .*: question 'a': expected a finite number, got "):
            read_no_answer("evaluate", file(tmp_path, f'{{"a": {value}}}'))


def test_tags(tmp_path):
    gold = file(tmp_path, "John NN B-PER\nran VB O\n\nRome NN B-LOC\n", "gold.conll")
    found = file(tmp_path, "John I-PER\nran O\n \nRome O\n")
    true = [("B-PER", "O"), ("B-LOC",)]
    assert read_tagged("evaluate", gold, found) == (true, [("I-PER", "O"), ("O",)])
    assert read_tagged("evaluate", gold, file(tmp_path, "O\nO\n\n\nB-LOC")) == (true, [("O", "O"), ("B-LOC",)])
    rows = file(
        tmp_path,
        '{"tokens": ["John", "ran"], "tags": ["B-PER", "O"]}\n{"tokens": ["Rome"], "tags": ["O"]}\n',
        "x.jsonl",
    )
    assert read_tagged("evaluate", gold, rows) == (true, [("B-PER", "O"), ("O",)])
    both = file(tmp_path, "John NN B-PER I-PER\nran VB O O\n\nRome NN B-LOC O\n")
    assert read_tagged("evaluate", None, both) == (true, [("I-PER", "O"), ("O",)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"idx": 0, "labels": []}\n{"labels": ["a"]}\n', "line 2: expected an index as other lines have, got none"),
        (
            '{"labels": ["a", "b", "a"]}\n{"labels": []}\n',
            "line 1: expected labels that are there once each, got ['a', 'b', 'a']",
        ),
    ],
)
def test_lists_of_labels_that_are_refused(tmp_path, text, message):
    path = file(tmp_path, text, "pred.jsonl")
    with pytest.raises(
        ValueError, match=rf"^evaluate: predictions: {re.escape(repr(str(path)))}: {re.escape(message)}$"
    ):
        read_label_lists("evaluate", path, ["0", "1"])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            "[0, 1] [1, 0]",
            "line 1: expected the names of the labels that the row has, got ['0', '1'], perhaps a 1 or 0",
        ),
        ('[] ["old\u200b"]', "line 2: expected the label 'old' as in data, got 'old\\u200b'"),
        ('["tool", "Old"] []', "line 1: expected the label 'old' as in data, got 'Old'"),
    ],
)
def test_lists_of_labels_that_data_has_otherwise(tmp_path, lists, message):
    path = file(tmp_path, "".join(f'{{"labels": {one}}}\n' for one in re.findall(r"\[.*?\]", lists)), "pred.jsonl")
    with pytest.raises(
        ValueError, match=rf"^evaluate: predictions: {re.escape(repr(str(path)))}: {re.escape(message)}"
    ):
        read_label_lists("evaluate", path, ["0", "1"], known={"old", "tool"})


def test_lists_of_labels_that_data_lacks_are_counted(tmp_path, caplog):
    path = file(tmp_path, '{"labels": ["old", "new"]}\n{"labels": ["new", "x"]}\n', "pred.jsonl")
    found = read_label_lists("evaluate", path, ["0", "1"], known={"old", "tool"})
    assert [row.labels for row in found] == [("old", "new"), ("new", "x")]
    assert caplog.messages == [
        f"evaluate: predictions: {str(path)!r}: 3 labels are none of data's and count as wrong: 'new', 'x'"
    ]
    caplog.clear()
    (tmp_path / "pred.jsonl").write_text('{"labels": [0, 1]}\n{"labels": [1, 0]}\n')
    assert read_label_lists("evaluate", path, ["0", "1"], known={"0", "1"})[0].labels == ("0", "1")
    assert not caplog.messages


LEFT_OUT = "evaluate: predictions: {!r}: {} of {} predictions are of rows without a label and are left out"


@pytest.mark.parametrize("named", ["", "index\tprediction\n"])
def test_rows_without_a_label_may_have_predictions(tmp_path, caplog, named):
    every = [f"{at}\t{value}" if named else value for at, value in enumerate("01-0")]  # the third has the label "-"
    path = file(tmp_path, named + "\n".join(every))
    classes = PUBLISHED_TASKS["mnli"].class_names
    for file_ids in ("0 1 2 3", "7 5 6 8") if named else ("7 5 6 8",):  # by index, by place
        ids = [index for at, index in enumerate(file_ids.split()) if at != 2]
        caplog.clear()
        found = read_labels("evaluate", path, ids, PUBLISHED_TASKS["mnli"], classes, file_ids.split())
        assert found == ["entailment", "neutral", "entailment"]
        assert caplog.messages == [LEFT_OUT.format(str(path), 1, 4)]
        caplog.clear()
        path_of_kept = file(tmp_path, named + "\n".join(every[:2] + every[3:]), "kept.tsv")
        assert read_labels("evaluate", path_of_kept, ids, PUBLISHED_TASKS["mnli"], classes, file_ids.split()) == found
        assert not caplog.messages
    fewer = file(tmp_path, named + "\n".join(every[:2]))
    message = "lacks 3 of 3 rows of data" if named else "expected a prediction for each of the 3 rows of data, or of "
    with pytest.raises(ValueError, match=message):
        read_labels("evaluate", fewer, ids, PUBLISHED_TASKS["mnli"], classes, file_ids.split())


@pytest.mark.parametrize(
    ("gold", "found", "message"),
    [
        ("Rome B-LOC\nis O\n", "Rome b-loc\nis O\n", "line 1: expected the tag 'B-LOC' as in data, got 'b-loc'"),
        ("Rome B-LOC\nis O\n", "Rome O\nis I-Loc\n", "line 2: expected the type 'LOC' as in data, got 'I-Loc'"),
        ("Rome B-LOC\nis O\n", "Rome B-LOC\nis o\n", "line 2: expected the tag 'O' as in data, got 'o'"),
        (None, "Rome B-LOC B-LOC\nis O I-loc\n", "line 2: expected the type 'LOC' as in data, got 'I-loc'"),
        (None, "old ADJ ADJ\ncat NOUN noun\n", "line 2: expected the tag 'NOUN' as in data, got 'noun'"),
    ],
)
def test_tags_of_another_case_are_refused(tmp_path, gold, found, message):
    true = None if gold is None else file(tmp_path, gold, "gold.conll")
    with pytest.raises(ValueError, match=rf"^evaluate: predictions: '.*pred.tsv': {message}$"):
        read_tagged("evaluate", true, file(tmp_path, found))


@pytest.mark.parametrize(
    ("gold", "text", "message"),
    [
        ("Rome B-LOC\n", "B-LOC\u00a0\n", "line 1: expected a tag of visible characters, got 'B-LOC\\xa0'"),
        ("Rome B-LOC\nis O\n", "Rome B-LOC\u200b\nis O\n", "line 1: expected a tag of visible characters, got 'B-"),
        ("Rome B-LOC\nis O\n", "B-LOC\nI-\n", "line 2: expected a tag with a type, such as B-PER, got 'I-'"),
        (
            None,
            "is O O\n\nRome B-LOC\u200b B-LOC\n",
            "line 3: expected a tag of visible characters, got 'B-",
        ),
    ],
)
def test_tags_that_look_like_others_are_refused(tmp_path, gold, text, message):
    true = None if gold is None else file(tmp_path, gold, "gold.conll")
    with pytest.raises(ValueError, match=rf"^evaluate: predictions: '.*pred.tsv': {re.escape(message)}"):
        read_tagged("evaluate", true, file(tmp_path, text))


def test_words_that_nobody_sees_are_scored(tmp_path):
    """No tokenizer stands between two files."""
    path = file(tmp_path, "\u200b B-LOC\nis O\n")
    assert read_tagged("evaluate", path, path) == ([("B-LOC", "O")], [("B-LOC", "O")])


def test_tables_hold_one_tag_of_each_word(tmp_path):
    path = file(tmp_path, '{"tokens": ["Rome"], "tags": ["O"]}\n', "pred.jsonl")
    with pytest.raises(ValueError, match=r"in the last two columns, or --data, got tokens and one tag of each$"):
        read_tagged("evaluate", None, path)


def test_tags_of_two_cases_in_data_are_told_apart(tmp_path):
    both = file(tmp_path, "x B-PER B-per\ny B-per B-per\n")
    assert read_tagged("evaluate", None, both) == ([("B-PER", "B-per")], [("B-per", "B-per")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("John O\nran O\n\nParis O\n", ": line 4: expected the word 'Rome' as in data, got 'Paris'"),
        ("John O\n\nRome O\n", ": line 1: expected a sentence of 2 words as at line 1 of data, got 1"),
        ("O\nO\n", ": expected 2 sentences as in data, got 1"),
        ("John O\nran\n\nRome O\n", ": line 2: expected 2 columns as in the lines before, got 'ran'"),
    ],
)
def test_tags_that_are_refused(tmp_path, text, message):
    gold = file(tmp_path, "John B-PER\nran O\n\nRome B-LOC\n", "gold.conll")
    with pytest.raises(ValueError, match=rf"^evaluate: predictions: '.*pred.tsv'{re.escape(message)}"):
        read_tagged("evaluate", gold, file(tmp_path, text))
    with pytest.raises(
        ValueError, match=r"expected the true and the predicted tag in the last two columns, or --data, got"
    ):
        read_tagged("evaluate", None, file(tmp_path, "O\nO\n"))
