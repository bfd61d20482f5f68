"""`distilbert-fast predict`: what it writes, what it refuses, and what a killed run leaves."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import cases
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from demo_input import bert, sentences
from typer.testing import CliRunner

from distilbert_fast import Predictor
from distilbert_fast.cli import app
from distilbert_fast.jobs import predict as module
from distilbert_fast.jobs import predict_input
from distilbert_fast.jobs.predict import predict
from distilbert_fast.jobs.predict_output import JsonLines
from distilbert_fast.jobs.settings import RecipeError

TEXTS = [text for text, _ in sentences(300, 3)]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("models") / "body")


@pytest.fixture(scope="module")
def model(body):
    """A checkpoint of a random classifier."""
    return with_head(body, transformers.BertForSequenceClassification)


def with_head(body, kind):
    torch.manual_seed(1)
    path = body.with_name(kind.__name__)
    network = kind.from_pretrained(body)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("classifier", "qa_outputs")):
                parameter.mul_(20)
    network.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(predict_input, "WINDOW_ROWS", 16)


def jsonl(path, texts=TEXTS):
    lines = [json.dumps({"id": number, "text": text, "more": {"x": [1.50, None]}}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin, env={"COLUMNS": "100"})


def test_rows_keep_their_order_and_their_columns(model, tmp_path):
    source = jsonl(tmp_path / "in.jsonl")
    done = run("--model", model, "--input", source, "-o", tmp_path / "out.jsonl", "--shard-rows", 100)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["written"], summary["rejected"], summary["truncated"]) == (300, 300, 0, 0)
    assert summary["fallbacks"] == {} and summary["served"] >= 300 / 16 and summary["rejected_file"] is None
    wanted = Predictor.load(model)(TEXTS)
    for line, given, answer in zip(
        (tmp_path / "out.jsonl").read_text().splitlines(), source.read_text().splitlines(), wanted, strict=True
    ):
        assert line.startswith(given[:-1] + ', "label": ')  # the input as it was written
        found = json.loads(line)
        assert found["label"] == answer[0]["label"] and found["score"] == pytest.approx(answer[0]["score"], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_forms(model, body, tmp_path):
    """From each form of input, into each form of output."""
    texts = TEXTS[:40]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    (tmp_path / "in.tsv").write_text("\n".join(["id\tsentence", *(f"{at}\t{text}" for at, text in enumerate(texts))]))
    (tmp_path / "in.csv").write_text("\n".join(["id,text", *(f'{at},"{text}"' for at, text in enumerate(texts))]))
    jsonl(tmp_path / "in.jsonl", texts)
    schema = pyarrow.schema([("id", pyarrow.int16()), ("text", pyarrow.string()), ("day", pyarrow.date32())])
    table = pyarrow.table({"id": range(40), "text": texts, "day": [19000] * 40}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    wanted = [answer[0]["label"] for answer in Predictor.load(model)(texts)]
    for form in ("txt", "tsv", "csv", "jsonl", "parquet"):
        for suffix in ("jsonl", "parquet"):
            output = tmp_path / f"{form}.{suffix}"
            made = predict(model, tmp_path / f"in.{form}", output, shard_rows=17)
            assert made["written"] == 40
            found = lines(output) if suffix == "jsonl" else pyarrow.parquet.read_table(output).to_pylist()
            assert [row["label"] for row in found] == wanted
            assert [row["sentence" if form == "tsv" else "text"] for row in found] == texts
            if form != "txt":
                kind = int if form in ("jsonl", "parquet") else str
                assert [row["id"] for row in found] == [kind(at) for at in range(40)]
    assert lines(tmp_path / "parquet.jsonl")[0]["day"] == "2022-01-08"
    read = pyarrow.parquet.read_schema(tmp_path / "parquet.parquet")
    assert read == pyarrow.schema([*schema, ("label", pyarrow.string()), ("score", pyarrow.float32())])
    done = run("--model", model, "-i", "-", "--format", "txt", "-o", tmp_path / "std.jsonl", stdin="\n".join(texts))
    assert done.exit_code == 0, done.output
    assert [row["label"] for row in lines(tmp_path / "std.jsonl")] == wanted


def test_each_task(model, body, tmp_path):
    source = jsonl(tmp_path / "in.jsonl", TEXTS[:20])

    def table(task, checkpoint, suffix="parquet", source=source, **options):
        output = tmp_path / f"{task}-{len(options)}.{suffix}"
        predict(checkpoint, source, output, task, options=options, keep=["id"] if source.suffix == ".jsonl" else None)
        return lines(output) if suffix == "jsonl" else pyarrow.parquet.read_table(output).to_pylist()

    wanted = Predictor.load(body, "embedding", normalize=True)(TEXTS[:20])
    for suffix in ("parquet", "jsonl"):
        found = table("embedding", body, suffix, normalize=True)
        np.testing.assert_allclose([row["embedding"] for row in found], wanted, atol=1e-6)
        assert list(found[0]) == ["id", "embedding"]
    coded = table("embedding", body, normalize=True, dtype="int8")[3]
    np.testing.assert_allclose(np.array(coded["embedding"]) * coded["scale"], wanted[3], atol=coded["scale"])
    half = pyarrow.parquet.read_schema(tmp_path / "embedding-2.parquet").field("embedding").type
    assert half == pyarrow.list_(pyarrow.int8(), 32)
    assert len(table("embedding", body, dtype="float16", dimensions=8, pooling="max")[0]["embedding"]) == 8
    top = table("text-classification", model, top_k=None)
    assert [len(row["labels"]) for row in top] == [2] * 20 and top[0]["scores"][0] > top[0]["scores"][1]
    tagger = with_head(body, transformers.BertForTokenClassification)
    entities = Predictor.load(tagger)(TEXTS[:20])
    for suffix in ("parquet", "jsonl"):
        found = table("token-classification", tagger, suffix)
        assert [[one["word"] for one in row["entities"]] for row in found] == [[e["word"] for e in r] for r in entities]
    reader = with_head(body, transformers.BertForQuestionAnswering)
    pairs = list(zip(TEXTS[:20], TEXTS[20:40], strict=True))
    (tmp_path / "qa.tsv").write_text("\n".join(["question\tcontext", *map("\t".join, pairs)]))
    answers = Predictor.load(reader)(pairs)
    for suffix in ("parquet", "jsonl"):
        found = table("question-answering", reader, suffix, source=tmp_path / "qa.tsv")
        assert [(row["answer"], row["start"]) for row in found] == [(one["answer"], one["start"]) for one in answers]


def test_bad_rows_go_aside_with_a_reason(model, tmp_path):
    good = '{"id": 1, "text": "the old cat"}'
    bad = {
        b'{"id": 2, "text": "\xff"}': "expected UTF-8, got byte 0xff at character 19",
        b'{"id": 3, "text": null}': "expected a text, got None",
        b'{"id": 4, "text": {"a": ["nested"]}}': "expected a text, got {'a': ['nested']}",
        b'{"id": 5}': "has no column 'text'",
        b'{"id": 6, "text": " "}': "an empty text",
        b'{"id": 7, "text": "half \\ud83d"}': "expected a text, got the lone surrogate '\\ud83d' at character 5",
        b'{"id": 8, "text": "x", "label": 1}': "has a column 'label', as the answer has",
        b"[9]": "expected an object, got [9]",
        b'{"id": 10, "text"': "Expecting ':' delimiter: line 1 column 18 (char 17)",
    }
    long = json.dumps({"id": 11, "text": "cat " * 250_000})
    rows = [good.encode()] * 120 + [*bad, long.encode(), good.encode()]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(rows))
    made = predict(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", shard_rows=60)
    assert (made["rows"], made["written"], made["rejected"], made["truncated"]) == (131, 122, 9, 1)
    found = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [1] * 120 + [11, 1] and len(found[-2]["text"]) == 1_000_000
    aside = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert made["rejected_file"] == str(tmp_path / "out.jsonl.rejected.jsonl")
    for number, (content, reason) in enumerate(bad.items(), start=121):
        said = aside[number - 121]
        assert (said["line"], said["reason"]) == (number, reason)
        assert said["content"].encode("utf-8", "surrogateescape") == content


def test_rows_of_other_types_do_not_fit_in_a_table(model, tmp_path):
    rows = [{"id": at, "text": text} for at, text in enumerate(TEXTS[:40])]
    rows[20] |= {"id": "twenty"}
    rows[30] |= {"surprise": 1}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = predict(model, tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert (made["written"], made["rejected"]) == (38, 2)
    aside = lines(tmp_path / "out.parquet.rejected.jsonl")
    assert aside[0]["reason"].startswith("other columns than the rows before: expected int64 as id in 'twenty'")
    assert aside[1]["reason"] == "other columns than the rows before: expected columns of id, text, got 'surprise'"


@pytest.mark.parametrize("task", ["text-classification", "embedding"])
def test_answers_that_are_no_numbers_are_rejected(model, tmp_path, task):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    broken = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[torch.tensor(tokenizer("cat", add_special_tokens=False).input_ids)] = (
            torch.nan
        )
    shutil.copytree(model, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "in.txt").write_text("it was\ncat\n")
    made = predict(tmp_path / "broken", tmp_path / "in.txt", tmp_path / "out.jsonl", task)
    assert (made["written"], made["rejected"]) == (1, 1)
    (aside,) = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert (aside["line"], aside["reason"]) == (2, "the model's answer holds NaN or infinity")
    with pytest.raises(ValueError, match=r"^Predictor: row 1: the model's answer holds NaN or infinity$"):
        Predictor.load(tmp_path / "broken", task)(["it was", "cat"])


@pytest.mark.parametrize(
    ("first", "other", "kind"),
    [
        (1, 2.5, "int64 as n in 2.5"),
        ({"a": 1}, {"a": 1, "b": 2}, "struct<a: int64> as n in {'a': 1, 'b': 2}"),
        ([{"a": [1]}], [{"a": [1, 0.5]}], "list<item: struct<a: list<item: int64>>> as n in [{'a': [1, 0.5]}]"),
    ],
)
def test_no_part_of_a_cell_is_lost_in_a_table(model, tmp_path, first, other, kind):
    rows = [{"text": "cat", "n": first}] * 1024 + [{"text": "cat", "n": other}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = predict(model, tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert (made["written"], made["rejected"]) == (1024, 1)
    (aside,) = lines(tmp_path / "out.parquet.rejected.jsonl")
    expected = f"other columns than the rows before: expected {kind}: a part of it would be lost"
    assert (aside["line"], aside["reason"]) == (1025, expected)
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [first] * 1024


# What a run leaves that does not end ----------------------------------------------------------------------------------


def forked(work):
    """Run in a child; return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(model, tmp_path, suffix):
    source = jsonl(tmp_path / "in.jsonl", TEXTS * 3)
    with source.open("a") as file:
        file.write('{"text": null}\n')

    def go(output):
        return predict(model, source, output, shard_rows=32)

    start = time.perf_counter()
    go(tmp_path / f"whole.{suffix}")
    seconds = time.perf_counter() - start
    wanted = (tmp_path / f"whole.{suffix}").read_bytes()
    draw = random.Random(5)
    for number in range(cases.many(1, 10)):
        output = tmp_path / f"{number}.{suffix}"
        child = forked(lambda output=output: go(output))
        time.sleep(draw.uniform(0.2, 0.95) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not output.exists():
            go(output)
        assert output.read_bytes() == wanted
        assert lines(tmp_path / f"{number}.{suffix}.rejected.jsonl")[0]["line"] == 901


def test_a_kill_between_the_last_steps(model, tmp_path, monkeypatch):
    """After the rejected rows, after the output, and while the shards are removed."""
    source, output = jsonl(tmp_path / "in.jsonl", [*TEXTS[:40], ""]), tmp_path / "out.jsonl"

    def stop(*arguments, **options):
        raise StopError

    def stopped_at(place, name, **options):
        with monkeypatch.context() as patch, pytest.raises(StopError):
            patch.setattr(place, name, stop)
            predict(model, source, output, shard_rows=32, **options)

    stopped_at(JsonLines, "join")
    assert not output.exists() and Path(f"{output}.rejected.jsonl").exists()
    stopped_at(module, "_remove")
    wanted = output.read_bytes()
    with pytest.raises(RecipeError, match="is there already; give --overwrite or another file"):
        predict(model, source, output, shard_rows=32)
    stopped_at(module.shutil, "rmtree", overwrite=True)
    assert predict(model, source, output, shard_rows=32, overwrite=True)["rejected"] == 1
    assert output.read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.rejected.jsonl"]


class StopError(Exception):
    """Raised by a test in the middle of a run."""


def stopped(model, source, output, after=2, **options):
    """A run that ends after so many shards."""

    def stop(totals, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == after:
            raise StopError

    with pytest.raises(StopError):
        predict(model, source, output, shard_rows=32, each_shard=stop, **options)
    assert not output.exists()


def test_other_settings_and_another_input_are_refused(model, tmp_path):
    source, output = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    stopped(model, source, output)
    with pytest.raises(RecipeError) as raised:
        predict(model, source, output, shard_rows=32, options={"top_k": 2})
    assert str(raised.value) == (
        f"predict: output: '{output}.parts' holds the shards of a run with other settings (top_k: 1 there, 2 given); "
        "give --overwrite to start again, or another file"
    )
    whole = source.read_text()
    source.write_text(whole.replace('"id": 40,', '"id": 41,'))
    with pytest.raises(RecipeError, match=r"has changed since '.*shard-000001' was made of its rows"):
        predict(model, source, output, shard_rows=32)
    source.write_text(whole)
    made = predict(model, source, output, shard_rows=32)
    assert made["resumed_rows"] == 64 and made["rows"] == 300
    stopped(model, source, tmp_path / "more.jsonl")
    made = predict(
        model, source, tmp_path / "more.jsonl", shard_rows=32, options={"function_to_apply": "none"}, overwrite=True
    )
    assert made["resumed_rows"] == 0


def test_a_full_disk_loses_nothing(model, tmp_path):
    source, output = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # a shard fits, the output does not
    try:
        done = run("--model", model, "-i", source, "-o", output, "--shard-rows", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: [Errno 27] predict: could not write '{output}': File too large; all 10 shards are kept in "
        f"'{output}.parts': the same command joins them\n"
    )
    assert not output.exists()
    assert predict(model, source, output, shard_rows=32)["resumed_rows"] == 300 and len(lines(output)) == 300


# What is refused ------------------------------------------------------------------------------------------------------


def refused(message, *arguments, **options):
    done = run(*arguments, **options)
    assert done.exit_code == 2, done.output
    assert done.stderr == f"error: {message}\n"


def test_one_line_for_each_error(model, body, tmp_path):
    source, output = jsonl(tmp_path / "in.jsonl", TEXTS[:3]), tmp_path / "out.jsonl"
    given = ("--model", model, "-i", source, "-o", output)
    refused(
        f"predict: input: '{source}': expected a column body, got id, text, more",
        *(*given, "--column", "body"),
    )
    refused("predict: columns: expected 1 or 2 for text-classification, got 3", *given, *["--column", "text"] * 3)
    refused("predict: keep: expected columns of id, text, more, got 'x'", *given, "--keep", "x")
    refused("predict: Predictor: top_k must be an integer from 1 on, got -1", *given, "--top-k", -1)
    refused(
        "predict: Predictor: option of text-classification must be one of top_k, function_to_apply, got dimensions",
        *(*given, "--dimensions", 3),
    )
    refused(
        "predict: output: expected a name that ends with .jsonl or .parquet, got 'out.csv'",
        *("--model", model, "-i", source, "-o", "out.csv"),
    )
    refused(f"predict: input: no such file: '{tmp_path / 'no.csv'}'", *(*given, "-i", tmp_path / "no.csv"))
    refused(
        "predict: input: standard input: expected a name that ends with one of .csv, .jsonl, .parquet, .tsv, .txt, "
        "or a format, got ''",
        *(*given, "-i", "-"),
    )
    (tmp_path / "bad.jsonl").write_bytes(b"[1]\n[2]\n")
    refused(
        f"predict: input: '{tmp_path / 'bad.jsonl'}': line 1: expected an object, got [1]",
        *(*given, "-i", tmp_path / "bad.jsonl"),
    )
    (tmp_path / "head.csv").write_text("text\n")
    refused(
        f"predict: input: '{tmp_path / 'head.csv'}': holds no rows",
        *(*given, "-i", tmp_path / "head.csv"),
    )
    (tmp_path / "label.csv").write_text("text,label\nx,1\n")
    refused(
        f"predict: input: '{tmp_path / 'label.csv'}': has a column 'label', as the answer has; name the columns to "
        "write with --keep",
        *(*given, "-i", tmp_path / "label.csv"),
    )
    done = run("--model", body, "-i", source, "-o", output, "--task", "text-classification")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "lacks 2 tensors that BertForSequenceClassification needs, or has them in other shapes" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "head.csv", "in.jsonl", "label.csv"]
    output.write_text("mine")
    refused(f"predict: output: '{output}' is there already; give --overwrite or another file", *given)
    assert output.read_text() == "mine"
    refused(f"predict: output: '{source}' is the input; choose another file", *given, "-o", source, "--overwrite")
    assert run(*given, "--overwrite").exit_code == 0 and len(lines(output)) == 3


def test_standard_input_is_left_open(model, tmp_path, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"the old cat\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    predict(model, "-", tmp_path / "out.jsonl", form="txt")
    assert not stdin.buffer.closed


def test_help_teaches():
    done = run("--help")
    assert done.exit_code == 0
    for word in ("--aggregation-strategy", "--shard-rows", "--format", "rejected.jsonl", "Examples", "byte for byte"):
        assert word in done.output
