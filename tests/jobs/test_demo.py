"""The demo as a user runs it, on a tiny BERT and a tiny file: what it leaves behind is true, and it can be killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from demo_input import pairs_tsv, sentences
from jobs.demo_runs import Forked, start_server
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("short_clocks")
MODELS = ("teacher", "student", "student-int8")
ROOT = str(Path(__file__).parents[2])
SETTINGS = {
    "--teacher": "bert",
    "--data": "train.tsv",
    "--eval-data": "dev.tsv",
    "-o": "out",
    "--batch-size": "8",
    "--max-length": "16",
    "--teacher-epochs": "4",
    "--student-epochs": "3",
    "--teacher-lr": "5e-3",
    "--student-lr": "5e-3",
}


def words(*more: str) -> list[str]:
    return ["demo", *itertools.chain(*SETTINGS.items()), *more]


def start(directory: Path, *more: str) -> Forked:
    start_server()
    return Forked(directory, words(*more))


def finish(directory: Path, *more: str) -> str:
    process = start(directory, *more)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def place(inputs, tmp_path) -> Path:
    for name in ("bert", "train.tsv", "dev.tsv"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


@pytest.fixture(scope="module")
def done(inputs) -> tuple[Path, str]:
    """Output directory of an undisturbed run, and what it printed."""
    run = subprocess.run(
        [sys.executable, "-m", "distilbert_fast", *words()],
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return inputs / "out", run.stdout


def test_what_is_there(done):
    out, printed = done
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert visible == {*MODELS, "evaluation.json", "report.md", "report.json", "report.png"}
    for number in range(1, 6):
        assert f"[{number}/5]" in printed
    assert printed.index("this will take ") < printed.index("[1/5]")
    assert "report: out/report.md" in printed
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_report_is_true(done):
    """Every number that can be recomputed, recomputed with transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import distilbert_fast.modeling

    distilbert_fast.modeling.register()  # for the int8 model
    out, _ = done
    report = json.loads((out / "report.json").read_text())
    rows = sentences(40, seed=2)
    teacher = None
    for name in MODELS:
        model = AutoModelForSequenceClassification.from_pretrained(out / name, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert model.config.id2label == {0: "animal", 1: "tool"}
        with torch.no_grad():
            logits = torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0] for text, _ in rows])
        chosen = [model.config.id2label[int(i)] for i in logits.argmax(1)]
        teacher = logits if teacher is None else teacher
        row = report["models"][name]
        assert row["accuracy"] == pytest.approx(
            sum(c == label for c, (_, label) in zip(chosen, rows, strict=True)) / 40
        )
        same = (logits.argmax(1) == teacher.argmax(1)).float().mean()
        assert row["agreement"] == pytest.approx(float(same))
        kl = torch.nn.functional.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        assert row["kl_from_teacher"] == pytest.approx(float(kl), rel=1e-2, abs=1e-5)
        file = out / name / "model.safetensors"
        assert row["file_bytes"] == file.stat().st_size
        assert row["parameters"] == sum(tensor.numel() for tensor in load_file(file).values())
        assert row["optimized_agreement"] == 1
        proof = report["stages"][name]["read_back"]
        assert proof["sentences"] == proof["same_class"] == 40
        assert proof["largest_difference"] < 1e-5  # trained by our classes, read back by transformers'
        for timing in (*row["latency_ms"].values(), *row["throughput"].values()):
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
    assert report["models"]["teacher"]["accuracy"] > 0.9  # the words tell the class
    assert report["models"]["student"]["accuracy"] > 0.9
    assert report["models"]["student"]["layers"] == 1
    assert report["models"]["student"]["architecture"] == "DistilBERT"
    codes = load_file(out / "student-int8" / "model.safetensors")
    assert torch.int8 in {tensor.dtype for tensor in codes.values()}
    assert report["task"]["train_sentences"] == 160
    assert report["task"]["labels"] == ["animal", "tool"]
    assert report["settings"]["max_length"] == 16
    assert report["command"].startswith("distilbert-fast demo --teacher bert --data train.tsv")
    assert report["environment"]["versions"]["torch"] == torch.__version__


def test_again_does_nothing_anew(done, inputs):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for name in MODELS for path in (out / name).rglob("*")}
    evaluation = (out / "evaluation.json").read_bytes()
    printed = finish(inputs)
    assert printed.count("done before") == 4
    assert "this will take" not in printed  # there is nothing to come
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "evaluation.json").read_bytes() == evaluation


