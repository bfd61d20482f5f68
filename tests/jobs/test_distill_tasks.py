"""`distill` on pairs of sentences, on numbers and on tagged words, with a tiny BERT: what the report says is true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo_input import bert, conll, pairs_tsv, sentences

pytest.importorskip("datasets")

from jobs.quick import FAST, TEACHING, same, task_job

from distilbert_fast.data.tasks import load_task
from distilbert_fast.data.tokens import load_tokens
from distilbert_fast.distillation.objectives.task import is_regression
from distilbert_fast.distillation.teachers.model import ModelTeacher
from distilbert_fast.evaluation.entity_scores import entity_scores
from distilbert_fast.jobs.distill import Recipe, Training, distill
from distilbert_fast.jobs.flow import RecipeError
from distilbert_fast.jobs.settings import check_models
from distilbert_fast.jobs.task import RegressionJob, TaskJob
from distilbert_fast.jobs.tokens import TokensJob
from distilbert_fast.modeling.loading import load_with_head

pytestmark = pytest.mark.usefixtures("short_clocks")


def test_pairs(inputs, tmp_path, monkeypatch):
    """A BERT teacher reads which sentence is which; the DistilBERT student does without."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    seen = []
    answer = ModelTeacher.answer

    def spy(self, batch, *args, **kwargs):
        seen.append(int(batch["token_type_ids"].max()))
        return answer(self, batch, *args, **kwargs)

    monkeypatch.setattr(ModelTeacher, "answer", spy)
    dev = pairs_tsv(tmp_path / "dev.tsv", 40, seed=2)
    job = TaskJob(load_task(data=pairs_tsv(tmp_path / "train.tsv", 320, seed=1), eval_data=dev), max_length=24)
    teaching = Training(epochs=6, batch_size=16, micro_batch=16, learning_rate=5e-3)
    report = distill(job, tmp_path / "out", inputs / "bert", Recipe(FAST, teaching))
    assert set(seen) == {1}
    assert report["data"]["pairs"] == "premise, hypothesis"
    assert report["models"]["teacher"]["quality"]["accuracy"] > 0.8  # which half of the words would give
    rows = [line.split("\t") for line in dev.read_text().splitlines()[1:]]
    for name, row in report["models"].items():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        right = 0
        for premise, hypothesis, label in rows:
            encoded = tokenizer(premise, hypothesis, truncation=True, max_length=24, return_tensors="pt")
            with torch.no_grad():
                right += model.config.id2label[int(model(**encoded).logits.argmax())] == label
        assert row["quality"]["accuracy"] == pytest.approx(right / 40)


def numbers_tsv(path: Path, count: int, seed: int) -> Path:
    """How many of three a sentence holds: numbers that a mean over tokens can tell."""
    rows = [(text, sum(word in ("the", "a", "old") for word in text.split()) / 2) for text, _ in sentences(count, seed)]
    path.write_text("\n".join(["sentence\tlabel", *(f"{text}\t{number}" for text, number in rows)]) + "\n")
    return path


