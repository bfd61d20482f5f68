"""A corpus is the rows that its description says, is built whole or not at all, and is reused only if unchanged."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
from pathlib import Path

import datasets as data_sets
import numpy as np
import pytest
import torch
from distillation import corpora

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

from distilbert_fast.data import corpus as data  # noqa: E402
from distilbert_fast.data.corpus import load_corpus  # noqa: E402
from distilbert_fast.data.masking import MaskedDataset, MaskedStream, Masking  # noqa: E402
from distilbert_fast.data.packing import Flat, RowFormat, join  # noqa: E402
from distilbert_fast.runs import manifest  # noqa: E402

datasets.disable_progress_bars()


@pytest.fixture(params=["bert", "roberta"])
def either(request, tokenizer):
    return tokenizer if request.param == "bert" else corpora.roberta()


@pytest.fixture
def text(tmp_path):
    return corpora.write(tmp_path / "corpus.txt", corpora.documents())


def ids(tokenizer, line, room):
    """The pieces of one line."""
    all = tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
    return [all[at : at + room] for at in range(0, len(all), room)]


def joined(documents, cls, sep, max_length):
    """FULL-SENTENCES, piece by piece; documents are lists of pieces."""
    rows, row = [], []
    for document in documents:
        for piece in document:
            if len(row) + len(piece) > max_length - 2:
                rows.append(row)
                row = []
            row = row + piece
        if len(row) == max_length - 2:
            rows.append(row)
            row = []
        if row and row[-1] is not None:
            row = [*row, None]  # the document's end
    rows = [row[:-1] if row[-1] is None else row for row in [*rows, row] if row]
    return [[cls, *(sep if id is None else id for id in row), sep] for row in rows]


def wanted(tokenizer, documents, max_length, packing, min_length=12):
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    pieces = [[piece for line in document for piece in ids(tokenizer, line, max_length - 2)] for document in documents]
    if packing == "lines":
        rows = [[cls, *piece, sep] for document in pieces for piece in document]
    else:
        rows = joined(pieces, cls, sep, max_length)
    return [row for row in rows if len(row) >= min_length]


def rows_of(dataset):
    return dataset["input_ids"][:]


@pytest.mark.parametrize("packing", ["full_sentences", "lines"])
@pytest.mark.parametrize("max_length", [16, 64])
def test_rows(either, text, tmp_path, packing, max_length):
    corpus = load_corpus(text, either, max_length=max_length, packing=packing, cache_dir=tmp_path / "cache")
    expected = wanted(either, corpora.documents(), max_length, packing)
    assert rows_of(corpus.train) == expected and len(expected) > 50
    assert corpus.train["length"][:] == [len(row) for row in expected]
    assert corpus.train.features["input_ids"].feature.dtype == "uint16"
    flat = [id for row in expected for id in row]
    assert np.array_equal(corpus.token_counts, np.bincount(flat, minlength=len(either)))
    report = corpus.report
    assert (report.kept, report.tokens, report.held_out, corpus.holdout) == (len(expected), len(flat), 0, None)
    assert report.rows == report.kept + report.too_short + report.too_many_unknown
    streamed = load_corpus(text, either, max_length=max_length, packing=packing, streaming=True)
    assert [row["input_ids"] for row in streamed.train] == expected and streamed.token_counts is None


def test_join_does_not_show_chunks():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(
        documents=st.lists(st.lists(st.integers(1, 6), max_size=5), max_size=8),
        max_length=st.integers(8, 14),
        order=st.randoms(use_true_random=False),
    )
    def holds(documents, max_length, order):
        number = iter(range(10, 1000))
        documents = [[[next(number) for _ in range(length)] for length in document] for document in documents]
        pieces = [piece for document in documents for piece in [*document, *([[]] * order.randrange(1, 3))]]
        cuts = sorted(order.randrange(len(pieces) + 1) for _ in range(order.randrange(4)))
        chunks = [pieces[a:b] for a, b in zip([0, *cuts], [*cuts, len(pieces)], strict=True)]
        flat = [
            Flat(np.array([id for piece in chunk for id in piece], np.uint16), np.array([*map(len, chunk)], np.int64))
            for chunk in chunks
        ]
        got = [
            row.tolist()
            for rows in join(flat, RowFormat(1, 2, max_length, "full_sentences", "uint16"))
            for row in rows.split()
        ]
        assert got == joined(documents, 1, 2, max_length)

    holds()


def test_the_filters_of_the_original(tokenizer, tmp_path):
    """11 tokens with the special ones go, 12 stay; half of them unknown go, fewer stay."""
    lines = {"too short": " ".join(["word"] * 9), "long enough": " ".join(["word"] * 10)}
    lines["half"] = " ".join(["\u2603"] * 7 + ["word"] * 5)  # 7 of 14
    lines["less than half"] = " ".join(["\u2603"] * 6 + ["word"] * 6)
    path = corpora.write(tmp_path / "a.txt", [lines.values()])
    corpus = load_corpus(path, tokenizer, packing="lines", cache_dir=tmp_path)
    kept = [lines["long enough"], lines["less than half"]]
    assert rows_of(corpus.train) == tokenizer(kept)["input_ids"]
    assert json.loads(json.dumps(corpus.report.__dict__)) == {
        "texts": 4, "rows": 4, "too_short": 1, "too_many_unknown": 1, "kept": 2, "held_out": 0, "tokens": 26,
    }  # fmt: skip


def save(path, texts, column="text"):
    dataset = datasets.Dataset.from_dict({column: texts})
    if path.suffix == ".tsv":
        path.write_text("\n".join([column, *texts]) + "\n")
    else:
        {".csv": dataset.to_csv, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[path.suffix](path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
def test_kinds_of_files(tokenizer, tmp_path, suffix):
    """A row is a document, whatever is in it; several files and a glob are read in order of their names."""
    texts = ["NA", 'it said "no, never"', "größer, weiter", "日本語", *(" ".join(d) for d in corpora.documents()[:20])]
    for name, part in (("b", texts[9:]), ("a", texts[:9])):
        save(tmp_path / f"{name}{suffix}", part)
    settings = {"cache_dir": tmp_path, "max_length": 32, "min_length": 3}
    corpus = load_corpus(tmp_path / f"*{suffix}", tokenizer, **settings)
    assert rows_of(corpus.train) == wanted(tokenizer, [[text] for text in texts], 32, "full_sentences", 3)
    named = load_corpus([tmp_path / f"a{suffix}", str(tmp_path / f"b{suffix}")], tokenizer, **settings)
    assert named.path == corpus.path and named.report.texts == len(texts)
    streamed = load_corpus(tmp_path / f"*{suffix}", tokenizer, max_length=32, min_length=3, streaming=True)
    assert [row["input_ids"] for row in streamed.train] == rows_of(corpus.train)


LOOKS = ["2020-01-01", "007", "1e5", "true", "NA", "", "1.50", "2020-01-01 00:00:00"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("last", [*LOOKS, LOOKS])
def test_texts_stay_as_written_wherever_they_stand(tmp_path, last, suffix, streaming):
    """Readers look at a block for types: a column that begins with words may go on with what looks like numbers."""
    from distilbert_fast.data.text_sources import TextSource

    for words in (0, 1, 10_000):  # pandas reads 10,000 rows at a time
        texts = ["word"] * words + ([last] * 3 if isinstance(last, str) else last)
        path = tmp_path / f"{words}{suffix}"
        lines = [json.dumps({"text": text, "n": 1}) for text in texts]
        if suffix != ".jsonl":
            separator = "," if suffix == ".csv" else "\t"
            lines = [f"text{separator}n", *(f"{text}{separator}1" for text in texts)]
        path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
        table = TextSource(path, None, "train", False).open(tmp_path / "work", streaming=streaming)
        assert [row["text"] for row in table.rows] == texts


def test_bad_rows(tokenizer, tmp_path):
    for name, content, error, message in (
        ("a.jsonl", '{"text": "a"}\n\n{"text": ["b"]}', TypeError, "must be a column of text, got text of list"),
        ("b.jsonl", '{"text": "a"}\n\n{"text": "\\ud800"}', ValueError, "line 3: expected a text, got the lone"),
        ("c.jsonl", '{"text": "a"}\n["b"]', ValueError, "line 2: expected an object, got ['b']"),
        ("d.jsonl", '{"text": "a", "text": "b"}', ValueError, "line 1: the column 'text' is there more than once"),
        ("a.tsv", "text\na\tb\n", ValueError, "Expected 1 fields in line 2, saw 2"),
        ("b.tsv", "text\ttext\na\tb\n", ValueError, "the column 'text' is there more than once"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        for settings in ({"cache_dir": tmp_path / "cache"}, {"streaming": True}):
            with pytest.raises(error) as caught:
                list(load_corpus(tmp_path / name, tokenizer, **settings).train)
            assert str(caught.value).startswith("load_corpus: ") and message in str(caught.value)
    (tmp_path / "a.csv").write_text("text,n\na,1\n")
    (tmp_path / "b.csv").write_text("n,text\n1,007\n")
    (tmp_path / "c.csv").write_text("n,body\n1,a\n")
    both = load_corpus([tmp_path / "a.csv", tmp_path / "b.csv"], tokenizer, cache_dir=tmp_path, min_length=1)
    assert both.report.texts == 2
    with refused("load_corpus: source must be files with the columns text, n, got '"):
        load_corpus(tmp_path / "*.csv", tokenizer, cache_dir=tmp_path)


def test_lines_within_a_document(tokenizer, tmp_path):
    documents = corpora.documents()[:12]
    save(tmp_path / "a.jsonl", ["\n".join(document) for document in documents])
    for packing in ("lines", "full_sentences"):
        corpus = load_corpus(tmp_path / "a.jsonl", tokenizer, max_length=32, packing=packing, cache_dir=tmp_path)
        assert rows_of(corpus.train) == wanted(tokenizer, documents, 32, packing)


def test_a_directory_as_a_data_set(tokenizer, tmp_path):
    """What goes for a hub id, which `datasets` loads alike."""
    texts = [" ".join(document) for document in corpora.documents()[:20]]
    (tmp_path / "set").mkdir()
    save(tmp_path / "set" / "train.parquet", texts[:15], "sentence")
    save(tmp_path / "set" / "test.parquet", texts[15:], "sentence")
    for split, part in (("train", texts[:15]), ("test", texts[15:])):
        corpus = load_corpus(tmp_path / "set", tokenizer, split=split, max_length=32, cache_dir=tmp_path / "cache")
        assert rows_of(corpus.train) == wanted(tokenizer, [[text] for text in part], 32, "full_sentences")


def test_ends_of_documents(tokenizer, tmp_path):
    """A blank line ends one, however many there are and whatever spaces they hold; so does a file's end. A line of
    control characters, which has no tokens, does not; nor does a corpus or a row begin or close with an end."""
    (tmp_path / "a.txt").write_text("\ufeff\n\n one two\nthree\r\n\x00\x1f\nfour\n \t \n\n\nfive")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("six\n\n\n")
    corpus = load_corpus(tmp_path / "?.txt", tokenizer, min_length=1, cache_dir=tmp_path)
    assert [tokenizer.decode(row) for row in rows_of(corpus.train)] == [
        "[CLS] one two three four [SEP] five [SEP] six [SEP]"
    ]
    assert corpus.report.texts == 13


def test_processes_do_not_show(tokenizer, text, tmp_path):
    one, two = (
        load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path / str(n), num_proc=n, holdout=0.2)
        for n in (None, 2)
    )
    assert one.fingerprint == two.fingerprint and one.report == two.report
    for name in ("train.arrow", "holdout.arrow", "token_counts.npy"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_holdout(tokenizer, text, tmp_path):
    def load(**settings):
        return load_corpus(text, tokenizer, max_length=16, cache_dir=tmp_path, **settings)

    every = {tuple(row) for row in rows_of(load().train)}
    part = load(holdout=0.25)
    train, held = ({tuple(row) for row in rows_of(rows)} for rows in (part.train, part.holdout))
    assert train | held == every and not train & held
    assert abs(len(held) / len(every) - 0.25) < 5 * (0.25 * 0.75 / len(every)) ** 0.5
    assert part.report.held_out == len(part.holdout) and part.report.kept == len(part.train)
    assert part.token_counts.sum() == sum(part.train["length"][:])
    assert held <= {tuple(row) for row in rows_of(load(holdout=0.5).holdout)}  # of one seed, more are more of the same
    other = {tuple(row) for row in rows_of(load(holdout=0.25, seed=1).holdout)}
    assert other != held and other & held
    streamed = load_corpus(text, tokenizer, max_length=16, holdout=0.25, streaming=True)
    assert [row["input_ids"] for row in streamed.holdout] == rows_of(part.holdout)
    assert [row["input_ids"] for row in streamed.train] == rows_of(part.train)


def test_the_head_of_a_stream_is_kept(tokenizer, text, tmp_path):
    def load(head, **settings):
        shape = {"max_length": 16, "min_length": 4, "holdout": 0.25}
        return load_corpus(text, tokenizer, cache_dir=tmp_path, **shape, **settings, **({"head": head} if head else {}))

    stored, every = load(0), load(10**9, streaming=True)
    assert rows_of(every.holdout) == rows_of(stored.holdout)
    assert np.array_equal(every.token_counts, stored.token_counts)
    assert [row["input_ids"] for row in every.train] == rows_of(stored.train)
    assert sorted(path.name for path in every.path.iterdir() if path.suffix != ".json") == [
        "holdout.arrow",
        "token_counts.npy",
    ]
    assert load(10**9, streaming=True).path == every.path
    first = load(20, streaming=True)
    assert 0 < len(first.holdout) <= len(every.holdout)
    assert rows_of(first.holdout) == rows_of(every.holdout)[: len(first.holdout)]
    assert first.token_counts.sum() == first.report.tokens
    assert first.path != every.path
    with pytest.raises(ValueError, match=r"^load_corpus: head must be 0, or rows of a stream, got 20"):
        load(20)


def test_masked(tokenizer, text, tmp_path):
    """The stored and the streamed corpus, masked, are the same."""
    corpus = load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path)
    streamed = load_corpus(text, tokenizer, max_length=32, streaming=True)
    masking = Masking(tokenizer, corpus.path / "token_counts.npy", seed=5)
    dataset, stream = MaskedDataset(corpus.train, masking), MaskedStream(streamed.train, masking)
    dataset.set_epoch(1)
    stream.set_epoch(1)
    items = list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert len(items) == len(dataset) > 100
    for index, item in enumerate(items):
        stored = dataset[index]
        assert item.keys() == stored.keys()
        assert all(np.array_equal(item[name], stored[name]) for name in item)
        back = np.where(item["labels"] == -100, item["input_ids"], item["labels"])
        assert back.tolist() == corpus.train[index]["input_ids"]


def test_what_is_unchanged_is_reused(tokenizer, text, tmp_path, caplog):
    def load(path=text, tokenizer=tokenizer, **settings):
        return load_corpus(path, tokenizer, **{"max_length": 32, "cache_dir": tmp_path / "cache", **settings})

    first = load()
    inode = (first.path / "train.arrow").stat().st_ino
    os.utime(text)
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(text.read_bytes())
    tokenizer(["to cut", "and to pad it all"], truncation=True, max_length=4, padding=True)  # sets what it leaves set
    for again in (load(), load(moved), load(num_proc=1), load(seed=3), load(str(tmp_path / "corp*.txt"))):
        assert again.path == first.path and (again.path / "train.arrow").stat().st_ino == inode
        assert again.report == first.report and again.train._fingerprint == first.train._fingerprint
    changes = [{"max_length": 31}, {"packing": "lines"}, {"min_length": 13}, {"max_unknown": 0.4}, {"holdout": 0.1}]
    paths = [load(**change).path for change in changes] + [load(tokenizer=corpora.roberta()).path]
    times = text.stat().st_atime_ns, text.stat().st_mtime_ns
    text.write_bytes(text.read_bytes().replace(b"a", b"b", 1))
    os.utime(text, ns=times)  # the same size and time as before
    paths.append(load().path)
    assert len({first.path, *paths}) == 8


@pytest.mark.parametrize("damage", ["cut", "missing", "unfinished"])
def test_what_is_damaged_is_made_again(tokenizer, text, tmp_path, caplog, damage):
    corpus = load_corpus(text, tokenizer, cache_dir=tmp_path)
    whole = {file.name: file.read_bytes() for file in corpus.path.iterdir()}
    del corpus.train.__dict__["_data"]
    file = corpus.path / "train.arrow"
    if damage == "cut":
        file.write_bytes(whole["train.arrow"][:-100])
    elif damage == "missing":
        file.unlink()
    else:
        manifest.begin(corpus.path)
    with caplog.at_level(logging.WARNING):
        again = load_corpus(text, tokenizer, cache_dir=tmp_path)
    assert {file.name: file.read_bytes() for file in again.path.iterdir()} == whole
    assert f"load_corpus: making {corpus.path} again: " in caplog.text


def child(run):
    """A process that ends with ``run``; killed by itself counts as -9."""
    process = os.fork()
    if process == 0:
        try:
            run()
        finally:
            os._exit(0)
    return process


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def before(module, name):
    """Have the process killed where ``module.name`` would run."""
    setattr(module, name, lambda *args, **kwargs: kill())


KILLED_BEFORE = {
    "reading": (data.TextSource, "open"),
    "joining": (data, "join"),
    "writing": (pyarrow, "record_batch"),
    "counting": (data.np, "save"),
    "completing": (data.manifest, "complete"),
    "the manifest": (os, "replace"),
    "renaming": (Path, "rename"),
}


@pytest.mark.parametrize("moment", KILLED_BEFORE)
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tokenizer, text, tmp_path, moment):
    def build():
        before(*KILLED_BEFORE[moment])
        load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path / "cache")

    _, status = os.waitpid(child(build), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert [path for path in (tmp_path / "cache").glob(".*.partial")]
    corpus = load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path / "cache")
    assert rows_of(corpus.train) == wanted(tokenizer, corpora.documents(), 32, "full_sentences")
    assert sorted(path.name for path in corpus.path.iterdir()) == [manifest.MANIFEST, "token_counts.npy", "train.arrow"]
    assert manifest.fault(corpus.path) is None
    assert {path.name for path in corpus.path.parent.iterdir()} == {corpus.path.name, f".{corpus.path.name}.lock"}


def test_a_failed_build_leaves_nothing(tokenizer, text, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_corpus(text, tokenizer, cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_full_disk_is_not_the_fault_of_the_source(tokenizer, text, tmp_path, monkeypatch):
    def full(*args, **options):
        no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise data_sets.exceptions.DatasetGenerationError("An error occurred") from no_space

    monkeypatch.setattr(data_sets, "load_dataset", full)
    with pytest.raises(OSError, match="load_corpus: No space left on device") as error:
        load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path / "cache")
    assert error.value.errno == errno.ENOSPC and error.value.filename.startswith(str(tmp_path / "cache"))


def test_of_two_processes_one_builds(tokenizer, text, tmp_path):
    build = data._write

    def load(number):
        def told(*args):
            with open(tmp_path / "builds", "a") as file:
                file.write(f"{number}\n")
            return build(*args)

        data._write = told
        corpus = load_corpus(text, tokenizer, max_length=32, cache_dir=tmp_path / "cache")
        (tmp_path / f"rows-{number}").write_text(repr(rows_of(corpus.train)))

    for process in [child(lambda number=number: load(number)) for number in range(3)]:
        assert os.waitpid(process, 0)[1] == 0
    assert len((tmp_path / "builds").read_text().split()) == 1
    expected = repr(wanted(tokenizer, corpora.documents(), 32, "full_sentences"))
    assert all((tmp_path / f"rows-{number}").read_text() == expected for number in range(3))


def refused(message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "both"}, "load_corpus: packing must be one of 'full_sentences', 'lines', got 'both'"),
        ({"max_length": 2}, "load_corpus: max_length must be at least 3, got 2"),
        ({"holdout": 1.0}, "load_corpus: holdout must be 0 or more and below 1, got 1.0"),
        ({"seed": -1}, "load_corpus: seed must be from 0 to 2^64 - 1, got -1"),
        ({"cache_dir": None}, "load_corpus: cache_dir must be given unless streaming, got None"),
        ({"split": "test"}, "load_corpus: split must be 'train' for files, got 'test'"),
        ({"min_length": 10**6}, "load_corpus: source must hold rows that pass the filters, got none: texts "),
    ],
)
def test_bad_settings(tokenizer, text, tmp_path, settings, message):
    with refused(message):
        load_corpus(text, tokenizer, **{"cache_dir": tmp_path / "cache", **settings})
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_bad_sources(tokenizer, text, tmp_path):
    def load(source, **settings):
        return load_corpus(source, tokenizer, cache_dir=tmp_path / "cache", **settings)

    two = datasets.Dataset.from_dict({"title": ["a"], "body": ["b"], "number": [1]})
    two.to_json(tmp_path / "two.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
    kinds = "files of one kind of .txt, .jsonl, .parquet, .csv, .tsv"
    for source, settings, error, message in (
        ("no.txt", {}, ValueError, "load_corpus: source must be files that are there, got 'no.txt'"),
        ([text, "no/*.csv"], {}, ValueError, "load_corpus: source must be files that are there, got 'no/*.csv'"),
        (tmp_path / "*.*", {}, ValueError, f"load_corpus: source must be {kinds}, got .jsonl, .txt"),
        ([], {}, ValueError, f"load_corpus: source must be {kinds}, got none"),
        ("", {}, ValueError, "load_corpus: source must be files or a data set, got an empty name"),
        (
            text, {"text_column": "body"}, ValueError,
            "load_corpus: text_column must be None for .txt files, which have no columns, got 'body'",
        ),
        (__file__, {}, ValueError, f"load_corpus: source must be {kinds}, got .py"),
        (tmp_path / "bad.jsonl", {}, ValueError, f"load_corpus: cannot read '{tmp_path / 'bad.jsonl'}': "),
        (tmp_path / "empty*.jsonl", {}, ValueError, "load_corpus: source must be files that hold text, got empty ones"),
        (tmp_path / "empty.txt", {}, ValueError, "load_corpus: source must be files that hold text, got empty ones"),
        ("no-such/data-set", {}, ValueError, "load_corpus: cannot read 'no-such/data-set': "),
        (
            tmp_path / "two.jsonl", {}, ValueError,
            "load_corpus: text_column must be one of title, body, number, got None",
        ),
        (
            tmp_path / "two.jsonl", {"text_column": "text"}, ValueError,
            "load_corpus: text_column must be one of title, body, number, got text",
        ),
        (
            tmp_path / "two.jsonl", {"text_column": "number"}, TypeError,
            "load_corpus: text_column must be a column of text, got number of int64",
        ),
    ):  # fmt: skip
        with refused(message, error):
            load(source, **settings)
    assert load(tmp_path / "two.jsonl", text_column="body", min_length=1).report.kept == 1


def test_bad_tokenizers(tokenizer, text, tmp_path):
    with refused("load_corpus: tokenizer must be a fast tokenizer, got object", TypeError):
        load_corpus(text, object(), cache_dir=tmp_path)
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.cls_token = bare.bos_token = None
    with refused(
        "load_corpus: tokenizer must be one with tokens that open and close a sequence, got " + type(bare).__name__
    ):
        load_corpus(text, bare, cache_dir=tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_spaces_that_begin_a_row_are_kept_wherever_a_readers_buffer_ends(tmp_path, suffix, streaming):
    from distilbert_fast.data.text_sources import TextSource

    separator = "," if suffix == ".csv" else "\t"
    head = f"text{separator}n\n"
    for spaces_before in (1, 4, 7):
        texts = ["x" * (262144 - len(head) - 3 - spaces_before), "        def f(): pass", "  other"]
        path = tmp_path / f"{spaces_before}{suffix}"
        path.write_text(head + "".join(f"{text}{separator}0\n" for text in texts))
        table = TextSource(path, None, "train", False).open(tmp_path / "work", streaming=streaming)
        assert [row["text"] for row in table.rows] == texts


@pytest.mark.parametrize("packing", ["full_sentences", "lines"])
def test_blank_lines_of_a_table_change_nothing(tokenizer, tmp_path, packing):
    (tmp_path / "a.csv").write_text('text,n\nthe old cat,1\n"a small\n\ndog",1\n')
    (tmp_path / "b.csv").write_text('text,n\n\nthe old cat,1\n\n  \n"a small\n\ndog",1\n\n')
    a, b = (
        load_corpus(tmp_path / name, tokenizer, cache_dir=tmp_path, min_length=1, packing=packing)
        for name in ("a.csv", "b.csv")
    )
    assert [row["input_ids"] for row in a.train] == [row["input_ids"] for row in b.train]
    assert a.report == b.report
    (tmp_path / "c.csv").write_text("\ntext\nthe old cat\n")
    with refused("load_corpus: cannot read"):
        load_corpus(tmp_path / "c.csv", tokenizer, cache_dir=tmp_path)


@pytest.mark.parametrize("end", ["\r\r\n", "\n\r"])
def test_line_ends_that_would_make_a_document_of_each_line(tokenizer, tmp_path, end):
    (tmp_path / "a.txt").write_bytes(f"the old cat{end}a small dog{end}".encode())
    with refused("load_corpus: cannot read '"):
        load_corpus(tmp_path / "a.txt", tokenizer, cache_dir=tmp_path, min_length=1)
