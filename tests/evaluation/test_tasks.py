"""Tasks from files: what is read is what the file holds, and what cannot be used is named."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from distilbert_fast.evaluation.tasks import load_task

# What readers like to change: quotes, NA words, numbers, commas, spaces, other scripts.
ROWS = [
    ('it said "no, never', "1"),
    ("NA", "0"),
    ("null", "1"),
    ("nan and 1e5", "0"),
    ("007", "1"),
    ("größer, weiter", "0"),
    ("日本語", "1"),
    ("an 'apostrophe", "0"),
]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    columns = {"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]}
    if path.suffix == ".tsv":
        path.write_text("".join(f"{a}\t{b}\n" for a, b in [("sentence", "label"), *rows]), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        Dataset.from_dict(columns).to_csv(path)
    elif path.suffix == ".jsonl":
        Dataset.from_dict(columns).to_json(path)
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["plain.tsv", "a[1]*?.csv", "with space.jsonl", "x.PARQUET"])
def test_every_format_gives_the_sentences_as_written(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    task = load_task(data=path, eval_data=path)
    assert list(task.train["sentence"]) == [row[0] for row in ROWS]
    assert [task.label_names[i] for i in task.train["label"]] == [row[1] for row in ROWS]
    assert task.label_names == ("0", "1")
    assert task.name == f"{tmp_path.name}/{name}"
    assert task.overlap == len(ROWS)


def test_numeric_labels_are_in_numeric_order(tmp_path):
    path = write(tmp_path / "x.tsv", [(f"s{i}", str(i % 12)) for i in range(24)])
    assert load_task(data=path, eval_data=path).label_names == tuple(map(str, range(12)))


def test_classes_in_the_order_of_a_teacher(tmp_path):
    path = tmp_path / "train.tsv"
    rows = ["good food\tpositive", "bad food\tnegative", "good wine\tpositive", "food\tneutral"]
    path.write_text("\n".join(["sentence\tlabel", *rows]))
    task = load_task(data=path, eval_data=path)
    assert task.label_names == ("negative", "neutral", "positive")
    same = task.for_classes(["POSITIVE", "neutral", "Negative"], kept=True)
    assert same.label_names == ("positive", "neutral", "negative")
    for split in (same.train, same.eval):
        assert list(split["sentence"]) == [row.split("\t")[0] for row in rows] and split["label"] == [0, 2, 0, 1]
    for names, kept in (([], True), (["LABEL_0", "LABEL_1", "LABEL_2"], True), (["a", "b"], True), ("abc", False)):
        assert task.for_classes(names, kept) is task
    with pytest.raises(ValueError) as caught:
        task.for_classes(["bad", "neutral", "good"], kept=True)
    assert str(caught.value) == (
        "load_task: data: expected the teacher's labels 'bad', 'neutral', 'good', got 'negative', 'neutral', "
        "'positive'; rename them, or train the teacher on them (teacher_epochs)"
    )
    path.write_text("sentence\tlabel\nbad\t0\nneutral\t1\ngood\t2\n")
    numbers = load_task(data=path, eval_data=path)
    assert numbers.for_classes(["bad", "neutral", "good"], kept=True) is numbers


def test_held_out_part_is_fixed_and_keeps_equal_sentences_together(tmp_path):
    rows = [(f"sentence {i % 50}", str(i % 2)) for i in range(200)]
    task = load_task(data=write(tmp_path / "x.tsv", rows))
    assert task.overlap == 0
    assert 0 < len(task.eval) < 60
    assert len(task.train) + len(task.eval) == 200
    shuffled = [(a.upper(), b) for a, b in reversed(rows)]  # the same sentences, folded
    again = load_task(data=write(tmp_path / "y.tsv", shuffled))
    assert sorted(sentence.lower() for sentence in again.eval["sentence"]) == sorted(task.eval["sentence"])


def test_max_train_rows_is_a_fixed_part(tmp_path):
    path = write(tmp_path / "x.tsv", [(f"s{i}", str(i % 2)) for i in range(100)])
    whole = load_task(data=path, eval_data=path)
    part = load_task(data=path, eval_data=path, max_train_rows=30)
    larger = load_task(data=path, eval_data=path, max_train_rows=40)
    assert len(part.train) == 30
    assert set(part.train["sentence"]) < set(larger.train["sentence"]) < set(whole.train["sentence"])
    assert part.fingerprint == load_task(data=path, eval_data=path, max_train_rows=30).fingerprint
    assert len({part.fingerprint, larger.fingerprint, whole.fingerprint}) == 3
    assert load_task(data=path, eval_data=path, max_train_rows=1000).fingerprint == whole.fingerprint


def test_built_in_task_and_its_fingerprint():
    task = load_task()
    assert task.name == "stdlib-docs"
    assert task.overlap == 0
    assert len(task.train) > 4 * len(task.label_names)
    assert set(task.eval["label"]) == set(range(len(task.label_names)))
    assert task.fingerprint == load_task("stdlib-docs").fingerprint


BAD = {
    "empty.tsv": (b"", "load_task: data: 'empty.tsv' is empty"),
    "header.csv": (b"sentence,label\n", "load_task: data: 'header.csv' holds no rows"),
    "columns.csv": (
        b"text,label\na,1\n",
        "load_task: data: 'columns.csv' has no column sentence; its columns: text, label",
    ),
    "neither.jsonl": (
        b'{"text": "a", "y": 1}\n',
        "load_task: data: 'neither.jsonl' has no column sentence and no column label; its columns: text, y",
    ),
    "data.xlsx": (
        b"x",
        "load_task: data: expected a file ending in .tsv, .csv, .jsonl, .parquet, got 'data.xlsx'",
    ),
    "latin.csv": (
        b"sentence,label\n\xe9t\xe9,1\n",
        "load_task: data: cannot read 'latin.csv' as CSV: 'utf-8' codec can't decode byte 0xe9 in position 15: "
        "invalid continuation byte",
    ),
    "short.tsv": (b"sentence\tlabel\na\t1\nb\n", "load_task: data: 'short.tsv': row 2 has an empty label"),
    "blank.tsv": (b"sentence\tlabel\n \t1\n", "load_task: data: 'blank.tsv': row 1 has an empty sentence"),
    "one.csv": (
        b"sentence,label\na,1\nb,1\n",
        "load_task: data: expected at least 2 classes in the column label, got only '1'",
    ),
    "two.csv": (
        b"sentence,label\na,1\nA,2\n",
        "load_task: data: expected enough distinct sentences to hold some out for evaluation, got 1; give eval_data",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, monkeypatch, name):
    content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_task(data=name)


@pytest.mark.parametrize(
    ("name", "content", "start"),
    [
        ("x.parquet", b"PAR1 no more", "load_task: data: cannot read 'x.parquet' as Parquet: "),
        ("x.jsonl", b'{"sentence": "a", "la', "load_task: data: cannot read 'x.jsonl' as JSONL: "),
        ("x.tsv", b"sentence\tlabel\na\t1\nb\t2\tc\n", "load_task: data: cannot read 'x.tsv' as TSV: "),
        ("y.tsv", b"sentence\tlabel\na\t1\t9\nb\t2\t9\n", "load_task: data: cannot read 'y.tsv' as TSV: "),
    ],
)
def test_torn_files_are_named_with_the_readers_reason(tmp_path, monkeypatch, name, content, start):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(start)}.+") as error:
        load_task(data=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "no.csv"}, "load_task: data: no such file: 'no.csv'"),
        ({"data": "good.tsv", "eval_data": "no.csv"}, "load_task: eval_data: no such file: 'no.csv'"),
        ({"eval_data": "good.tsv"}, "load_task: eval_data: given without data"),
        ({"max_train_rows": 1}, "load_task: max_train_rows: expected at least 2, got 1"),
        (
            {"name": "good.tsv"},
            "load_task: name: expected 'stdlib-docs' or a hub id, got 'good.tsv'; give a file as data",
        ),
        (
            {"data": "good.tsv", "eval_data": "alien.tsv"},
            "load_task: the evaluation split has the label 'c', which the training split has not; its labels: 'a', 'b'",
        ),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(Path("good.tsv"), [("x", "a"), ("y", "b")])
    write(Path("alien.tsv"), [("x", "a"), ("y", "c")])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_task(**arguments)


def test_a_hub_id_that_cannot_be_had_is_named():
    with pytest.raises(ValueError, match=r"^load_task: name: 'nobody/nothing' is not the built-in task 'stdlib-docs'"):
        load_task("nobody/nothing")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub: `datasets.load_dataset` gives what the test puts here, and notes the request."""
    holds: dict[tuple[str, ...], DatasetDict] = {}

    def load_dataset(*parts):
        return holds[parts]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return holds


def test_hub_data_sets(hub):
    from datasets import ClassLabel

    rows = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["bad", "good"]))
    hub["nyu-mll/glue", "sst2"] = DatasetDict(train=rows, validation=rows.select([1, 0]), test=rows.select([2]))
    task = load_task("glue/sst2")
    assert task.label_names == ("bad", "good")
    assert list(task.eval["sentence"]) == ["b", "a"]
    hub["owner/set", "part"] = DatasetDict(
        train=rows.rename_column("sentence", "text"), test=rows.rename_column("sentence", "text")
    )
    assert list(load_task("owner/set/part").train["sentence"]) == ["a", "b", "c"]


def test_hub_data_sets_that_do_not_fit(hub):
    rows = Dataset.from_dict({"question": ["a"], "label": [0]})
    hub["owner/pairs",] = DatasetDict(train=rows)
    hub["owner/no-train",] = DatasetDict(test=rows)
    with pytest.raises(ValueError, match=r"no columns sentence \(or text\) and label; its columns: question, label$"):
        load_task("owner/pairs")
    with pytest.raises(ValueError, match=r"^load_task: name: 'owner/no-train' has no split train; its splits: test$"):
        load_task("owner/no-train")
