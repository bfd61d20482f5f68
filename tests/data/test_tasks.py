"""Tasks from files: what is read is what the file holds, and what cannot be used is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from distilbert_fast.data.tasks import PAIR_COLUMNS, load_task

# What readers like to change: quotes, NA words, numbers, dates, commas, spaces, other scripts.
ROWS = [
    ('it said "no, never', "1"),
    ("NA", "0"),
    ("null", "1"),
    ("nan and 1e5", "0"),
    ("007", "1"),
    ("größer, weiter", "0"),
    ("日本語", "1"),
    ("an 'apostrophe", "0"),
    (" spaces around\u00a0 ", "1"),
    ("C:\\new\\table", "0"),
    ("# no comment", "1"),
    ("\u2028 and \x85 and \x1c end no line", "0"),
    ("e\u0301 is not \u00e9", "1"),
    ("\U0001f600", "0"),
]
# Columns in which every cell looks like a number, a date, or nothing.
LOOKS = {
    "dates": ["2020-01-01", "2020-01-02", "2020-12-31"],
    "times": ["2020-01-01 00:00:00", "2020-01-01T12:00:00Z", "12:30"],
    "zeros": ["007", "000", "0123"],
    "numbers": ["1e5", "1E-3", "2e400"],
    "points": ["1.0", "1.50", ".5"],
    "long": ["12345678901234567890123", "0.10000000000000000001", "9007199254740993"],
    "truth": ["true", "false", "True"],
    "missing": ["NA", "nan", "null"],
    "more missing": ["None", "N/A", "-"],
    "signs": ["+1", "1_000", "0x10"],
}


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


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("looks", LOOKS)
def test_texts_and_classes_stay_as_written_whatever_they_look_like(tmp_path, looks, suffix):
    cells = LOOKS[looks]
    path = write(tmp_path / f"text{suffix}", list(zip(cells, "aba", strict=True)))
    task = load_task(data=path, eval_data=path)
    assert list(task.train["sentence"]) == list(task.eval["sentence"]) == cells
    if any("." in cell for cell in cells):
        return  # fractions ask whether a regression is meant
    path = write(tmp_path / f"label{suffix}", list(zip("abc", cells, strict=True)))
    task = load_task(data=path, eval_data=path)
    assert [task.label_names[at] for at in task.train["label"]] == cells


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_line_ends_and_marks(tmp_path, suffix, mark, last, end):
    rows = [["sentence", "label"], ["é, b" if suffix == ".tsv" else "é b", "1"], ["c", "0"]]
    lines = [("\t" if suffix == ".tsv" else ",").join(row) for row in rows]
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(rows[0], row, strict=True)), ensure_ascii=False) for row in rows[1:]]
    path = tmp_path / f"x{suffix}"
    path.write_bytes((mark + end.join(lines) + end * last).encode())
    task = load_task(data=path, eval_data=path)
    assert list(task.train["sentence"]) == [rows[1][0], "c"] and task.train["label"] == [1, 0]


def test_line_ends_inside_of_quotes_are_kept(tmp_path):
    texts = ["a\r\nb", "a\rb", "a\nb", 'a ""quote""']
    (tmp_path / "x.csv").write_bytes(
        b"sentence,label\r\n" + b"".join(f'"{text}",{at % 2}\r\n'.encode() for at, text in enumerate(texts))
    )
    task = load_task(data=tmp_path / "x.csv", eval_data=tmp_path / "x.csv")
    assert list(task.train["sentence"]) == [*texts[:3], 'a "quote"']


@pytest.mark.parametrize("size", [1 << 20, (2 << 20) + 1, 9 << 20])
def test_long_rows(tmp_path, size):
    long = "ab " * (size // 3)
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"sentence": text, "label": text[:1]}) + "\n" for text in ("b", long, "c", long))
    )
    path.write_text(path.read_text().replace('"c"', '"b"'))
    assert list(load_task(data=path, eval_data=path).train["sentence"]) == ["b", long, "b", long]


def test_numbers_and_truths_of_jsonl_stay_as_written(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = ['{"sentence": 1.50, "label": true}', '{"sentence": 12345678901234567890, "label": false}']
    path.write_text("\n\n".join([*rows, '{"more": [1], "label": true, "sentence": "x"}']))
    task = load_task(data=path, eval_data=path)
    assert list(task.train["sentence"]) == ["1.50", "12345678901234567890", "x"]
    assert task.label_names == ("false", "true") and task.train["label"] == [1, 0, 1]


def test_parquet_of_datasets_has_names_and_rows_without_label(tmp_path, monkeypatch):
    """The same as the hub's: names in their order, -1 for none."""
    from datasets import ClassLabel

    columns = {"sentence": ["a", "b", "c", "d"], "label": [0, 1, -1, 1]}
    rows = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["pos", "neg", "other"]))
    rows.to_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    task, hub = load_task(data=tmp_path / "x.parquet", eval_data=tmp_path / "x.parquet"), load_task("owner/set")
    assert task.label_names == hub.label_names == ("pos", "neg")
    assert list(task.train["sentence"]) == ["a", "b", "d"] and task.train["label"] == [0, 1, 1]
    assert task.fingerprint == hub.fingerprint
    rows.select([2]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet' has no row with a label$"):
        load_task(data=tmp_path / "none.parquet")
    wrong = pyarrow.parquet.read_table(tmp_path / "x.parquet").set_column(1, "label", pyarrow.array([0, 1, -1, 7]))
    wrong = wrong.replace_schema_metadata(pyarrow.parquet.read_schema(tmp_path / "x.parquet").metadata)
    pyarrow.parquet.write_table(wrong, tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match=r"wrong.parquet': row 4: expected a label of 0 to 2, got 7$"):
        load_task(data=tmp_path / "wrong.parquet")


SECRET = "which stands for no label in data sets of the hub; leave the row out, or give its class another name"
VECTORS = "row 1: expected the names of the labels that the row has, got {}, perhaps a 1 or 0 for each label"
ODD_ROWS = {
    "list": ([["x", "y"], "x"], "row 1: expected one label, a text or a number, got ['x', 'y']"),
    "one": (["x", ["y"]], "row 2: expected one label, a text or a number, got ['y']"),
    "none": (["x", []], "row 2: expected one label, a text or a number, got []"),
    "hot": ([[1, 0, 1], [0]], "row 1: expected a list of the labels that the row has, each once, got ['1', '0', '1']"),
    "vectors": ([[0, 1], [1, 0]], VECTORS.format("['0', '1']")),
    "floats": ([[0.0, 1.0, 0.0], [1, 0, 1]], VECTORS.format("['0.0', '1.0', '0.0']")),
    "truths": ([[True, False], [False, True]], VECTORS.format("[True, False]")),
    "texts of them": ([["0", "1"], ["1", "0"]], VECTORS.format("['0', '1']")),
    "one of them": ([["1"], ["0"]], VECTORS.format("['1']")),
    "signs": ([["1", "x"], ["x", "-1"]], f"row 2 has the label -1, {SECRET}"),
    "object": ([{"x": 1}, "y"], "row 1: expected one label, a text or a number, got {'x': '1'}"),
    "dumped": (["x", '["x", "y"]'], 'row 2: expected one label, a text or a number, got \'["x", "y"]\''),
    "printed": (["['x']", "y"], "row 1: expected one label, a text or a number, got \"['x']\""),
    "coded": (["[1, 0]", "y"], "row 1: expected one label, a text or a number, got '[1, 0]'"),
    "null": (["x", None], "row 2 has an empty label"),
    "blank": (["x", " \n"], "row 2 has an empty label"),
    "secret": ([0, 1, -1], f"row 3 has the label -1, {SECRET}"),
    "text": (["0", "-1"], f"row 2 has the label -1, {SECRET}"),
    "float": ([-1.0, 1.0], f"row 1 has the label -1.0, {SECRET}"),
    "half": (["x\ud83d", "y"], "row 1: expected a text as label, got the lone surrogate '\\ud83d' at character 1"),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_labels_that_are_not_one_class(tmp_path, monkeypatch, name):
    labels, message = ODD_ROWS[name]
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"sentence": f"text {at}", "label": label}) for at, label in enumerate(labels)]
    Path("x.jsonl").write_text("\n".join(lines))
    Path("good.jsonl").write_text('{"sentence": "a", "label": "x"}\n{"sentence": "b", "label": "y"}\n')
    for arguments, argument in (
        ({"data": "x.jsonl"}, "data"),
        ({"data": "good.jsonl", "eval_data": "x.jsonl"}, "eval_data"),
    ):
        with pytest.raises(ValueError) as caught:
            load_task(**arguments)
        assert str(caught.value) == f"load_task: {argument}: 'x.jsonl': {message}"


