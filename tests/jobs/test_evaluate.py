"""`distilbert-fast evaluate --model`: the numbers of a Trainer, in each precision, and files that score the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from demo_input import WORDS, bert, conll, sentences, tsv
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.data.published import PUBLISHED_TASKS
from distilbert_fast.evaluation.metrics import predictions
from distilbert_fast.jobs.evaluate import Settings, evaluate, file_names
from distilbert_fast.jobs.judges import judge_of, matched
from distilbert_fast.jobs.score import score
from distilbert_fast.jobs.settings import RecipeError


def model(path, head, seed=0, **config):
    """A random model with a head that is not indifferent."""
    encoder = bert(path / f"bert-{head}-{seed}")
    torch.manual_seed(seed)
    kind = getattr(transformers, f"AutoModelFor{head}")
    made = kind.from_pretrained(encoder, **config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "classifier" in name or "qa_outputs" in name:
                weight.normal_()
    made.save_pretrained(encoder)
    return encoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def classifier(directory):
    names = dict(enumerate(sorted(WORDS)))
    return model(directory, "SequenceClassification", num_labels=2, id2label=names)


def trainer_logits(path, texts, labels, out):
    """What a Trainer's own evaluation computes, with its defaults."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
    encoded = tokenizer(*map(list, columns), truncation=True)
    rows = [
        {**{name: cells[at] for name, cells in encoded.items()}, "labels": label} for at, label in enumerate(labels)
    ]
    trainer = transformers.Trainer(
        transformers.AutoModelForSequenceClassification.from_pretrained(path),
        transformers.TrainingArguments(str(out), report_to="none", use_cpu=True, disable_tqdm=True),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    return trainer.predict(rows).predictions


def test_classes_as_a_trainer_evaluates_them(classifier, directory):
    data = tsv(directory / "dev.tsv", 60, seed=2)
    texts, labels = zip(*sentences(60, seed=2), strict=True)
    true = [sorted(WORDS).index(label) for label in labels]
    logits = trainer_logits(classifier, texts, true, directory / "trainer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    ours = predictions(
        transformers.AutoModelForSequenceClassification.from_pretrained(classifier), tokenizer, texts, 8, in_order=True
    )
    assert np.array_equal(ours.numpy(), logits)  # bit for bit
    (result,) = evaluate(None, data, [str(classifier)])
    assert result.scored.metrics["accuracy"] == accuracy_score(true, logits.argmax(1))
    assert result.scored.metrics["f1"] == f1_score(true, logits.argmax(1))
    assert result.scored.count == 60 and 0 < result.scored.errors["accuracy"] < 0.1


def test_numbers_as_a_trainer_evaluates_them(directory):
    path = model(directory, "SequenceClassification", 1, num_labels=1)
    drawn = [text for text, _ in sentences(40, seed=4)]
    pairs = list(zip(drawn[:20], drawn[20:], strict=True))
    (directory / "sts.csv").write_text(
        "".join(f"m\tx\ty\t{at}\t{at % 6}.5\t{a}\t{b}\n" for at, (a, b) in enumerate(pairs))
    )
    true = [at % 6 + 0.5 for at in range(20)]
    logits = trainer_logits(path, pairs, true, directory / "trainer")
    (result,) = evaluate("stsb", directory / "sts.csv", [str(path)], Settings(batch_size=8))
    assert result.scored.metrics["pearson"] == pearsonr(logits[:, 0].astype(float), true)[0]


def test_precisions_and_seeds_side_by_side(classifier, directory):
    other = model(directory, "SequenceClassification", 2, num_labels=2, id2label=dict(enumerate(sorted(WORDS))))
    data, out = tsv(directory / "seeds.tsv", 40, seed=5), directory / "out"
    arguments = ["evaluate", "--data", data, "--model", classifier, "--model", other, "-o", out]
    arguments = [*map(str, arguments), "--precision", "transformers,fp32,int8"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(done.stdout)
    assert json.loads((out / "evaluation.json").read_text()) == found
    assert [one["precision"] for one in found["results"]] == ["transformers", "fp32", "int8"] * 2
    rows = [one["metrics"] for one in found["results"]]
    assert rows[0] == rows[1] and rows[3] == rows[4]
    middle = (rows[0]["accuracy"] + rows[3]["accuracy"]) / 2
    assert found["summary"]["transformers"]["accuracy"]["median"] == middle
    for one, row in zip(found["results"], rows, strict=True):  # what was written scores the same without a model
        name = f"{one['model'].rpartition('/')[2]}-{one['precision']}.tsv"
        assert score(None, data, out / name).metrics == row
    for terminal in ({}, {"TERM": "dumb", "FORCE_COLOR": "1"}):  # rich takes the second for one of 80 columns
        lines = CliRunner().invoke(app, arguments, env={"COLUMNS": None, **terminal}).stdout.splitlines()
        assert lines[0].endswith("40 rows")
        assert [line for line in lines if line.startswith(" median of 2 ") and " int8 " in line], lines


def test_entities(directory, caplog):
    names = dict(enumerate(["O", "B-animal", "B-tool"]))
    path = model(directory, "TokenClassification", num_labels=3, id2label=names)
    data, out = conll(directory / "dev.conll", 30, seed=3), directory / "tags"
    results = evaluate("entities", data, [str(path)], Settings(("transformers", "fp32"), output=out))
    assert results[0].scored == results[1].scored
    assert results[0].scored == score("entities", data, out / f"{path.name}-fp32.conll")
    assert set(results[0].scored.kinds) == {"animal", "tool"}
    assert "the model has no 'I-animal', which data has; such words count as wrong" in caplog.text
    with pytest.raises(
        RecipeError, match=r"^evaluate: data: expected tags of the model, 'O', 'B-animal', 'B-tool', got"
    ):
        (directory / "pos.conll").write_text("cat NOUN\nsat VERB\n")
        evaluate("entities", directory / "pos.conll", [str(path)])
    unseen = directory / "unseen.conll"
    unseen.write_text("a O\n\ncat B-animal\n\u200b I-animal\n")
    with pytest.raises(ValueError) as caught:
        evaluate("entities", unseen, [str(path)])
    assert str(caught.value) == (
        f"evaluate: data: {str(unseen)!r}: line 4: expected a word of visible characters, as its tag is I-animal, "
        "got '\\u200b'"
    )


@pytest.mark.parametrize("task", ["squad", "squad_v2"])
def test_answers(directory, task):
    path = model(directory, "QuestionAnswering", len(task))
    rows = []
    for at, (context, _) in enumerate(sentences(30, seed=6)):
        word = context.split()[-1]
        texts = [] if task == "squad_v2" and at % 3 == 0 else [word]
        answers = [{"text": text, "answer_start": context.rindex(text)} for text in texts]
        qas = [{"id": f"q{at}", "question": "one dog", "answers": answers}]
        rows.append({"context": context, "qas": qas})
    data, out = directory / f"{task}.json", directory / task
    data.write_text(json.dumps({"data": [{"paragraphs": rows}]}))
    settings = Settings(("transformers", "fp32"), max_length=12, stride=4, output=out)
    results = evaluate(task, data, [str(path)], settings)
    assert results[0].scored.metrics == pytest.approx(results[1].scored.metrics)
    name = f"{path.name}-fp32"
    plain = score(task, data, out / f"{name}.json").metrics
    if task == "squad":
        assert plain == results[1].scored.metrics and set(plain) == {"exact_match", "f1"}
    else:
        same = {key: value for key, value in results[1].scored.metrics.items() if not key.startswith("best")}
        assert same == {key: plain[key] for key in same}
        files = (out / f"{name}.answers.json", out / f"{name}.na-prob.json")
        assert score(task, data, *files, threshold=0.0) == results[1].scored


def test_answers_are_those_of_run_qa(directory):
    """Its postprocessing, written out: the likeliest starts and ends of each window, longest 30, best score first."""
    path = model(directory, "QuestionAnswering", 3)
    context = " ".join(text for text, _ in sentences(8, seed=7))
    content = {
        "data": [{"paragraphs": [{"context": context, "qas": [{"id": "q", "question": "one dog", "answers": []}]}]}]
    }
    (directory / "long.json").write_text(json.dumps(content))
    out = directory / "long"
    evaluate("squad_v2", directory / "long.json", [str(path)], Settings(max_length=24, stride=8, output=out))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(
        ["one dog"],
        [context],
        truncation="only_second",
        max_length=24,
        stride=8,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in tokenizer.model_input_names}
    with torch.no_grad():
        output = transformers.AutoModelForQuestionAnswering.from_pretrained(path).eval()(**inputs)
    found, null = [], []
    for window in range(len(encoded["input_ids"])):
        start, end = (logits[window].numpy() for logits in (output.start_logits, output.end_logits))
        parts, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window].tolist()
        null.append(start[0] + end[0])
        for first in np.argsort(start)[-1:-21:-1]:
            for last in np.argsort(end)[-1:-21:-1]:
                if parts[first] == parts[last] == 1 and first <= last < first + 30:
                    found.append((start[first] + end[last], context[offsets[first][0] : offsets[last][1]]))
    best = max(found, key=lambda one: one[0])
    name = f"{path.name}-transformers"
    assert json.loads((out / f"{name}.answers.json").read_text()) == {"q": best[1]}
    odds = json.loads((out / f"{name}.na-prob.json").read_text())["q"]
    assert odds == pytest.approx(min(null) - best[0], abs=1e-5)


def test_what_is_cut_is_said(classifier, directory, caplog):
    evaluate(None, tsv(directory / "long.tsv", 20, seed=8), [str(classifier)], Settings(max_length=6))
    assert "of 20 texts are longer than 6 tokens and are cut" in caplog.text


@pytest.mark.parametrize(
    ("names", "classes", "task", "expected"),
    [
        ("NEGATIVE POSITIVE", "negative positive", "sst2", "negative positive"),
        ("pos neg", "negative positive", "sst2", "positive negative"),
        ("LABEL_0 LABEL_1", "negative positive", "sst2", "negative positive"),
        ("0 1", "negative positive", "sst2", "negative positive"),
        (
            "contradiction ENTAILMENT neutral",
            "entailment neutral contradiction",
            "mnli",
            "contradiction entailment neutral",
        ),
        ("cat dog", "Dog cat", None, "cat Dog"),
        ("cat dog cow", "dog cat", None, "cat dog cow"),  # a class that the data does not have
        ("LABEL_0 LABEL_1 LABEL_2", "0 2", None, "0 1 2"),
        ("cat dog", "0 1", None, "0 1"),
        ("LABEL_0 LABEL_1", "cat dog", None, "cat dog"),
        ("cat dog", "cat cow", None, None),
        ("LABEL_0 LABEL_1", "cat cow dog", None, None),
        ("entailment neutral contradiction", "entailment not_entailment", "rte", None),
        ("LABEL_0 LABEL_1 LABEL_2", "negative positive", "sst2", None),
    ],
)
def test_classes_of_model_and_data(names, classes, task, expected):
    arguments = (names.split(), classes.split(), task and PUBLISHED_TASKS[task])
    if expected is not None:
        assert matched(*arguments) == expected.split()
        return
    with pytest.raises(ValueError, match=r"^evaluate: data: expected the model's labels '.*', got '"):
        matched(*arguments)


def test_models_of_one_name_have_files_of_their_own():
    assert file_names(["a/best", "./b/best/"]) == {"a/best": "a-best", "./b/best/": "b-best"}
    assert file_names(["a/seed-1", "a/seed-2"]) == {"a/seed-1": "seed-1", "a/seed-2": "seed-2"}
    assert file_names(["a", "./a", "/"]) == {"a": "a", "./a": "a", "/": "model"}


@pytest.mark.parametrize(
    ("head", "name", "task"),
    [
        ("SequenceClassification", "dev.tsv", None),
        ("TokenClassification", "dev.conll", "entities"),
        ("QuestionAnswering", "dev.json", "squad"),
    ],
)
def test_logits_that_are_no_numbers_are_refused(tmp_path, head, name, task):
    path = model(tmp_path, head, num_labels=2, id2label=dict(enumerate(sorted(WORDS) if not task else ("O", "B-X"))))
    made = getattr(transformers, f"AutoModelFor{head}").from_pretrained(path)
    with torch.no_grad():
        next(of for at, of in made.named_parameters() if at.startswith(("classifier", "qa")))[0] = torch.nan
    made.save_pretrained(path)
    tsv(tmp_path / "dev.tsv", 8)
    (tmp_path / "dev.conll").write_text("a\tB-X\nb\tO\n")
    qa = {"id": "q", "question": "a", "answers": [{"text": "b", "answer_start": 0}]}
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "b", "qas": [qa]}]}]}))
    with pytest.raises(
        RecipeError, match=r"with finite logits, got NaN or|expected finite logits, got NaN or infinity"
    ):
        evaluate(task, tmp_path / name, [str(path)], Settings(stride=1))


