"""`distilbert-fast evaluate --predictions`: one JSON object, tables, warnings, and one line for what is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from distilbert_fast.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def gold(tmp_path):
    asked = [("1", ["the cat", "cat"]), ("2", []), ("3", ["old dog"])]
    qas = [
        {
            "id": name,
            "question": "?",
            "is_impossible": not texts,
            "answers": [{"text": text, "answer_start": 0} for text in texts],
        }
        for name, texts in asked
    ]
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": qas}]}]}
    (tmp_path / "gold.json").write_text(json.dumps(content))
    return tmp_path / "gold.json"


def test_squad_v2(gold, tmp_path, caplog):
    predictions = tmp_path / "pred.json"
    predictions.write_text(json.dumps({"1": "a cat", "2": "", "3": "dog", "4": "x"}))
    arguments = ("--task", "squad_v2", "--data", gold, "--predictions", predictions)
    found = json.loads(run(*arguments, "--json").stdout)
    f1 = 100 * (1 + 2 / 3) / 2
    assert found == {
        **{"exact": 100 * 2 / 3, "f1": 100 * (1 + 1 + 2 / 3) / 3, "total": 3},
        **{"HasAns_exact": 50.0, "HasAns_f1": f1, "HasAns_total": 2, "NoAns_exact": 100.0, "NoAns_f1": 100.0},
        **{"NoAns_total": 1, "best_exact": 100 * 2 / 3, "best_exact_thresh": 0.0},
        **{"best_f1": 100 * (1 + 1 + 2 / 3) / 3, "best_f1_thresh": 0.0},
    }
    assert "1 predictions are of no question of data and do not count: 4" in caplog.text
    (tmp_path / "na.json").write_text(json.dumps({"1": 0.9, "2": 0.1, "3": 0.2, "4": 0.2}))
    found = json.loads(run(*arguments, "--na-prob", tmp_path / "na.json", "--na-prob-thresh", "0.5", "--json").stdout)
    assert (found["exact"], found["HasAns_exact"], found["best_f1_thresh"]) == (100 / 3, 0.0, 0.9)
    shown = run(*arguments)
    assert "3 questions" in shown.output and "66.67" in shown.output
    predictions.write_text(json.dumps({"1": "cat"}))
    assert json.loads(run(*arguments, "--json").stdout)["total"] == 1
    assert "2 questions have no prediction and are left out: 2, 3" in caplog.text


def test_squad_refuses_a_question_without_answers(gold, tmp_path):
    (tmp_path / "pred.json").write_text(json.dumps({"1": "a cat"}))
    done = run("--task", "squad", "--data", gold, "--predictions", tmp_path / "pred.json")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: squad_scores: gold: question '2' has no answer, as only SQuAD 2.0's have; use squad_v2\n"
    )


def test_labels(tmp_path):
    (tmp_path / "dev.tsv").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n0\t3\t4\tc\td\n")
    (tmp_path / "MRPC.tsv").write_text("index\tprediction\n0\t1\n1\t1\n")
    arguments = ("--task", "mrpc", "--data", tmp_path / "dev.tsv", "--predictions", tmp_path / "MRPC.tsv")
    assert json.loads(run(*arguments, "--json").stdout) == {"accuracy": 0.5, "f1": 2 / 3, "n": 2}
    assert "66.67" in run(*arguments).output


@pytest.mark.parametrize("ids", [(2, 0, 1), (70, 50, 60)])
def test_predictions_are_told_by_the_column_index_of_data(tmp_path, ids):
    (tmp_path / "dev.csv").write_text("index,text,label\n" + "".join(f"{at},x,{at == ids[0]}\n" for at in ids))
    rows = "".join(f"{at}\t{at == ids[0]}\n" for at in sorted(ids))
    (tmp_path / "pred.tsv").write_text(f"index\tprediction\n{rows}")
    done = run("--data", tmp_path / "dev.csv", "--predictions", tmp_path / "pred.tsv", "--json")
    assert json.loads(done.stdout)["accuracy"] == 1


@pytest.mark.parametrize(("true", "predicted", "what"), [("3", "45", "labels"), ("34", "5", "predictions")])
def test_a_correlation_that_is_undefined_is_null_with_a_warning(tmp_path, caplog, true, predicted, what):
    data, predictions = tmp_path / "dev.csv", tmp_path / "pred.txt"
    data.write_text("text,label\n" + "".join(f"x,{true[at % len(true)]}\n" for at in range(4)))
    predictions.write_text("".join(f"{predicted[at % len(predicted)]}\n" for at in range(4)))
    arguments = ("--data", data, "--regression", "--predictions", predictions)
    found = json.loads(run(*arguments, "--json").stdout, parse_constant=pytest.fail)
    assert found == {"pearson": None, "spearmanr": None, "mse": 2.5, "n": 4}
    same = {"labels": "3", "predictions": "5"}[what]
    assert caplog.messages == [f"evaluate: all {what} are {same}: pearson and spearmanr undefined"]
    assert "undefined" in run(*arguments).output


def test_entities(tmp_path):
    (tmp_path / "both.conll").write_text("Rome B-LOC B-LOC\nis O O\n\nJohn B-PER O\nDoe I-PER B-PER\n")
    found = json.loads(run("--task", "entities", "--predictions", tmp_path / "both.conll", "--json").stdout)
    assert (found["precision"], found["recall"], found["f1"], found["n"]) == (0.5, 0.5, 0.5, 2)
    assert found["types"]["LOC"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}
    plain = json.loads(run("--task", "tags", "--predictions", tmp_path / "both.conll", "--json").stdout)
    assert plain == {"accuracy": 0.5, "n": 2}
    shown = run("--task", "entities", "--predictions", tmp_path / "both.conll").output
    assert "PER" in shown and "50.00" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "squat", "--predictions", "x"], "evaluate: task: expected one of cola, sst2, "),
        (["--task", "squad", "--predictions", "x"], "evaluate: data: expected the file of true answers beside"),
        (["--task", "rte", "--data", "x", "--predictions", "x"], "evaluate: data: no such file: 'x'"),
        (
            ["--task", "squad", "--data", "x", "--predictions", "x", "--na-prob", "x"],
            "evaluate: na_prob: expected with task squad_v2 alone, got it with squad",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}")
