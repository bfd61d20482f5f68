"""Files of benchmarks with the columns, labels and quirks that they are published with, and damaged ones."""

from __future__ import annotations

import re

import pytest

from distilbert_fast.data.published import PUBLISHED_TASKS, published, read_published
from distilbert_fast.data.tasks import load_task, read_split

MNLI = "index\tpromptID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"


def read(tmp_path, task, text, name="dev.tsv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_published("evaluate", "data", path, PUBLISHED_TASKS[task])


@pytest.mark.parametrize(
    ("task", "name", "text", "rows"),
    [
        (
            "cola",
            "dev.tsv",
            'gj04\t1\t\tHe said "so.\ngj04\t0\t*\tHim go.\n',
            [('He said "so.', "acceptable"), ("Him go.", "unacceptable")],
        ),
        (
            "sst2",
            "dev.tsv",
            'sentence\tlabel\n"a fine film \t1\nbad\t0\n',
            [('"a fine film ', "positive"), ("bad", "negative")],
        ),
        (
            "mrpc",
            "dev.tsv",
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe left .\tHe went .\r\n",
            [("He left .", "He went .", "equivalent")],
        ),
        ("stsb", "dev.tsv", f"{STSB}\n0\tx\ty\t2012\t1\tnone\tnone\ta\tb\t2.500\n", [("a", "b", 2.5)]),
        (
            "stsb",
            "sts-dev.csv",
            'main\tMSRvid\t2012test\t0000\t5.000\t"A man\tA man\nmain\tMSRvid\t2012\t1\t0.4\tb"\tc\tx\ty\n',
            [('"A man', "A man", 5.0), ('b"', "c", 0.4)],
        ),
        (
            "qqp",
            "dev.tsv",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\t\t0\n",
            [("Why?", "", "not_duplicate")],
        ),
        ("mnli", "dev.tsv", f"{MNLI}\n0\t1\tx\t(y)\tP\tH\tneutral\tentailment\n", [("P", "H", "entailment")]),
        (
            "qnli",
            "dev.tsv",
            "index\tquestion\tsentence\tlabel\n0\tQ\tS\tnot_entailment\n",
            [("Q", "S", "not_entailment")],
        ),
        ("wnli", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n40\ta\tb\t1\n", [("a", "b", "entailment")]),
        (
            "ax",
            "diagnostic-full.tsv",
            "Lexical Semantics\tLogic\tPremise\tHypothesis\tLabel\n\tNegation\tp\th\tcontradiction\n",
            [("p", "h", "contradiction")],
        ),
        (
            "rte",
            "val.jsonl",
            '{"premise": "p", "hypothesis": "h", "label": "entailment", "idx": 3}\n',
            [("p", "h", "entailment")],
        ),
        ("boolq", "val.jsonl", '{"question": "q", "passage": "p", "label": true, "idx": 0}\n', [("q", "p", "true")]),
        (
            "imdb",
            "test.csv",
            'label,text,is_valid\nnegative,"Bad, ""so""\nbad.",True\npos,ok,False\n',
            [('Bad, "so"\nbad.', "neg"), ("ok", "pos")],
        ),
        (
            "ag_news",
            "test.csv",
            '"3","Wall St.","Down, \\$5"\n"4","Title","Text"\n',
            [("Wall St. Down, \\$5", "Business"), ("Title Text", "Sci/Tech")],
        ),
        ("ag_news", "train.tsv", "Text #39;s\tSci/Tech\n", [("Text #39;s", "Sci/Tech")]),
        (
            "ag_news",
            "hub.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label": 3}\n',
            [("a", "World"), ("b", "Sci/Tech")],
        ),
    ],
)
def test_what_is_published_is_read_as_it_is(tmp_path, task, name, text, rows):
    split = read(tmp_path, task, text, name)
    assert [(*texts, label) for texts, label in split.rows] == rows
    assert split.class_names == (PUBLISHED_TASKS[task].class_names or None)


def test_rows_without_label_and_broken_ones_are_counted(tmp_path, caplog):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    split = read(tmp_path, "qqp", f"{head}\n1\t2\t3\ta\tb\t1\n4\t5\t6\tbroken\n7\t8\t9\tc\td\t0\n")
    assert [texts for texts, _ in split.rows] == [("a", "b"), ("c", "d")]
    assert split.ids == ("0", "2")
    assert [record.getMessage() for record in caplog.records] == [
        f"evaluate: data: {str(tmp_path / 'dev.tsv')!r}: 1 of 3 rows with too few columns were left out"
    ]
    caplog.clear()
    split = read(tmp_path, "mnli", f"{MNLI}\n0\t1\tx\ty\tP\tH\tneutral\t-\n1\t1\tx\ty\tP\tH\tneutral\tneutral\n")
    assert split.rows == [(("P", "H"), "neutral")] and split.ids == ("1",) and split.file_ids == ("0", "1")
    assert "1 of 2 rows without a label were left out" in caplog.text


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (
            "cola",
            "gj04\t1\tText.\n",
            "line 1: expected columns sentence and label as cola has, or 4 columns without names, got",
        ),
        ("cola", "gj04\t1\t\tOne.\ngj04\t1\tTwo.\n", "line 2: expected 4 columns separated by tabs, got 3"),
        ("cola", "gj04\t2\t\tOne.\n", "line 1: expected a label of unacceptable, acceptable or 0 to 1, got '2'"),
        ("cola", "gj04\t\t\tOne.\n", "line 1 has an empty label"),
        ("sst2", "sentence\tlabel\nfine\n", "line 2: expected 2 columns separated by tabs, got 1"),
        ("sst2", "sentence\tlabel\na\tb\t1\n", "line 2: expected 2 columns separated by tabs, got 3"),
        ("sst2", "sentence\tlabel\n \t1\n", "line 2 has an empty sentence"),
        (
            "sst2",
            "index\tsentence\n0\tfine\n",
            "line 1: expected columns sentence and label as sst2 has, got 'index\\tsentence'",
        ),
        ("sst2", "sentence\tlabel\tlabel\nfine\t1\t1\n", "line 1: the column 'label' is there more than once"),
        ("sst2", b"sentence\tlabel\nfine\xff\t1\n", "line 2: expected UTF-8, got byte 0xff (invalid start byte)"),
        ("sst2", "sentence\tlabel\nfi\0ne\t1\n", "line 2 holds a NUL byte, which no text has"),
        ("sst2", "sentence\tlabel\n", " holds no rows with a label"),
        ("sst2", "", " is empty"),
        ("stsb", f"{STSB}\n0\tx\ty\t2012\t1\tnone\tnone\ta\tb\tnan\n", "line 2: expected a number as label, got 'nan'"),
        (
            "stsb",
            "a\tb\tc\td\t5.0\ts1\n",
            "line 1: expected columns sentence1 and sentence2 and score as stsb has, or 7 or 8 or 9",
        ),
        (
            "mnli",
            f"{MNLI}\n0\t1\tx\t(y)\tP\tH\tneutral\tmaybe\n",
            "line 2: expected a label of entailment, neutral, contradiction or 0 to 2",
        ),
        ("imdb", 'label,text\nneg,"open\n', ": cannot be read as CSV: a quote is open at the end of the file"),
        ("imdb", "label,text\nneg,a,b\n", "line 2: expected 2 columns separated by commas, got 3"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path, task, text, message):
    name = "dev.csv" if task == "imdb" else "dev.tsv"
    with pytest.raises(ValueError, match=rf"^evaluate: data: '.*{name}':? ?{re.escape(message)}"):
        read(tmp_path, task, text, name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: Expecting property name"),
        ('["p"]', "line 1: expected an object, got ['p']"),
        (
            '{"premise": "p", "label": "entailment"}',
            "line 1: expected an object with columns sentence1 and sentence2 and",
        ),
        ('{"premise": 1.5, "hypothesis": ["h"], "label": 0}', "line 1: expected a text as sentence2, got ['h']"),
        ('{"premise": "p", "hypothesis": "h", "label": null}', "line 1 has an empty label"),
        (
            '{"premise": "p", "hypothesis": "h", "label": ["entailment"]}',
            "line 1: expected one label, a text or a number, got",
        ),
        ('{"premise": "p", "premise": "q"}', "line 1: the column 'premise' is there more than once"),
    ],
)
def test_damaged_jsonl_is_refused_by_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"^evaluate: data: '.*val.jsonl': {re.escape(message)}"):
        read(tmp_path, "rte", line + "\n", "val.jsonl")