@pytest.mark.parametrize("number", [int, float, bool])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_vectors_of_parquet_are_no_lists_of_labels(tmp_path, monkeypatch, width, number):
    monkeypatch.chdir(tmp_path)
    rows = [[number(at == hot) for at in range(width)] for hot in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "labels": rows}), "x.parquet")
    with pytest.raises(ValueError) as caught:
        load_task(data="x.parquet", eval_data="x.parquet")
    assert str(caught.value) == f"load_task: data: 'x.parquet': {VECTORS.format(rows[0])}"


def test_zeros_and_ones_that_are_labels(tmp_path):
    """Lists of several lengths, and numbers of classes with names, cannot be vectors."""
    from datasets import ClassLabel, Features, Value

    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": [0, 1]}\n{"text": "b", "label": [1]}\n{"text": "c", "label": []}\n')
    task = load_task(data=path, eval_data=path)
    assert task.label_names == ("0", "1") and task.train["label"] == [[1, 1], [0, 1], [0, 0]]
    path = tmp_path / "x.parquet"
    columns = {"text": ["a", "b", "c"], "label": [[0, 1], [1, 0], [0, 1]]}
    for names in (["old", "new", "tool"], ["old", "new"]):
        features = Features({"text": Value("string"), "label": [ClassLabel(names=names)]})
        Dataset.from_dict(columns, features=features).to_parquet(path)
        if len(names) == 3:
            assert load_task(data=path, eval_data=path).train["label"] == [[1, 1]] * 3
        else:
            with pytest.raises(ValueError, match=re.escape(f"x.parquet': {VECTORS.format('[0, 1]')}")):
                load_task(data=path, eval_data=path)
    columns["label"][1] = [None]
    Dataset.from_dict(columns, features=features).to_parquet(path)
    with pytest.raises(ValueError, match=r"x\.parquet': row 2: expected a label of 0 to 1, got None$"):
        load_task(data=path, eval_data=path)