def test_numbers_of_classes_are_in_their_order(tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\n" + "".join(f"x,{at}\n" for at in range(1, 13)))
    judge = judge_of(None, tmp_path / "dev.csv", False, 0)
    classes = [str(at) for at in range(1, 13)]  # 2 before 10
    assert matched([f"LABEL_{at}" for at in range(12)], judge.classes, None) == classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "dev.tsv"], "evaluate: expected --model or --predictions, got neither"),
        (
            ["--data", "dev.tsv", "--model", "m", "--predictions", "p"],
            "evaluate: expected --model or --predictions, got both",
        ),
        (
            ["--data", "dev.tsv", "--model", "bert", "--precision", "int4"],
            "evaluate: precision: expected of transformers, auto, ",
        ),
        (
            ["--data", "dev.tsv", "--model", "bert", "--batch-size", "0"],
            "evaluate: batch_size: expected 1 or more, got 0",
        ),
        (["--data", "dev.tsv", "--model", "bert", "--max-length", "9999"], "evaluate: max_length: expected 4 to "),
        (["--data", "dev.tsv", "--model", "bert", "--max-length", "0"], "evaluate: max_length: expected 4 to "),
        (
            ["--data", "dev.tsv", "--model", "bert", "--precision", ","],
            "evaluate: precision: expected one or more of transformers, auto, ",
        ),
        (["--data", "dev.tsv", "--model", "nowhere"], "checkpoint: 'nowhere' is no directory, and"),
        (
            ["--data", "dev.tsv", "--model", "bert", "--regression"],
            "evaluate: data: 'dev.tsv': row 1: expected a number as label, got",
        ),
        (
            ["--task", "stsb", "--data", "sts.csv", "--model", "bert"],
            "evaluate: data: expected classes, of which the model has 2, got numbers",
        ),
        (
            ["--task", "rte", "--data", "dev.tsv", "--model", "bert"],
            "evaluate: data: 'dev.tsv': line 1: expected columns sentence1 and",
        ),
        (
            ["--task", "mnli", "--data", "mnli.tsv", "--model", "bert"],
            "evaluate: data: expected the model's labels 'animal', 'tool', got",
        ),
    ],
)
def test_bad_input_is_one_line(classifier, directory, monkeypatch, arguments, message):
    monkeypatch.chdir(directory)
    tsv(directory / "dev.tsv", 8)
    (directory / "mnli.tsv").write_text("premise\thypothesis\tlabel\np\th\tneutral\n")
    (directory / "sts.csv").write_text("m\tx\ty\t0\t1.5\ta\tb\n")
    given = [str(classifier) if argument == "bert" else argument for argument in arguments]
    done = CliRunner().invoke(app, ["evaluate", *given])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.exit_code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {message}")
