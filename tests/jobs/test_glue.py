"""`distilbert-fast evaluate glue`: a model for each task, and the data sets of the hub."""

from __future__ import annotations

import json
from statistics import mean

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from demo_input import bert, sentences
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.data.published import PUBLISHED_TASKS
from distilbert_fast.jobs.evaluate import evaluate
from distilbert_fast.jobs.settings import RecipeError


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Models of two seeds for cola, stsb and mnli, and files of GLUE."""
    path = tmp_path_factory.mktemp("glue")
    for seed in (0, 1):
        for name in ("cola", "stsb", "mnli"):
            encoder = bert(path / f"s{seed}" / name)
            torch.manual_seed(seed)
            classes = len(PUBLISHED_TASKS[name].classes) or 1
            model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=classes)
            torch.nn.init.normal_(model.classifier.weight)
            model.save_pretrained(encoder)
    texts = [text for text, _ in sentences(60, seed=1)]
    files = {
        "CoLA/dev.tsv": [f"gj04\t{at % 2}\t\t{text}" for at, text in enumerate(texts)],
        "STS-B/dev.tsv": ["sentence1\tsentence2\tscore", *(f"{a}\t{a}\t{at % 5}.2" for at, a in enumerate(texts))],
        "MNLI/dev_matched.tsv": ["sentence1\tsentence2\tgold_label", *(f"{a}\t{a}\tneutral" for a in texts)],
        "mnli/dev_mismatched.tsv": ["sentence1\tsentence2\tgold_label", *(f"{a}\t{a}\tentailment" for a in texts)],
        "RTE/dev.tsv": ["index\tsentence1\tsentence2\tlabel"],
    }
    for name, lines in files.items():
        (path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "data" / name).write_text("\n".join(lines) + "\n")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", "glue", *map(str, arguments)], env={"COLUMNS": "120"})


def test_all_that_is_there(glue):
    done = run("--model-dir", glue / "s0/{task}", "--data-dir", glue / "data", "--json", "-o", glue / "out")
    found = json.loads(done.stdout)
    assert json.loads((glue / "out/evaluation.json").read_text()) == found
    assert [*found["tasks"]] == ["cola", "stsb", "mnli", "mnli_mismatched"]
    assert found["left_out"]["rte"] == f"no model {glue / 's0/rte'}"
    assert found["left_out"]["ax"] == f"no file {glue / 'data/diagnostic/diagnostic-full.tsv'}"
    of = {name: one["results"][0]["metrics"] for name, one in found["tasks"].items()}
    both = mean([of["mnli"]["accuracy"], of["mnli_mismatched"]["accuracy"]])
    stsb = mean([of["stsb"]["pearson"], of["stsb"]["spearmanr"]])
    assert found["mean"] == {"transformers": pytest.approx(mean([of["cola"]["matthews_correlation"], stsb, both]))}
    assert (glue / "out/cola/cola-transformers.tsv").is_file()


def test_seeds(glue):
    models = ("--model-dir", glue / "s0/{task}", "--model-dir", glue / "s1/{task}")
    done = run(
        *models, "--data-dir", glue / "data", "--tasks", "cola, mnli", "--precision", "fp32", "-o", glue / "both"
    )
    assert sorted(path.name for path in (glue / "both/cola").glob("*.tsv")) == ["s0-cola-fp32.tsv", "s1-cola-fp32.tsv"]
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [row[0] for row in rows[2:]] == ["cola", "mnli", "mean"]
    assert rows[2][1:3] == ["60", "matthews_correlation"] and rows[2][5] == "to"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-dir", "models"], "evaluate: model_dir: expected {task} where the task's name stands, got 'models'"),
        (["--model-dir", "m/{task}", "--tasks", "sst3"], "evaluate: tasks: expected of cola, sst2, mrpc, "),
        (["--model-dir", "./m/{task}", "--tasks", "rte"], "evaluate: glue: rte: no model ./m/rte"),
        (
            ["--model-dir", "./m/{task}"],
            "evaluate: glue: expected a model and a file for at least one task, got none: no ",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {message}")


def test_the_hub(glue, monkeypatch):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["unacceptable", "acceptable"])})
    rows = Dataset.from_dict({"sentence": ["the cat", "a dog"], "label": [1, 0]}, features)
    asked = []

    def load_dataset(*parts):
        asked.append(parts)
        return DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (result,) = evaluate("cola", None, [str(glue / "s0/cola")])
    assert result.scored.count == 2 and asked == [("nyu-mll/glue", "cola")]
    with pytest.raises(
        RecipeError, match=r"^evaluate: data: expected a file, since ax is not read from the hub, got none"
    ):
        evaluate("ax", None, [str(glue / "s0/mnli")])