@pytest.mark.parametrize(("one", "other"), [("pos", "pos\u200b"), ("so so", "so\u00a0so"), ("\u2764", "\u2764\ufe0f")])
def test_classes_that_look_the_same(tmp_path, one, other):
    path = write(tmp_path / "x.tsv", [("a", one), ("b", other), ("c", "neg")])
    with pytest.raises(ValueError) as caught:
        load_task(data=path, eval_data=path)
    assert str(caught.value) == f"load_task: data: expected one way to write a class, got {one!a} and {other!a}"


@pytest.mark.parametrize("cell", [["a", "b"], {"a": 1}, "half \ud800", None, " "])
def test_texts_that_are_none(tmp_path, monkeypatch, cell):
    monkeypatch.chdir(tmp_path)
    rows = [{"premise": "a", "hypothesis": "b", "label": 0}, {"premise": "a", "hypothesis": cell, "label": 1}]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = {str: ": expected a text as hypothesis, got the lone", list: ": expected a text as hypothesis, got ['a'"}
    expected |= {dict: ": expected a text as hypothesis, got {'a'", type(None): " has an empty hypothesis"}
    message = " has an empty hypothesis" if cell == " " else expected[type(cell)]
    with pytest.raises(ValueError, match=f"^load_task: data: 'x.jsonl': row 2{re.escape(message)}"):
        load_task(data="x.jsonl")