def test_names_of_tasks():
    assert published("glue/stsb") is published("STS-B") is PUBLISHED_TASKS["stsb"]
    assert published("super_glue/cb") is PUBLISHED_TASKS["cb"] and published("mine") is None and published(None) is None


def test_a_published_file_can_be_trained_on(tmp_path):
    (tmp_path / "train.tsv").write_text("".join(f"gj04\t{at % 2}\t\tSentence {at}.\n" for at in range(40)))
    task = load_task("cola", tmp_path / "train.tsv")
    assert task.label_names == ("unacceptable", "acceptable") and len(task.train) + len(task.eval) == 40
    (tmp_path / "sts.csv").write_text("".join(f"m\tx\ty\t{at}\t{at % 6}.0\ta {at}\tb {at}\n" for at in range(40)))
    assert load_task("stsb", tmp_path / "sts.csv").regression


def test_parquet_with_the_columns_of_a_task(tmp_path):
    import pandas

    pandas.DataFrame({"sentence": ["a", "b"], "label": [1, 0]}).to_parquet(tmp_path / "dev.parquet")
    split = read_split("evaluate", "data", tmp_path / "dev.parquet", "sst2")
    assert split.rows == [(("a",), "positive"), (("b",), "negative")] and split.class_names == ("negative", "positive")


def test_the_folders_of_imdb(tmp_path):
    for name, text in (("neg/0_2.txt", "Bad."), ("pos/0_10.txt", "Fine.<br />"), ("neg/1_1.txt", "Worse.")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    split = read_split("evaluate", "data", tmp_path, "imdb")
    assert split.rows == [(("Bad.",), "neg"), (("Worse.",), "neg"), (("Fine.<br />",), "pos")]
    assert split.ids[0] == "neg/0_2.txt"
    (tmp_path / "pos/0_10.txt").unlink()
    with pytest.raises(ValueError, match=r"^evaluate: data: '.*': expected a folder pos of texts"):
        read_split("evaluate", "data", tmp_path, "imdb")


def test_files_of_ours_may_call_their_sentences_text(tmp_path):
    (tmp_path / "mine.csv").write_text("text,label\na cat,yes\na dog,no\n")
    split = read_split("evaluate", "data", tmp_path / "mine.csv")
    assert split.rows == [(("a cat",), "yes"), (("a dog",), "no")] and split.columns == ("sentence",)
