"""The command compress on a tiny BERT: what it makes, that it can be killed anywhere, and that its gate holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from demo_input import load_classifier
from jobs.quick import same, task_job
from still_clocks import TEACHER_MS, machine, milliseconds
from typer.testing import CliRunner

import distilbert_fast  # noqa: F401, so that transformers reads what it writes
from distilbert_fast.cli import app
from distilbert_fast.compression.costs import Costs
from distilbert_fast.files.durable import FileError
from distilbert_fast.files.schema import read_json
from distilbert_fast.jobs import compress as job
from distilbert_fast.jobs import gate, stage_results
from distilbert_fast.jobs.flow import RecipeError
from distilbert_fast.jobs.planning import MeasuredTeacher, Route, depths, student
from distilbert_fast.jobs.settings import Compression, Goals, Training

TRAINING = Training(max_steps=4, batch_size=16, micro_batch=16, learning_rate=5e-3)
RECIPE = Compression(TRAINING, TRAINING, Training(epochs=1, batch_size=16, micro_batch=16, learning_rate=1e-2))


@pytest.fixture
def clocks(monkeypatch):
    machine(monkeypatch)


def compress(inputs, out, goals, recipe=RECIPE, **more):
    return job.compress(task_job(inputs), out, inputs / "bert", recipe, goals, **more)


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """Output directory and content of a run whose last speed-up a student of one layer reaches only when pruned."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        machine(patch)
        return out, compress(inputs, out, Goals((3.6, 13.0)))


def test_what_it_makes_is_what_it_reports(inputs, done):
    out, content = done
    names = ["teacher", job.ENGINE, "models/teacher-int8", "models/1-layers"]
    names += [f"models/13x-{step}" for step in ("pruned", "recovered", "recovered-int8")]
    assert list(content["models"]) == names
    assert content["gate"]["passed"] and content["gate"]["chosen"] == "models/13x-recovered-int8"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(content))
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "teacher",
        "plan.json",
        "models",
        "speed",
        "compressed",
        *("report.md", "report.json", "curve.png"),
    }
    teacher, _ = load_classifier(out / "teacher")
    dev = task_job(inputs)
    dev.prepare(load_classifier(out / "teacher")[1], out)
    taught = dev.answers(teacher)
    for name, row in content["models"].items():
        directory = out / (name if name != job.ENGINE else "teacher")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
        answers = dev.answers(model)
        labels = torch.tensor(dev.task.eval["label"])
        assert row["quality"]["accuracy"] == pytest.approx(float((answers.argmax(1) == labels).float().mean()))
        if "agreement" in row["quality"]:
            same_class = (answers.argmax(1) == taught.argmax(1)).float().mean()
            assert row["quality"]["agreement"] == pytest.approx(float(same_class))
        assert row["file_bytes"] == (directory / "model.safetensors").stat().st_size
        if name != "teacher":
            assert row["speedup"]["latency"] == pytest.approx(TEACHER_MS / milliseconds(model))
    kept = content["models"]["models/13x-recovered-int8"]
    assert kept["speedup"]["latency"] >= 13 * (1 - gate.TOLERANCE)
    assert kept["file_bytes"] < content["models"]["teacher"]["file_bytes"] / 2
    assert same(out / "compressed", out / "models/13x-recovered-int8")
    card = (out / "compressed/README.md").read_text()
    assert "Made of" in card and "distilbert_fast.optimize" in card
    assert "agreement" in (out / "report.md").read_text()


@pytest.mark.usefixtures("clocks")
def test_killed_in_any_stage_it_ends_with_the_same_models(inputs, done, tmp_path, monkeypatch):
    """Each stage is killed before its model is saved, so that what was trained goes on from its last checkpoint."""
    (whole, content), goals = done, Goals((13.0,))
    out, save, count = tmp_path / "out", job._Compression.read_back, 0

    def killed(self, path, *of_model):
        nonlocal count
        count += 1
        if count % 2:
            raise KeyboardInterrupt
        return save(self, path, *of_model)

    monkeypatch.setattr(job._Compression, "read_back", killed)
    kills = 0
    while True:
        try:
            again = compress(inputs, out, goals)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 5  # teacher, student, pruned, recovered, int8
    assert all(same(whole / name, out / name) for name in again["models"] if name != job.ENGINE)
    assert same(whole / "compressed", out / "compressed")
    for name, row in again["models"].items():
        assert row["quality"] == content["models"][name]["quality"]