def test_columns_of_parquet_that_hold_no_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    day = pyarrow.array([0, 1], pyarrow.date32())
    for column, got in (
        (pyarrow.array([b"a", b"b"]), "b'a'"),
        (day, "datetime.date(1970, 1, 1)"),
        (day.cast(pyarrow.timestamp("s")), "datetime.datetime(1970, 1, 1, 0, 0)"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"sentence": column, "label": [0, 1]}), "x.parquet")
        with pytest.raises(ValueError, match=f": row 1: expected a text as sentence, got {re.escape(got)}$"):
            load_task(data="x.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "label": column}), "y.parquet")
        with pytest.raises(ValueError, match=f": row 1: expected one label, a text or a number, got {re.escape(got)}$"):
            load_task(data="y.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "label": [0.0, float("nan")]}), "z.parquet")
    with pytest.raises(ValueError, match=r"z\.parquet': row 2 has an empty label$"):
        load_task(data="z.parquet")


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
    assert task.name == "stdlib-docs" and task.columns == ("sentence",)
    assert task.overlap == 0
    assert len(task.train) > 4 * len(task.label_names)
    assert set(task.eval["label"]) == set(range(len(task.label_names)))
    assert task.fingerprint == load_task("stdlib-docs").fingerprint


def test_the_fingerprint_of_single_sentences_stays_as_it_was(tmp_path):
    """Output directories that were begun before there were pairs go on."""
    path = write(tmp_path / "x.tsv", ROWS)
    digest = hashlib.sha256(b"('0', '1')")
    for _ in range(2):
        for sentence, label in ROWS:
            digest.update(f"\0{label}\0{sentence}".encode())
        digest.update(b"\1")
    assert load_task(data=path, eval_data=path).fingerprint == digest.hexdigest()


def pairs(path: Path, rows: list[tuple[str, str, str]], columns: tuple[str, str] = PAIR_COLUMNS[0]) -> Path:
    lines = [(*columns, "label"), *rows]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


PAIRED = [("a cat", "the cat", "same"), ("a cat", "a dog", "other"), ("a dog", "a cat", "other"), ("b", "b", "same")]


@pytest.mark.parametrize("columns", PAIR_COLUMNS)
def test_pairs_by_the_names_that_their_columns_have(tmp_path, columns):
    path = pairs(tmp_path / "x.tsv", PAIRED, columns)
    task = load_task(data=path, eval_data=path)
    assert task.columns == columns and task.train.column_names == [*columns, "label"]
    assert task.texts(task.eval) == [row[:2] for row in PAIRED]
    assert [task.label_names[i] for i in task.train["label"]] == [row[2] for row in PAIRED]
    assert task.overlap == 4
    turned = task.for_classes(["same", "OTHER"], kept=True)
    assert turned.texts(turned.train) == task.texts(task.train) and turned.columns == columns
    assert turned.label_names == ("same", "other") and turned.train["label"] == [0, 1, 1, 0]


def test_a_pair_is_more_than_its_sentences(tmp_path):
    """Its order and where one sentence ends count; what is held out is a pair."""
    one = load_task(data=pairs(tmp_path / "x.tsv", PAIRED), eval_data=pairs(tmp_path / "dev.tsv", PAIRED[:2]))
    other = [("a cat", "the cat", "same"), ("a dog", "a cat", "other"), ("a cat", "a dog", "other"), ("b", "b", "same")]
    dev = pairs(tmp_path / "other.tsv", [("a cat the", "cat", "same"), ("cat a", "a dog", "other")])
    two = load_task(data=pairs(tmp_path / "y.tsv", other), eval_data=dev)
    assert (one.overlap, two.overlap) == (2, 0)
    assert one.fingerprint != two.fingerprint
    rows = [(f"premise {i % 20}", f"hypothesis {i % 60}", str(i % 2)) for i in range(180)]
    held = load_task(data=pairs(tmp_path / "z.tsv", rows))
    assert held.overlap == 0 and 0 < len(held.eval) < 60 and len(held.train) + len(held.eval) == 180
    part = load_task(data=tmp_path / "z.tsv", max_train_rows=50)
    assert set(part.texts(part.train)) < set(held.texts(held.train)) and part.eval["label"] == held.eval["label"]


def test_numbers(tmp_path):
    rows = [(f"s{i}", str(i % 7 / 4)) for i in range(200)]
    path = write(tmp_path / "x.csv", rows)
    task = load_task(data=path, eval_data=path, regression=True)
    assert task.regression and task.label_names == ()
    assert task.train["label"] == [float(label) for _, label in rows]
    assert task.for_classes(["LABEL_0"], kept=True) is task
    held = load_task(data=path, regression=True)
    assert held.overlap == 0 and 0 < len(held.eval) < 60
    part = load_task(data=path, eval_data=path, regression=True, max_train_rows=30)
    assert len(part.train) == 30 and part.fingerprint != task.fingerprint
    # and as they may be written
    for given, number in ((" 3 ", 3.0), ("-.5", -0.5), ("1e2", 100.0)):
        other = load_task(data=write(tmp_path / "y.tsv", [("a", given), ("b", "0")]), eval_data=path, regression=True)
        assert other.train["label"] == [number, 0.0]
    as_numbers = tmp_path / "z.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "label": [1, 2]}), as_numbers)
    assert load_task(data=as_numbers, eval_data=as_numbers, regression=True).eval["label"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("labels", "regression", "message"),
    [
        (["1", "good"], True, "load_task: data: 'x.tsv': row 2: expected a number as label, got 'good'"),
        (["nan", "1"], True, "load_task: data: 'x.tsv': row 1: expected a number as label, got 'nan'"),
        (["1", "-inf"], True, "load_task: data: 'x.tsv': row 2: expected a number as label, got '-inf'"),
        (["1", "3,5"], True, "load_task: data: 'x.tsv': row 2: expected a number as label, got '3,5'"),
        (["1", "1.0"], True, "load_task: data: expected at least 2 numbers in the column label, got only 1.0"),
        (
            ["1", "2"],
            True,
            "load_task: expected at least 2 numbers as labels of the evaluation split, got only 1.0",
        ),
        (
            ["1", "2.5"],
            False,
            "load_task: data: expected names of classes as labels, got numbers such as 2.5; ask for a regression, or "
            "give the classes other names",
        ),
        (
            ["1.0", "1"],
            False,
            "load_task: data: expected one way to write a class, got '1' and '1.0'",
        ),
    ],
)
def test_labels_that_are_no_numbers_or_should_be_none(tmp_path, monkeypatch, labels, regression, message):
    monkeypatch.chdir(tmp_path)
    write(Path("x.tsv"), [("a", labels[0]), ("b", labels[1])])
    write(Path("dev.tsv"), [("a", "1")])
    with pytest.raises(ValueError) as caught:
        load_task(data="x.tsv", eval_data="dev.tsv", regression=regression)
    assert str(caught.value) == message


BAD = {
    "half.tsv": (
        b"premise\tlabel\na\t1\n",
        "load_task: data: 'half.tsv' has no column hypothesis; its columns: premise, label",
    ),
    "pair.csv": (
        b"sentence1,sentence2,label\na,b,1\nc, ,0\n",
        "load_task: data: 'pair.csv': row 2 has an empty sentence2",
    ),
    "twice.csv": (
        b"question1,question2,label\na,b,1\nA,B ,2\n",
        "load_task: data: expected enough distinct pairs to hold some out for evaluation, got 1; give eval_data",
    ),
    "empty.tsv": (b"", "load_task: data: 'empty.tsv' is empty"),
    "header.csv": (b"sentence,label\n", "load_task: data: 'header.csv' holds no rows"),
    "columns.csv": (
        b"body,label\na,1\n",
        "load_task: data: 'columns.csv' has no column sentence; its columns: body, label",
    ),
    "neither.jsonl": (
        b'{"body": "a", "y": 1}\n',
        "load_task: data: 'neither.jsonl' has no column sentence and no column label; its columns: body, y",
    ),
    "data.xlsx": (
        b"x",
        "load_task: data: expected a file ending in .tsv, .csv, .jsonl, .parquet, got 'data.xlsx'",
    ),
    "latin.csv": (
        b"sentence,label\n\xe9t\xe9,1\n",
        "load_task: data: 'latin.csv': line 2: expected UTF-8, got byte 0xe9 (invalid continuation byte)",
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
        ("x.jsonl", b'{"sentence": "a", "la', "load_task: data: cannot read 'x.jsonl' as JSONL: line 1: "),
        ("y.jsonl", b'{"sentence": "a"}\n\n{"x" 1}', "load_task: data: cannot read 'y.jsonl' as JSONL: line 3: "),
        (
            "z.jsonl",
            b'[{"sentence": "a"}]',
            "load_task: data: cannot read 'z.jsonl' as JSONL: line 1: expected an object",
        ),
        ("w.jsonl", b'{"label": NaN}', "load_task: data: cannot read 'w.jsonl' as JSONL: line 1: NaN is no number"),
        ("v.jsonl", b'{"x": 1, "x": 2}', "load_task: data: cannot read 'v.jsonl' as JSONL: line 1: the column 'x' is"),
        ("d.jsonl", b"[" * 99999, "load_task: data: cannot read 'd.jsonl' as JSONL: line 1: "),
        ("d.tsv", b"label\tlabel\na\t1\n", "load_task: data: cannot read 'd.tsv' as TSV: the column 'label' is there"),
        ("q.csv", b'sentence,label\n"a,1\nb,2\n', "load_task: data: cannot read 'q.csv' as CSV: "),
        ("t.csv", b"a\tb\n1\t2,3\n", "load_task: data: cannot read 't.csv' as CSV: "),
        ("nul.tsv", b"sentence\tlabel\na\0b\t1\n", "load_task: data: 'nul.tsv': line 2 holds a NUL byte"),
        ("nul.jsonl", b'{"x": 1}\r\n\0{}', "load_task: data: 'nul.jsonl': line 2 holds a NUL byte"),
        ("wide.csv", "sentence,label".encode("utf-16"), "load_task: data: 'wide.csv': expected UTF-8, got UTF-"),
        ("wider.csv", "sentence,label".encode("utf-32"), "load_task: data: 'wider.csv': expected UTF-8, got UTF-3"),
        (
            "half.jsonl",
            b'{"x": "\xed\xa0\xbd"}',
            "load_task: data: 'half.jsonl': line 1: expected UTF-8, got byte 0xed",
        ),
        ("mark.csv", b"\xef\xbb\xbf", "load_task: data: 'mark.csv' is"),
        ("ends.csv", b"\n\r\n", "load_task: data: cannot read 'ends.csv' as CSV: "),
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
        (
            {"regression": True},
            "load_task: regression: expected labels that are numbers, got the classes of stdlib-docs",
        ),
        ({"max_train_rows": 1}, "load_task: max_train_rows: expected at least 2, got 1"),
        (
            {"data": "good.tsv", "name": "ssst2"},
            "load_task: name: expected a task, such as 'sst2', or a name that is like none, got 'ssst2'",
        ),
        (
            {"name": "good.tsv"},
            "load_task: name: expected 'stdlib-docs' or a hub id, got 'good.tsv'; give a file as data",
        ),
        (
            {"data": "good.tsv", "eval_data": "pairs.tsv"},
            "load_task: eval_data: expected the columns of data, sentence, got premise and hypothesis",
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
    pairs(Path("pairs.tsv"), [("x", "y", "a")], PAIR_COLUMNS[2])
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


GLUE = {
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@pytest.mark.parametrize("name", GLUE)
def test_pairs_of_glue(hub, name):
    from datasets import ClassLabel

    first, second = GLUE[name]
    rows = Dataset.from_dict({first: ["a", "b", "c"], second: ["d", "e", "f"], "label": [0, 1, -1], "idx": [0, 1, 2]})
    rows = rows.cast_column("label", ClassLabel(names=["no", "yes"]))
    hidden = rows.select([2])  # a label of -1
    parts = {"validation": rows.select([1, 0, 2]), "test": hidden}
    if name == "mnli":
        parts = {"test_matched": hidden, "validation_mismatched": hidden, "validation_matched": parts["validation"]}
    hub["nyu-mll/glue", name] = DatasetDict(train=rows, **parts)
    task = load_task(f"glue/{name}")
    assert task.columns == (first, second) and task.label_names == ("no", "yes")
    assert task.texts(task.train) == [("a", "d"), ("b", "e")] and task.train["label"] == [0, 1]
    assert task.texts(task.eval) == [("b", "e"), ("a", "d")] and task.eval["label"] == [1, 0]


def test_a_hub_data_set_of_numbers(hub):
    from datasets import Value

    rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [3.75, 0.5], "idx": [0, 1]})
    rows = rows.cast_column("label", Value("float32"))
    hidden = rows.map(lambda row: {"label": -1.0})
    hub["nyu-mll/glue", "stsb"] = DatasetDict(train=rows, validation=rows.select([1, 0]), test=hidden)
    task = load_task("glue/stsb")
    assert task.regression and task.columns == ("sentence1", "sentence2")
    assert (task.train["label"], task.eval["label"]) == ([3.75, 0.5], [0.5, 3.75])
    stars = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 5, 4]})
    hub["owner/stars",] = DatasetDict(train=stars, validation=stars)
    assert load_task("owner/stars").label_names == ("1", "4", "5")
    assert load_task("owner/stars", regression=True).train["label"] == [1.0, 5.0, 4.0]


def test_a_hub_data_set_whose_labels_are_kept_secret(hub):
    from datasets import ClassLabel

    many = Dataset.from_dict({"text": [f"text {i}" for i in range(60)], "label": [i % 2 for i in range(60)]})
    many = many.cast_column("label", ClassLabel(names=["bad", "good"]))
    secret = Dataset.from_dict({"text": ["a"], "label": [-1]}).cast_column("label", ClassLabel(names=["bad", "good"]))
    hub["owner/secret",] = DatasetDict(train=many, test=secret)
    task = load_task("owner/secret")
    assert len(task.train) + len(task.eval) == 60 and len(task.eval) > 0  # held out
    hub["owner/none",] = DatasetDict(train=secret)
    with pytest.raises(ValueError, match=r"^load_task: name: 'owner/none' has no row with a label in its split train$"):
        load_task("owner/none")


def test_hub_data_sets_that_do_not_fit(hub):
    rows = Dataset.from_dict({"question": ["a"], "label": [0]})
    hub["owner/pairs",] = DatasetDict(train=rows)
    hub["owner/no-train",] = DatasetDict(test=rows)
    with pytest.raises(ValueError) as caught:
        load_task("owner/pairs")
    assert str(caught.value) == (
        "load_task: name: 'owner/pairs' has no columns sentence (or text) and label, nor a pair such as sentence1 and "
        "sentence2; its columns: question, label"
    )
    with pytest.raises(ValueError, match=r"^load_task: name: 'owner/no-train' has no split train; its splits: test$"):
        load_task("owner/no-train")


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_spaces_that_begin_a_line_are_kept_wherever_a_readers_buffer_ends(tmp_path, suffix):
    separator = "\t" if suffix == ".tsv" else ","
    head = f"sentence{separator}label\n"
    path = tmp_path / f"a{suffix}"
    for spaces_before in (1, 4, 7):
        first = "x" * (262144 - len(head) - 3 - spaces_before)
        rows = [(first, "0"), ("        def f(): pass", "1"), ("  other", "0")]
        path.write_text(head + "".join(f"{text}{separator}{label}\n" for text, label in rows))
        task = load_task(data=path, eval_data=path)
        assert list(task.train["sentence"]) == [text for text, _ in rows]


def test_lines_of_white_space_alone_are_no_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\n  \r\nsentence,label,more\r\n\r\n"a\r\n\r\nb",1\r\n \t\r\n"c ""d""",2,x\r"e" f,2\n\n')
    task = load_task(data=path, eval_data=path)
    assert list(task.train["sentence"]) == ["a\r\n\r\nb", 'c "d"', "e f"]
    path.write_text("sentence,label\na,1\n,\nb,2\n")
    with pytest.raises(ValueError, match="row 2 has an empty sentence"):
        load_task(data=path, eval_data=path)
    path.write_text('sentence,label\na,1\n"b,2\nc,1\n')
    with pytest.raises(ValueError, match="a quote is open at the end"):
        load_task(data=path, eval_data=path)
    path.write_text('sentence,label\n"a\nb",1\nb,2,3\n')
    with pytest.raises(ValueError, match="line 4: expected 2 cells as in the line of names, got 3"):
        load_task(data=path, eval_data=path)


TEXT = '"sentence": {"dtype": "string", "_type": "Value"}'


@pytest.mark.parametrize(
    "metadata",
    [
        "null",
        '{"info": {"features": []}}',
        '{"info": {"features": {"label": null, %s}}}' % TEXT,  # noqa: UP031
        '{"info": {"features": {"label": 5, %s}}}' % TEXT,  # noqa: UP031
        *(
            '{"info": {"features": {"label": {"names": %s, "_type": "ClassLabel"}, %s}}}' % (names, TEXT)  # noqa: UP031
            for names in ("5", "[1, 2]", "null", '["a", "a"]', '"ab"', '["a", null]', '{"a": 1}')
        ),
        "{",
        "\udcff",
    ],
)
def test_metadata_that_are_none_are_refused_by_file(tmp_path, metadata):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
    content = metadata.encode(errors="surrogateescape")
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": content}), path)
    with pytest.raises(ValueError) as caught:
        load_task(data=path, eval_data=path)
    assert str(caught.value).startswith(f"load_task: data: cannot read {str(path)!r} as Parquet: its metadata 'hugging")


@pytest.mark.parametrize("metadata", ["{}", "[]", '{"info": {}}', '{"info": {"features": null}}'])
def test_metadata_without_features_say_nothing(tmp_path, metadata):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    assert load_task(data=path, eval_data=path).label_names == ("0", "1")


def test_classes_that_are_floats_are_in_the_order_of_their_values(tmp_path):
    names = [f"{at}.0" for at in range(-2, 12) if at != -1]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"sentence": "s {name}", "label": {name}}}\n' for name in reversed(names)))
    assert load_task(data=path, eval_data=path).label_names == tuple(names)