def wait_for(process: Forked, there) -> None:
    deadline = time.monotonic() + 300
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, f"it ended before it could be killed: {process.communicate()}"
    assert there()


def made(out: Path) -> set[Path]:
    """Checkpoints and models: what there is more of when the work goes on."""
    return {*(out / "checkpoints").glob("*/checkpoint-*"), *(out / name for name in MODELS if (out / name).exists())}


def same_models(ours: Path, theirs: Path) -> bool:
    return all(
        (ours / n / "model.safetensors").read_bytes() == (theirs / n / "model.safetensors").read_bytes() for n in MODELS
    )


def test_killed_in_every_stage_it_ends_with_the_same_models(done, place):
    """SIGKILL in the midst of the fine-tuning, of the distillation, and of the measuring; then to the end."""
    out = place / "out"
    for there in (
        lambda: any((out / "checkpoints" / "teacher").glob("checkpoint-*")),
        lambda: any((out / "checkpoints" / "student").glob("checkpoint-*")),
        lambda: (out / "student-int8").exists(),
    ):
        process = start(place)
        wait_for(process, there)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    printed = finish(place)
    assert "done before" in printed
    assert same_models(out, done[0])
    assert not (out / "checkpoints").exists()
    assert not list(out.glob(".*.partial"))


def test_interrupted_by_hand(place):
    """Ctrl-C: a line, exit status 130, and the same command goes on.

    Python drops a KeyboardInterrupt that comes while a finalizer runs; whoever sees the work go on presses again.
    """
    process = start(place)
    wait_for(
        process, lambda: any((place / "out" / "checkpoints" / "teacher").glob("checkpoint-*/checkpoint_manifest.json"))
    )
    for _ in range(4):
        before = made(place / "out")
        process.send_signal(signal.SIGINT)
        while process.poll() is None and len(made(place / "out") - before) < 2:  # it may be about to make one
            time.sleep(0.005)
        if process.poll() is not None:
            break
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "\ninterrupted; the same command continues\n" in err
    assert "Traceback" not in err


def test_a_teacher_that_knows_the_task_is_taken_as_it_is(done, place):
    """--teacher-epochs 0 with the teacher of another run, which also is no longer a bare encoder."""
    finish(place, "--teacher", str(done[0] / "teacher"), "--teacher-epochs", "0", "--student-epochs", "1")
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["models"]["teacher"]["accuracy"] == pytest.approx(
        json.loads((done[0] / "report.json").read_text())["models"]["teacher"]["accuracy"]
    )
    assert (
        load_file(place / "out" / "teacher" / "model.safetensors").keys()
        == load_file(done[0] / "teacher" / "model.safetensors").keys()
    )


def test_pairs(inputs, tmp_path):
    """What the report says of the student is what transformers says, pair by pair."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from distilbert_fast.jobs.demo import DemoTraining, demo

    dev = pairs_tsv(tmp_path / "dev.tsv", 30, seed=2)
    training = DemoTraining(teacher_epochs=1, student_epochs=1, batch_size=16, max_length=24)
    report = demo(
        tmp_path / "out",
        inputs / "bert",
        data=pairs_tsv(tmp_path / "pairs.tsv", 64, seed=1),
        eval_data=dev,
        training=training,
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    right = 0
    for premise, hypothesis, label in (line.split("\t") for line in dev.read_text().splitlines()[1:]):
        with torch.no_grad():
            logits = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == label
    assert report["models"]["student"]["accuracy"] == pytest.approx(right / 30)


def test_numbers_are_for_distill(inputs, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    from distilbert_fast.jobs.demo import RecipeError, demo

    rows = Dataset.from_dict({"sentence": ["the cat", "a dog"], "label": [0.5, 1.5]})
    monkeypatch.setattr("datasets.load_dataset", lambda *parts: DatasetDict(train=rows, validation=rows))
    with pytest.raises(RecipeError) as caught:
        demo(tmp_path / "out", inputs / "bert", "owner/numbers")
    assert str(caught.value) == (
        "demo: task: expected classes as labels, got numbers, which are for `distilbert-fast distill`"
    )
    assert not (tmp_path / "out").exists()
