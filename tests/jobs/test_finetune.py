"""`distilbert-fast finetune`: each kind of task learned in seconds, judged as `evaluate` judges, and continued."""

from __future__ import annotations

import json

import pytest
from demo_input import conll, sentences
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.jobs.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("short_clocks")


def run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": "120"})


FAST = ("--epochs", "4", "--batch-size", "16", "--lr", "1e-2", "--max-length", "24")


def test_classes(inputs, tmp_path):
    arguments = ("--model", inputs / "bert", "--data", inputs / "train.tsv", "--eval-data", inputs / "dev.tsv", *FAST)
    done = run(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out/report.json").read_text())
    quality = found["models"]["model"]["quality"]
    assert quality["accuracy"] > 0.9 and "agreement" not in quality
    (result,) = evaluate(None, inputs / "dev.tsv", [str(tmp_path / "out/model")])
    assert result.scored.metrics["accuracy"] == pytest.approx(quality["accuracy"])
    card = ModelCard.load(tmp_path / "out/model/README.md")
    assert card.data.tags == ["fine-tuned", "distilbert_fast"] and "fine-tuned" in card.text
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model", "report.md", "losses.png", "data.json"}
    weights = (tmp_path / "out/model/model.safetensors").read_bytes()
    again = run(*arguments, "-o", tmp_path / "out")
    assert "[1/2] the model: done before" in again.stdout
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == weights
    other = run(*arguments, "-o", tmp_path / "out", "--seed", "1")
    assert other.exit_code == 2 and "holds a finetune-task with other settings (training: " in other.stderr


def test_entities(inputs, tmp_path):
    train, dev = conll(tmp_path / "train.conll", 100, seed=1), conll(tmp_path / "dev.conll", 40, seed=2)
    data = ("--task", "entities", "--data", train, "--eval-data", dev)
    done = run("--model", inputs / "bert", *data, *FAST, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    quality = json.loads((tmp_path / "out/report.json").read_text())["models"]["model"]["quality"]
    (result,) = evaluate("entities", dev, [str(tmp_path / "out/model")])
    assert result.scored.metrics["f1"] == pytest.approx(quality["f1"]) and quality["f1"] > 0.8


def test_questions_of_which_some_have_no_answer(inputs, tmp_path):
    paragraphs = []
    for at, (context, _) in enumerate(sentences(60, seed=1)):
        word = next((word for word in context.split() if word in ("old", "small")), None)
        answers = [] if word is None else [{"text": word, "answer_start": context.index(word)}]
        qas = [{"id": f"q{at}", "question": "one dog", "is_impossible": not answers, "answers": answers}]
        paragraphs.append({"context": context, "qas": qas})
    data = tmp_path / "train.json"
    data.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    out = ("-o", tmp_path / "out")
    refused = run("--model", inputs / "bert", "--task", "squad", "--data", data, *FAST, *out)
    assert refused.exit_code == 2 and "each question must have an answer (SQuAD 1.1)" in refused.stderr
    given = ("--task", "squad_v2", "--data", data, "--eval-data", data, *FAST, "--epochs", "12", "--stride", "4")
    done = run("--model", inputs / "bert", *given, *out)
    assert done.exit_code == 0, done.output
    quality = json.loads((tmp_path / "out/report.json").read_text())["models"]["model"]["quality"]
    (result,) = evaluate("squad_v2", data, [str(tmp_path / "out/model")])
    found = result.scored.metrics
    assert quality == {"exact_match": pytest.approx(found["exact"]), "f1": pytest.approx(found["f1"])}
    assert found["HasAns_exact"] > 60 and found["NoAns_exact"] > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "finetune: epochs: expected above 0, got 0.0"),
        (["--lr", "0"], "finetune: training learning_rate: expected a finite number above 0, got 0.0"),
        (["--max-length", "9999"], "finetune: max_length: expected 4 to "),
        (["--task", "squad", "--data", "nowhere.json"], "load_squad: data: no such file: 'nowhere.json'"),
        (["--task", "cola"], "load_task: data: "),
        (["--model", "nowhere"], "finetune: model: "),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, arguments, message):
    given = ["--model", inputs / "bert", "--data", inputs / "train.tsv", "-o", tmp_path / "out", *arguments]
    done = run(*given)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