def test_numbers(inputs, tmp_path):
    """A regression with both of its rivals."""
    from scipy.stats import pearsonr, spearmanr
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    dev = numbers_tsv(tmp_path / "dev.tsv", 40, seed=2)
    train = numbers_tsv(tmp_path / "train.tsv", 240, seed=1)
    job = RegressionJob(load_task(data=train, eval_data=dev, regression=True), max_length=16)
    teaching = Training(epochs=None, batch_size=16, micro_batch=16, learning_rate=5e-3)
    names = [variant.name for variant in RegressionJob.variants]
    report = distill(job, tmp_path / "out", inputs / "bert", Recipe(FAST, teaching, compare=names))
    assert report["data"]["numbers"].startswith("0 to ") and "classes" not in report["data"]
    texts, labels = zip(*(line.split("\t") for line in dev.read_text().splitlines()[1:]), strict=True)
    labels = [float(label) for label in labels]
    found = {}
    for name, row in report["models"].items():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
        with torch.no_grad():
            found[name] = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
        quality = row["quality"]
        assert quality["pearson"] == pytest.approx(pearsonr(found[name], labels).statistic, abs=1e-4)
        assert quality["spearman"] == pytest.approx(spearmanr(found[name], labels).statistic, abs=1e-2)
        assert quality["mse"] == pytest.approx(float((found[name] - torch.tensor(labels)).square().mean()), rel=1e-3)
        assert row["int8"]["pearson"] == pytest.approx(quality["pearson"], abs=0.05)
        if name != "teacher":
            apart = float((found[name] - found["teacher"]).square().mean())
            assert quality["teacher_mse"] == pytest.approx(apart, rel=1e-3)
    assert report["models"]["teacher"]["quality"]["pearson"] > 0.5
    assert report["models"]["student"]["quality"]["pearson"] > 0.4
    assert set(report["models"]["student"]["losses"][0]) == {"step", "loss", "teacher_mse", "label_mse"}
    assert set(report["models"]["without-teacher"]["losses"][0]) == {"step", "loss", "label_mse"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| weight file | Pearson | Spearman | MSE | MSE from the teacher | Pearson, int8 |" in text
    assert "squares of the labels' unit" in (tmp_path / "out" / "student" / "README.md").read_text()
    (answer,) = pipeline("text-classification", str(tmp_path / "out" / "student"))(texts[0])
    assert answer["score"] == pytest.approx(float(found["student"][0]), abs=1e-4)  # no sigmoid

    # its head serves again, but not for classes
    *_, random = load_with_head(tmp_path / "out" / "teacher", job.head, **job.config)
    assert random == ()
    other, _, random = load_with_head(tmp_path / "out" / "teacher", job.head, True, **task_job(inputs).config)
    assert random == ("classifier.bias", "classifier.weight") and not is_regression(other)


OTHER_HEADS = [
    (
        "SequenceClassification",
        {"num_labels": 1, "problem_type": "multi_label_classification"},
        "numbers",
        None,
        "teacher: expected problem_type regression, got multi_label_classification; train it on the data "
        "(teacher_epochs)",
    ),
    (
        "SequenceClassification",
        {"problem_type": "multi_label_classification"},
        "classes",
        None,
        "teacher: expected problem_type single_label_classification, got multi_label_classification; train it on the "
        "data (teacher_epochs)",
    ),
    (
        "MultipleChoice",
        {},
        "numbers",
        None,
        "teacher: expected a model for SequenceClassification, got BertForMultipleChoice; train it on the data "
        "(teacher_epochs)",
    ),
    (
        "SequenceClassification",
        {"num_labels": 4},
        "tags",
        None,
        "teacher: expected a model for TokenClassification, got BertForSequenceClassification; train it on the data "
        "(teacher_epochs)",
    ),
    (
        "SequenceClassification",
        {"num_labels": 3},
        "numbers",
        0.0,
        "checkpoint: {source!r} lacks 2 tensors that BertForSequenceClassification needs, or has them in other shapes: "
        "classifier.bias, classifier.weight",
    ),
]


@pytest.mark.parametrize(("head", "config", "labels", "epochs", "message"), OTHER_HEADS)
def test_a_head_for_something_else_is_not_taken_for_the_task(inputs, tmp_path, head, config, labels, epochs, message):
    """Its tensors may have the same names and shapes."""
    import transformers

    source = bert(tmp_path / "bert")
    getattr(transformers, f"BertFor{head}").from_pretrained(source, **config).save_pretrained(source)
    job = task_job(inputs)
    if labels == "numbers":
        data = numbers_tsv(tmp_path / "train.tsv", 20, seed=1)
        job = RegressionJob(load_task(data=data, eval_data=data, regression=True), max_length=16)
    if labels == "tags":
        data = conll(tmp_path / "train.conll", 20, seed=1)
        job = TokensJob(load_tokens(data=data, eval_data=data), max_length=16)
    with pytest.raises(RecipeError) as caught:
        check_models(job, source, Recipe(teacher=Training(epochs=epochs)))
    assert str(caught.value) == f"distill: {message.format(source=str(source))}"
    check_models(job, source, Recipe(teacher=Training(epochs=1.0)))


def test_a_job_for_the_other_labels(inputs, tmp_path):
    data = numbers_tsv(tmp_path / "train.tsv", 20, seed=1)
    with pytest.raises(ValueError, match=r"^TaskJob: task must have classes as labels, got numbers$"):
        TaskJob(load_task(data=data, eval_data=data, regression=True))
    with pytest.raises(ValueError, match=r"^RegressionJob: task must have numbers as labels, got classes$"):
        RegressionJob(load_task(data=inputs / "train.tsv"))


def test_words(inputs, tmp_path):
    """Long sentences in pieces; again, with a teacher that knows more tags than the data has."""
    from huggingface_hub import ModelCard
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    dev = conll(tmp_path / "dev.conll", 40, seed=2)
    train = conll(tmp_path / "train.conll", 240, seed=1)
    job = TokensJob(load_tokens(data=train, eval_data=dev), max_length=7)
    recipe = Recipe(FAST, TEACHING, compare=["without-teacher"])
    report = distill(job, tmp_path / "out", inputs / "bert", recipe)
    blocks = [block.splitlines() for block in dev.read_text().split("\n\n")[1:]]
    rows = [[line.split(" ")[::2] for line in block if line] for block in blocks]
    for name, row in report["models"].items():
        model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        found = []
        for sentence in rows:
            words, tags = [word for word, _ in sentence], []  # each of them one token
            for start in range(0, len(words), 5):
                with torch.no_grad():
                    logits = model(**tokenizer(" ".join(words[start : start + 5]), return_tensors="pt")).logits[0, 1:-1]
                tags += [model.config.id2label[int(tag)] for tag in logits.argmax(1)]
            found.append(tags)
        true = [[tag for _, tag in sentence] for sentence in rows]
        right = [one == other for pair in zip(found, true, strict=True) for one, other in zip(*pair, strict=True)]
        assert row["quality"]["accuracy"] == pytest.approx(sum(right) / len(right))
        assert row["quality"]["f1"] == pytest.approx(entity_scores(found, true)[0].f1)
    assert report["models"]["teacher"]["quality"]["f1"] > 0.8
    assert report["models"]["student"]["quality"]["f1"] > 0.5
    assert {"agreement", "kl"} < set(report["models"]["student"]["quality"])
    assert set(report["models"]["student"]["losses"][0]) == {"step", "loss", "kl", "ce"}
    card = ModelCard.load(tmp_path / "out" / "student" / "README.md")
    assert card.data.pipeline_tag == "token-classification"
    assert "model = AutoModelForTokenClassification.from_pretrained" in card.text
    assert (tmp_path / "out" / ".distill-tokens.json").is_file()
    assert report["kind"] == "tokens" and "O, B-animal, I-animal, B-tool" in card.text

    few = "".join(f"{word} {tag}\n" for sentence in rows for word, tag in sentence if tag != "I-animal")
    (tmp_path / "few").write_text(few)
    fewer = TokensJob(load_tokens(data=tmp_path / "few", eval_data=tmp_path / "few"), max_length=16)
    again = distill(fewer, tmp_path / "again", tmp_path / "out" / "teacher", Recipe(FAST, TEACHING))
    assert again["models"]["teacher"]["losses"] == []  # its head serves
    assert same(tmp_path / "again" / "teacher", tmp_path / "out" / "teacher")
