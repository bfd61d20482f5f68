"""`distilbert-fast serve` as a user starts and stops it, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from demo_input import bert
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.jobs.serve import ModelSpec, model_specs, read_key
from distilbert_fast.jobs.settings import RecipeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("serve") / "my-bert")


def refusal(*arguments) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "100"})
    assert done.exit_code == 2, done.output
    return done.stderr.strip()


def test_a_server_starts_answers_and_stops(model, tmp_path):
    """In a process of its own, stopped by SIGTERM: exit status 0, after it has answered."""
    command = [sys.executable, "-m", "distilbert_fast", "serve", "--model", model, "--port", "0", "--packed", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError("".join(said))
        body = json.dumps({"model": "my-bert", "input": "the old cat"}).encode()
        with urllib.request.urlopen(f"{found[1]}/v1/embeddings", body) as reply:
            assert len(json.load(reply)["data"][0]["embedding"]) == 32
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0
    assert "my-bert" in "".join(said) and "can embed; fp32 by the C++ encoder on cpu" in "".join(said)
    assert "stopping: what was taken is answered first" in rest and "stopped; 1 requests were answered" in rest
    assert (tmp_path / "my-bert-as-is.safetensors").is_file()


def test_what_cannot_be_served_is_said_in_one_line(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("--model", model, "--port", port)
    assert said == f"error: serve: port: {port} is in use at 127.0.0.1; choose another one with --port"
    assert refusal("--model", model, "--port", 70000) == "error: serve: port: expected 0 to 65535, got 70000"
    assert refusal("--model", model, "--host", "10.99.99.99").startswith(
        "error: serve: host: cannot listen at 10.99.99.99, port 8080: "
    )
    assert refusal("--model", model, "--host", "no such host").startswith(
        "error: serve: host: 'no such host' is no address of this machine: "
    )
    assert "error: serve: model 'nowhere'" in refusal("--model", f"nowhere={tmp_path / 'nowhere'}", "--port", 0)
    (tmp_path / "empty").mkdir()
    assert "error: serve: model 'empty'" in refusal("--model", tmp_path / "empty", "--port", 0)
    said = refusal("--model", model, "--task", "token-classification", "--port", 0)
    assert said.startswith("error: serve: model 'my-bert'") and "that BertForTokenClassification needs" in said
    for option, given, words in (
        ("--deadline", 0, "deadline: expected seconds above 0, 86400 at most, got 0.0"),
        ("--queue-tokens", 0, "queue_tokens: expected 1 or more, got 0"),
        ("--body-bytes", 10, "body_bytes: expected 1000 or more, got 10"),
        ("--inputs", 0, "inputs: expected 1 or more, got 0"),
        ("--batch-tokens", 0, "batch_tokens: expected 8 or more, got 0"),
        ("--threads", 0, "threads: expected 1 or more, got 0"),
    ):
        assert refusal("--model", model, option, given) == f"error: serve: {words}"
    said = refusal("--model", model, "--max-length", 9000, "--port", 0)
    assert "max_length must be 1 to 64, what model and tokenizer take, got 9000" in said
    assert "precision must be one of" in refusal("--model", model, "--precision", "int3", "--port", 0)


def test_models_have_names_and_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert model_specs(["org/name", "x=./dir", "."], ["x=embedding"]) == [
        ModelSpec("name", "org/name", None),
        ModelSpec("x", "./dir", "embedding"),
        ModelSpec(tmp_path.name, ".", None),
    ]
    assert model_specs(["org/name"], ["reranking"]) == [ModelSpec("name", "org/name", "reranking")]
    for models, tasks, words in (
        ([], [], "model: expected one or more, got none"),
        (["a/x", "b/x"], [], "model: expected names that differ (NAME=DIR_OR_ID), got 'x' twice"),
        (["x="], [], "model: expected NAME=DIR_OR_ID or DIR_OR_ID, got 'x='"),
        (["a b=c"], [], "model: expected NAME=DIR_OR_ID or DIR_OR_ID, got 'a b=c'"),
        (["a=b"], [], "model: expected NAME=DIR_OR_ID or DIR_OR_ID, got 'a=b'"),  # a directory of that name
        (["x", "y"], ["embedding"], "task: expected NAME=embedding, where there are several models, got 'embedding'"),
        (["x"], ["y=embedding"], "task: expected the name of a model (x), got 'y=embedding'"),
    ):
        with pytest.raises(RecipeError) as raised:
            model_specs(models, tasks)
        assert str(raised.value) == f"serve: {words}"
    with pytest.raises(RecipeError, match=r"serve: task: expected one of text-classification, .*, got 'ner'"):
        model_specs(["x"], ["ner"])


def test_tokens_that_no_header_can_hold(tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILBERT_FAST_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    for content in (b"", b"\n", b"two words\n", "schlüssel".encode()):
        file.write_bytes(content)
        with pytest.raises(RecipeError) as raised:
            read_key(file)
        expected = f"expected a token of ASCII letters, digits and signs in {str(file)!r}"
        assert str(raised.value) == f"serve: api-key-file: {expected}"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"cannot read .*: it is not UTF-8"):
        read_key(file)
    with pytest.raises(RecipeError, match=r"cannot read .*: No such file or directory"):
        read_key(tmp_path / "none")
    monkeypatch.setenv("DISTILBERT_FAST_API_KEY", "")  # nobody means that
    with pytest.raises(RecipeError, match="in DISTILBERT_FAST_API_KEY"):
        read_key(None)


def test_without_the_extra_it_says_what_to_install():
    code = """
import sys
sys.modules["fastapi"] = None
from distilbert_fast import cli
sys.argv = ["distilbert-fast", "serve", "--model", "x"]
cli.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: serve: fastapi is not installed; pip install 'distilbert-fast[serve]'"