@pytest.mark.usefixtures("clocks")
def test_the_gate(inputs, tmp_path, monkeypatch):
    """A goal that is missed: files aside, exit status 3. Another goal, or --accept, takes what is there."""
    out = tmp_path / "out"
    lost = {"accuracy": 0.1, "matthews": 0.0, "macro_f1": 0.1, "agreement": 0.1, "kl": 1.0}
    judged = job.TaskJob.evaluate
    judge = lambda self, model, teacher: judged(self, model, teacher) if teacher is None else lost  # noqa: E731
    monkeypatch.setattr(job.TaskJob, "evaluate", judge)
    words = ["compress", "--teacher", str(inputs / "bert"), "--data", str(inputs / "train.tsv"), "-o", str(out)]
    words += [
        "--eval-data",
        str(inputs / "dev.tsv"),
        "--max-length",
        "16",
        "--speedup",
        "3.6",
        "--teacher-lr",
        "1e-2",
        "--teacher-epochs",
        "1",
    ]

    def run(*more):
        return CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "100"}, catch_exceptions=False)

    result = run("--accuracy-drop", "2")
    assert result.exit_code == 3, result.stderr
    assert (out / "rejected/model.safetensors").is_file() and not (out / "compressed").exists()
    assert "teacher-int8: rejected: " in result.stdout and "points of accuracy lost, 2 are allowed" in result.stdout
    assert "is kept aside in " in result.stdout and "rejected: " in (out / "rejected/README.md").read_text()
    before = (out / "models/teacher-int8/model.safetensors").stat().st_mtime_ns
    result = run("--accuracy-drop", "2", "--accept")
    assert result.exit_code == 0
    assert (out / "compressed/model.safetensors").is_file() and not (out / "rejected").exists()
    assert (out / "models/teacher-int8/model.safetensors").stat().st_mtime_ns == before
    assert run().exit_code == 0  # no limit
    result = run("--lr", "1")
    assert result.exit_code == 2 and "holds a compress with other settings" in result.stderr


@pytest.mark.usefixtures("clocks")
def test_as_fast_as_the_accuracy_allows(inputs, tmp_path, monkeypatch):
    """Faster and faster until one loses too much; the one before is kept."""
    judged, seen = job.TaskJob.evaluate, []

    def judge(self, model, teacher):
        row = judged(self, model, teacher)
        if teacher is None:
            seen.append(row["accuracy"])
            return row
        return row | {"accuracy": seen[0] - (0.05 if milliseconds(model) < 9 else 0.0)}

    monkeypatch.setattr(job.TaskJob, "evaluate", judge)
    content = compress(inputs, tmp_path / "out", Goals(accuracy_drop=1.0))
    models = content["gate"]["models"]
    assert [bool(row["faults"]) for row in models.values()] == [*[False] * (len(models) - 1), True]
    assert len(models) == 3  # 3.66×, 5.5×, 8.2×
    assert content["gate"]["passed"] and content["gate"]["chosen"] == list(models)[-2]


