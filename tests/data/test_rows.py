"""Rows of a user's file, one by one: what cannot be read keeps its place and says why."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from distilbert_fast.data import rows as module
from distilbert_fast.data.rows import Rows


def read(path, content, **options):
    path.write_bytes(content)
    return [(row.number, row.fault or row.columns) for row in Rows("predict", path, **options)]


def test_objects(tmp_path):
    content = b'\xef\xbb\xbf{"text":"a","n":1.0}\r\n\r\n{"text":"b\xff"}\n[1]\r{"a":1,"a":2}\n{"a": NaN}\n{"a":[null]}'
    assert read(tmp_path / "a.jsonl", content) == [
        (1, {"text": "a", "n": 1.0}),
        (3, "expected UTF-8, got byte 0xff at character 10"),
        (4, "expected an object, got [1]"),
        (5, "the column 'a' is there more than once"),
        (6, "NaN is no number in JSON"),
        (7, {"a": [None]}),
    ]


def test_cells(tmp_path):
    content = b'id,text\n1,"two\nlines"\n2\n\n3,"x",y\n4,\xe9\n"5",NA\n6,"open\n'
    assert read(tmp_path / "a.csv", content) == [
        (2, {"id": "1", "text": "two\nlines"}),
        (4, {"id": "2", "text": ""}),
        (6, "expected 2 cells as in the line of names, got 3"),
        (7, "expected UTF-8, got byte 0xe9 at character 2"),
        (8, {"id": "5", "text": "NA"}),
        (9, "a quote is open at the end of the file"),
    ]
    assert read(tmp_path / "a.tsv", b'text\t\n"a\tb\n') == [(2, {"text": '"a', "Unnamed: 1": "b"})]


def test_lines_and_their_text(tmp_path):
    content = "a\r\n\nü\rlast".encode()
    (tmp_path / "a.txt").write_bytes(content)
    rows = [*Rows("predict", tmp_path / "a.txt")]
    assert [(row.number, row.columns["text"]) for row in rows] == [(1, "a"), (2, ""), (3, "ü"), (4, "last")]
    assert "".join(row.raw for row in rows).encode() == content


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 8)
    found = read(tmp_path / "a.txt", b"12345678901234567\nnext\n1234567\n")
    assert found == [
        (1, "a line of more than 8 characters, which is shown in part"),
        (2, {"text": "next"}),
        (3, {"text": "1234567"}),
    ]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", None], "tags": [["x"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = Rows("predict", tmp_path / "a.parquet")
    assert (rows.names, rows.size, rows.by) == (["text", "tags"], 2, "row") and len(rows.identity) == 64
    assert [(row.number, row.columns) for row in rows] == [
        (1, {"text": "a", "tags": ["x"]}),
        (2, {"text": None, "tags": []}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "x".encode("utf-16"), "expected UTF-8, got UTF-16"),
        ("a.csv", b"a,a\n", "the column 'a' is there more than once"),
        ("a.csv", b"\n \n", "it holds no line of column names"),
        ("a.csv", b"text\tid\nx\t1\n", "has one column, 'text\\tid'; if tabs separate its columns, name it .tsv"),
        ("a.tsv", b"te\xffxt\n", "line 1: expected UTF-8, got byte 0xff at character 2"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet: Parquet file size is 4 bytes, smaller than"),
        ("a.json", b"{}", "expected a name that ends with one of .csv, .jsonl, .parquet, .tsv, .txt, or a format, got"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        Rows("predict", tmp_path / name)
    assert str(raised.value).startswith(f"predict: input: '{tmp_path / name}': {message}")
    with pytest.raises(ValueError, match=r"predict: input: no such file: '.*nowhere.csv'"):
        Rows("predict", tmp_path / "nowhere.csv")