@pytest.mark.parametrize("label", ["[a, b]", "('a', 'b')", "{'a'}", "{'a': 1}", "(1, 2)", "('a',)", "['a', 'b']"])
def test_several_labels_as_text(tmp_path, label):
    path = write(tmp_path / "a.jsonl", [("a", "x"), ("b", label)])
    with pytest.raises(ValueError, match="row 2: expected one label, a text or a number"):
        load_task(data=path, eval_data=path)


def test_classes_in_brackets_are_one_label_each(tmp_path):
    path = write(tmp_path / "a.jsonl", [("a", "[UNK]"), ("b", "(other)"), ("c", "{x}"), ("d", "a, b")])
    assert load_task(data=path, eval_data=path).label_names == ("(other)", "[UNK]", "a, b", "{x}")


def test_pythons_own_numbers_are_none(tmp_path):
    path = write(tmp_path / "a.tsv", [("a", "1"), ("b", "1_000")])
    with pytest.raises(ValueError, match="row 2: expected a number as label, got '1_000'"):
        load_task(data=path, eval_data=path, regression=True)


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "a.tsv")
    (tmp_path / "b.parquet").mkdir()
    for name, kind in (("a.tsv", "a FIFO"), ("b.parquet", "a directory")):
        with pytest.raises(ValueError) as caught:
            load_task(data=tmp_path / name)
        assert str(caught.value) == (f"load_task: data: {str(tmp_path / name)!r}: expected a regular file, got {kind}")
