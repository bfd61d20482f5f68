"""The command prune on a small model: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from demo_input import bert, tsv
from safetensors.torch import load_file
from typer.testing import CliRunner

import distilbert_fast  # noqa: F401, so that transformers reads what it writes
from distilbert_fast.cli import app
from distilbert_fast.jobs.prune import share
from distilbert_fast.sparse import SparseLinear


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
    ("options", "left"),
    [(["--amount", "0.8"], 0.2), (["--amount", "0.8", "--scope", "global"], 0.2), (["--pattern", "2:4"], 0.5)],
)
def test_single_weights_are_pruned(options, left, place):
    result = run("--model", "classifier", "--data", "train.tsv", "--connections", "-o", "out", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads((place / "out/report.json").read_text())
    assert report["pruning"]["left"] == pytest.approx(left * report["pruning"]["weights"], abs=12)
    assert set(report["results"]["pruned"]) >= {"accuracy", "agreement", "kl"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "out")
    masks = {name: int(m.mask.sum()) for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert masks == report["pruning"]["layers"] and len(masks) == 12
    assert (len(set(masks.values())) > 3) == ("global" in options)
    whole, pruned = (load_file(place / name / "model.safetensors") for name in ("classifier", "out"))
    sizes = {"whole": sum(x.nbytes for x in whole.values()), "pruned": sum(x.nbytes for x in pruned.values())}
    assert report["bytes"] == sizes and sizes["pruned"] < sizes["whole"]
    gone = report["pruning"]["weights"] - report["pruning"]["left"]
    assert report["parameters"]["whole"] - report["parameters"]["pruned"] == gone
    card = (place / "out/README.md").read_text()
    assert f"({left:.1%})" in card and "- sparse" in card and f"{sizes['pruned'] / 1e6:.1f} MB" in card
    assert f"accuracy {report['results']['pruned']['accuracy']:.4f}" in card


def test_what_is_pruned_may_become_sparse(place):
    assert run("--model", "classifier", "--data", "train.tsv", "--amount", "0.3", "-o", "half").exit_code == 0
    card = (place / "half/README.md").read_text()
    assert "- pruned" in card and "heads, " in card and "neurons" in card
    again = run("--model", "half", "--data", "train.tsv", "--connections", "--amount", "0.5", "-o", "both")
    assert again.exit_code == 0, again.stderr
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "both")
    assert any(isinstance(m, SparseLinear) for m in model.modules())


def test_a_file_that_grows_is_refused(place):
    """Without 2 % of its weights a layer is larger than with all: each has a bit."""
    result = run("--model", "classifier", "--data", "train.tsv", "--connections", "--amount", "0.02", "-o", "out")
    assert result.exit_code == 2 and not (place / "out").exists()
    assert result.stderr.startswith("error: prune: result: expected less than the ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--amount", "1.5"], "prune_model: amount must be a share above 0 and below 1, got 1.5"),
        (["--measure", "size"], "prune_model: measure must be one of 'parameters', 'flops', 'time', got 'size'"),
        (["--speedup", "2", "--amount", "0.5"], "prune: --speedup: expected without --amount, got both"),
        (["--speedup", "2", "--measure", "flops"], "prune: --speedup: expected --measure time, got flops"),
        (["--speedup", "0.5"], "prune: speedup: expected above 1, got 0.5"),
        (["--speedup", "1000"], "prune: prune_model: amount must be below 0."),
        (["--connections", "--amount", "1"], "SparsityConfig: amount must be above 0 and below 1, got 1.0"),
        (["--connections", "--scope", "row"], "SparsityConfig: scope must be one of 'layer', 'global', got 'row'"),
        (
            ["--connections", "--pattern", "2:4", "--amount", "0.6"],
            "SparsityConfig: amount must be 0.5 for the pattern 2:4, got 0.6",
        ),
        (["--connections", "--speedup", "2"], "prune: --speedup: expected no --connections with it, got 2.0"),
        (["--connections", "--method", "fisher"], "prune: --method: expected no --connections with it, got fisher"),
        (["--scope", "global"], "prune: --scope: expected --connections with it, got global"),
        (["--sentences", "0"], "prune: sentences: expected 1 or more, got 0"),
        (["--model", "nowhere"], "prune: model: checkpoint: "),
    ],
)
def test_what_it_refuses(options, message, place):
    result = run("--model", "classifier", "--data", "train.tsv", "-o", "out", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert not (place / "out").exists()