@pytest.mark.usefixtures("short_clocks")
def test_with_real_clocks(inputs, tmp_path):
    """Nothing is said of how fast it is but that all is there."""
    content = compress(
        inputs, tmp_path / "out", Goals((1.01,)), Compression(TRAINING, TRAINING, RECIPE.teacher, codebook=16)
    )
    assert "models/teacher-codebook-16" in content["models"]
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert len(plan["costs"]["heads"]) == 3 and plan["costs"]["heads"] == sorted(plan["costs"]["heads"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speedup", "1"], "compress: speedup: expected above 1, got 1"),
        (["--speedup", "nan"], "compress: speedup: expected above 1, got nan"),
        (["--accuracy-drop", "-1"], "compress: accuracy_drop: expected points from 0 to below 100, got -1.0"),
        (["--clock", "fast"], "compress: clock: expected latency or throughput, got fast"),
        (["--codebook", "17"], "compress: codebook: expected 256, 64 or 16, got 17"),
        (["--layers", "3"], "compress: student_from_teacher: num_layers must be 1 to 2, the teacher's depth, got 3"),
        (["--recovery-epochs", "0"], "compress: recovery epochs: expected above 0, got 0"),
        (["--sentences", "0"], "compress: sentences: expected at least 1, got 0"),
        (["--threads", "0"], "compress: threads: expected at least 1, got 0"),
        (["--temperature", "warm"], "compress: DistillationArguments: temperature "),
        (["--data", "nowhere.tsv"], "load_task: "),
    ],
)
def test_what_it_refuses(options, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compress", "--teacher", str(inputs / "bert"), "--data", str(inputs / "train.tsv"), "--max-length", "16"]
    result = CliRunner().invoke(app, [*words, "-o", "out", *options], env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("clocks")
def test_a_speed_that_this_machine_does_not_have(inputs, tmp_path):
    with pytest.raises(RecipeError, match=r"^compress: speedup: expected at most 2\d\.\d on this machine, got 100$"):
        compress(inputs, tmp_path / "out", Goals((100.0,)))


def row(accuracy, latency, size=10):
    return {"quality": {"accuracy": accuracy}, "speedup": {"latency": latency}, "file_bytes": size}


def test_faults():
    teacher = row(0.9, 1.0)

    def of(given, goals, target=None):
        return gate.faults(given, teacher, "accuracy", "latency", goals, target)

    assert of(row(0.89, 2.0), Goals(accuracy_drop=1.0)) == []
    assert of(row(0.88, 2.0), Goals(accuracy_drop=1.0)) == ["2.00 points of accuracy lost, 1 are allowed"]
    assert of(row(0.1, 2.0), Goals((2.0,)), 2.0) == []
    assert of(row(0.9, 1.91), Goals((2.0,)), 2.0) == []
    assert of(row(0.9, 1.5), Goals((2.0,)), 2.0) == ["1.50× as fast, 2× was asked for"]
    assert of(row(0.9, 0.9), Goals(accuracy_drop=1.0)) == ["neither faster (0.90×) nor smaller than the teacher"]
    assert of(row(0.9, 0.9, size=9), Goals(accuracy_drop=1.0)) == []
    rows = {"a": row(0.9, 1.0), "b": row(0.8, 2.0), "c": row(0.7, 1.5), "d": row(0.9, 1.5)}
    assert gate.pareto(rows, "accuracy", "latency") == ["b", "d"]
    assert gate.fastest(["a", "c", "d"], rows, "latency") == "c"


def test_routes():
    """A table of four layers that take 1 each, 0.1 of it without heads and neurons; 0.5 outside; the reference 45."""
    costs = Costs(np.array([0.0, 0.2, 0.4]), np.array([0.0, 0.25, 0.5]), 0.4, 1, 0.1)
    plan = MeasuredTeacher(costs, 4, 45.0, (0.5, 0.5, 0.5, 0.5), 1, Compression())
    assert plan.speedup_of_int8 == pytest.approx(10)
    assert plan.route(10) == Route(4, None)
    assert plan.route(15) == Route(4, pytest.approx(2.5))
    assert plan.route(45 / 2.0) == Route(3, pytest.approx(1.5))  # 1.2 of 2.7
    assert plan.route(45 / 1.75) == Route(2, pytest.approx(1.25))  # 1.05 of 1.8, and 0.95 of 2.7 is too little
    assert plan.route(45 / 1.4) == Route(1, pytest.approx(0.9))
    plan.check(45 / 0.7)
    with pytest.raises(RecipeError, match=r"^compress: speedup: expected at most 65\.2 on this machine, got 70$"):
        plan.check(70)
    forced = MeasuredTeacher(costs, 4, 45.0, (0.5, 0.5, 0.5, 0.5), 1, Compression(layers=2))
    assert forced.route(11) == Route(2, None)
    assert not forced.allows(45 / 0.8)
    slow_heads = MeasuredTeacher(costs, 4, 45.0, (0.75, 0.75, 0.75, 0.5), 1, Compression())
    assert slow_heads.speedup_of_int8 == pytest.approx(10)
    assert slow_heads.route(45 / 2.0) == Route(2, pytest.approx(1.25))
    assert slow_heads.route(45 / 1.5) == Route(1, pytest.approx(0.75))


def test_what_a_student_takes_is_timed():
    """Of one with 2 layers nothing is known but what those with 1 and with 3 take."""
    table = {"heads": [0.0, 0.2, 0.4], "widths": [0.0, 0.25, 0.5], "base": 0.4, "layer": 0.1, "layers": 4}
    taken = {"transformers": 45.0, "int8": 4.5, student(1): 1.6, student(3): 4.0}
    latency = {name: {"median": 1e3 * seconds} for name, seconds in taken.items()}
    plan = MeasuredTeacher.of({"costs": table, "speed": {"latency_ms": latency}}, Compression())
    assert plan.own == pytest.approx((0.6, 0.8, 1.0, 0.5))
    assert (plan.reference, plan.layers) == (45.0, 4)
    latency[student(2)] = {"median": 2.5e3}
    plan = MeasuredTeacher.of({"costs": table, "speed": {"latency_ms": latency}}, Compression(layers=2))
    assert plan.own == pytest.approx((0.6, 0.5, 1.0, 0.5))
    assert plan.route(45 / 2.4) == Route(2, pytest.approx(1.9))
    assert depths(1, None) == [] and depths(2, None) == [1] and depths(12, 4) == [1, 4, 11]


def test_a_plan_without_students_is_refused(done, tmp_path):
    """As earlier versions wrote it. One of the depth that is asked for may be there too."""
    measured = read_json(done[0] / "plan.json", stage_results.plan)
    for by_name in measured["speed"].values():
        by_name[student(7)] = by_name[student(1)]
    stage_results.plan(measured, "plan.json")
    for by_name in measured["speed"].values():
        del by_name[student(1)]
    (tmp_path / "plan.json").write_text(json.dumps(measured))
    with pytest.raises(FileError, match=r"plan\.json.*latency_ms\.int8, 1 layers must be given, got nothing"):
        read_json(tmp_path / "plan.json", stage_results.plan)
