"""The command prune on a small model: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from demo_input import bert, tsv
from typer.testing import CliRunner

import distilbert_fast  # noqa: F401, so that transformers reads what it writes
from distilbert_fast.cli import app
from distilbert_fast.jobs.prune import share


@pytest.fixture
def place(tmp_path, monkeypatch):
    """classifier/ and train.tsv."""
    directory = bert(tmp_path / "classifier")
    torch.manual_seed(0)
    labels = {"id2label": {0: "animal", 1: "tool"}, "label2id": {"animal": 0, "tool": 1}}
    model = transformers.BertForSequenceClassification.from_pretrained(directory, **labels)
    model.save_pretrained(directory)
    tsv(tmp_path / "train.tsv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["prune", *arguments], env={"COLUMNS": "100"})


def test_a_speed_is_a_share_of_the_time():
    assert share(None, None, 4.0) == (0.75, "time")
    assert share(None, None, None) == (0.5, "parameters")
    assert share(0.3, "flops", None) == (0.3, "flops")


@pytest.mark.parametrize("options", [[], ["--method", "fisher", "--measure", "flops"]])
def test_a_model_is_pruned_measured_and_written(options, place):
    result = run("--model", "classifier", "--data", "train.tsv", "--amount", "0.3", "-o", "out", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads((place / "out/report.json").read_text())
    assert report["pruning"]["cost_after"] <= 0.7 * report["pruning"]["cost_before"]
    assert set(report["results"]["pruned"]) >= {"accuracy", "agreement", "kl"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "out")
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]["pruned"] < report["parameters"]["whole"]
    transformers.AutoTokenizer.from_pretrained(place / "out")
    assert "layer 0:" in result.stdout and "written to out" in result.stdout
    again = run("--model", "classifier", "--data", "train.tsv", "-o", "out")
    assert again.exit_code == 2
    assert again.stderr == "error: prune: output: 'out' is there already; give --overwrite or another directory\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--amount", "1.5"], "prune_model: amount must be a share above 0 and below 1, got 1.5"),
        (["--measure", "size"], "prune_model: measure must be one of 'parameters', 'flops', 'time', got 'size'"),
        (["--speedup", "2", "--amount", "0.5"], "prune: --speedup: expected without --amount, got both"),
        (["--speedup", "2", "--measure", "flops"], "prune: --speedup: expected --measure time, got flops"),
        (["--speedup", "0.5"], "prune: speedup: expected above 1, got 0.5"),
        (["--speedup", "1000"], "prune: prune_model: amount must be below 0."),
        (["--sentences", "0"], "prune: sentences: expected 1 or more, got 0"),
        (["--model", "nowhere"], "prune: model: checkpoint: "),
    ],
)
def test_what_it_refuses(options, message, place):
    result = run("--model", "classifier", "--data", "train.tsv", "-o", "out", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert not (place / "out").exists()
