"""Any number of labels a row, end to end: fine-tuned, distilled, judged by a Trainer's numbers and from a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from demo_input import WORDS, sentences
from sklearn.metrics import average_precision_score, f1_score
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.data.tasks import load_task
from distilbert_fast.distillation.objectives.task import MultiLabelObjective
from distilbert_fast.jobs.evaluate import Settings, evaluate
from distilbert_fast.jobs.score import score
from distilbert_fast.jobs.task import MultiLabelJob, TaskJob

pytestmark = pytest.mark.usefixtures("short_clocks")
NAMES = ["animal", "old", "tool"]
FAST = ("--epochs", 4, "--batch-size", 16, "--micro-batch", 16, "--lr", "1e-2", "--max-length", 24)


def lists(path, count, seed):
    """Sentences with what they mention: animals, tools, something old, in any number."""
    rows = []
    for text, _ in sentences(count, seed):
        used = {kind for kind, words in WORDS.items() if set(words) & set(text.split())}
        rows.append({"sentence": text, "labels": sorted(used | ({"old"} & set(text.split())))})
    for at in range(0, count, 8):  # neither animal nor tool
        rows[at] = {"sentence": f"the small one near my {'old ' * (at % 16 == 0)}a", "labels": ["old"] * (at % 16 == 0)}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("lists")
    return lists(path / "train.jsonl", 160, 1), lists(path / "dev.jsonl", 48, 2)


def run(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def taught(data, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "out"
    files = ("--data", data[0], "--eval-data", data[1])
    run("finetune", "--model", inputs / "bert", *files, *FAST, "-o", out)
    return out


def test_finetuned_and_judged(data, taught, tmp_path):
    quality = json.loads((taught / "report.json").read_text())["models"]["model"]["quality"]
    assert quality["micro_f1"] > 0.8 and quality["mean_ap"] > 0.8
    config = transformers.AutoConfig.from_pretrained(taught / "model")
    assert config.problem_type == "multi_label_classification"
    assert [config.id2label[at] for at in range(3)] == NAMES
    results = evaluate(None, data[1], [str(taught / "model")], Settings(("transformers", "fp32"), output=tmp_path))
    assert results[0].scored.metrics == pytest.approx(quality)
    assert results[0].scored.metrics == pytest.approx(results[1].scored.metrics)
    assert score(None, data[1], tmp_path / "model-fp32.jsonl") == results[1].scored
    tokenizer = transformers.AutoTokenizer.from_pretrained(taught / "model")
    rows = [json.loads(line) for line in data[1].read_text().splitlines()]
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = transformers.AutoModelForSequenceClassification.from_pretrained(taught / "model")(**batch).logits
    true = np.array([[name in row["labels"] for name in NAMES] for row in rows])
    chosen, found = (logits > 0).numpy(), results[0].scored.metrics
    assert found["micro_f1"] == f1_score(true, chosen, average="micro")
    assert found["macro_f1"] == f1_score(true, chosen, average="macro")
    assert found["mean_ap"] == pytest.approx(average_precision_score(true, logits.sigmoid().numpy()))


def test_distilled(data, taught, tmp_path):
    files = ("--data", data[0], "--eval-data", data[1], "--teacher", taught / "model")
    run("distill", "task", *files, *FAST, "-o", tmp_path / "out")
    models = json.loads((tmp_path / "out/report.json").read_text())["models"]
    assert models["teacher"]["losses"] == []  # it had its head
    assert models["student"]["quality"]["micro_f1"] > 0.7 and models["student"]["quality"]["agreement"] > 0.7
    assert set(models["student"]["losses"][0]) == {"step", "loss", "kl", "ce"}


def test_the_loss_by_torch():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    config.problem_type = "multi_label_classification"
    student, teacher = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    for model in (student, teacher):
        torch.nn.init.normal_(model.classifier.weight, std=3.0)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    batch = {"input_ids": torch.randint(20, (2, 5)), "labels": labels}

    class Given:
        model = teacher

        def answer(self, batch):
            return self

        def logits(self):
            return teacher(input_ids=batch["input_ids"])

    with torch.no_grad():
        step = MultiLabelObjective(2.0, 0.5)(student, Given(), batch, 0.0)
        mine, theirs = (model(input_ids=batch["input_ids"]).logits.double() for model in (student, teacher))
        kl = torch.distributions.kl_divergence(*(torch.distributions.Bernoulli(logits=x / 2) for x in (theirs, mine)))
        assert float(step.sums[0]) == pytest.approx(4 * float(kl.sum()), rel=1e-4)
        loss = student(**batch).loss  # transformers' own, the mean over all labels
    counts = MultiLabelObjective(2.0, 0.5).counts(batch)
    assert counts.tolist() == [6, 6] and float(step.sums[1] / 6) == pytest.approx(float(loss), rel=1e-6)


def test_what_is_refused(data, inputs, taught, tmp_path):
    with pytest.raises(ValueError, match=r"^TaskJob: task must have classes as labels, got lists of classes$"):
        TaskJob(load_task(data=data[0]))
    with pytest.raises(ValueError, match=r"^MultiLabelJob: task must have lists of classes as labels, got classes$"):
        MultiLabelJob(load_task(data=inputs / "train.tsv"))
    for task, file, message in (
        (
            None,
            inputs / "dev.tsv",
            "data: expected lists of labels for a model of problem_type multi_label_classification",
        ),
        (
            None,
            tmp_path / "other.jsonl",
            "data: expected the model's labels 'animal', 'old', 'tool', got 'bird', 'tool'",
        ),
    ):
        (tmp_path / "other.jsonl").write_text('{"sentence": "a", "label": ["tool", "bird"]}\n')
        with pytest.raises(ValueError, match=f"^evaluate: {message}"):
            evaluate(task, file, [str(taught / "model")])
    with pytest.raises(
        ValueError, match=r"^load_task: eval_data: expected lists as labels where data has lists, got single"
    ):
        load_task(data=data[0], eval_data=inputs / "dev.tsv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": ["tool"]}\n', ": expected a prediction for each of the 48 rows of data, got 1"),
        ('{"labels": "tool"}\n', ": line 1: expected an object with a list as labels, got "),
        ('{"labels": ["tool", ["x"]]}\n', ": line 1: expected an object with a list as labels, got "),
        ('{"labels": [], "scores": [1]}\n', ": line 1: expected an object of numbers as scores, got [1]"),
        ('{"labels": [], "scores": {"a": 1}}\n{"labels": []}\n', ": line 2: expected scores of the same labels as in"),
        ("{\n", ": line 1: Expecting property name"),
    ],
)
def test_predictions_that_are_refused(data, tmp_path, text, message):
    (tmp_path / "pred.jsonl").write_text(text)
    with pytest.raises(ValueError) as caught:
        score(None, data[1], tmp_path / "pred.jsonl")
    assert str(caught.value).startswith(f"evaluate: predictions: {str(tmp_path / 'pred.jsonl')!r}{message}")


def test_labels_in_the_order_of_a_model(data):
    task = load_task(data=data[0], eval_data=data[1])
    assert task.multi_label and task.label_names == tuple(NAMES) and set(task.train["label"][0]) <= {0.0, 1.0}
    turned = task.for_classes(["TOOL", "animal", "old"], kept=True)
    assert turned.label_names == ("tool", "animal", "old")
    assert [row[1:] + row[:1] for row in turned.train["label"]] == list(task.train["label"])
