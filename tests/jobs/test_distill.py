"""`distill` from input to model card, on a tiny BERT and tiny data: what it leaves behind is true and can go on."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import many
from demo_input import bert, sentences
from safetensors.torch import load_file

pytest.importorskip("datasets")

from jobs.quick import FAST, TEACHING, same, task_job

from distilbert_fast.data.masking import MaskedDataset, Masking
from distilbert_fast.data.squad import load_squad
from distilbert_fast.jobs.distill import Recipe, Shape, Training, distill
from distilbert_fast.jobs.flow import RecipeError, save
from distilbert_fast.jobs.mlm import MlmJob
from distilbert_fast.jobs.qa import QaJob
from distilbert_fast.jobs.settings import check_models, distinct
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.runs.processes import ProcessError, Processes, launcher
from distilbert_fast.runs.run_directory import StageError

pytestmark = pytest.mark.usefixtures("short_clocks")


def mlm_job(inputs: Path, **changed) -> MlmJob:
    return MlmJob([str(inputs / "text.txt")], **{"max_length": 16, "min_length": 4, "holdout": 0.1, **changed})


def mlm(inputs: Path, output: Path, compare=(), **changed):
    recipe = Recipe(FAST, TEACHING, train_body=False, compare=compare, **changed)
    return distill(mlm_job(inputs), output, inputs / "bert", recipe)


@pytest.fixture(scope="module")
def ablation(inputs):
    """Output of an ablation, and what it reported."""
    names = [variant.name for variant in MlmJob.variants]
    return inputs / "mlm", mlm(inputs, inputs / "mlm", names)


def test_an_ablation_leaves_every_student_and_nothing_else(ablation):
    output, report = ablation
    names = {variant.name for variant in MlmJob.variants}
    there = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    files = {"teacher", "corpus", "data.json", "speed.json", "report.md", "report.json", "losses.png"}
    assert there == names | files
    assert set(report["models"]) == {"teacher", *names}
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    losses = {name: set(report["models"][name]["losses"][-1]) - {"step", "loss"} for name in names}
    assert losses == {
        "student": {"kl", "mlm", "cos"},
        "without-kl": {"mlm", "cos"},
        "without-cos": {"kl", "mlm"},
        "without-mlm": {"kl", "cos"},
        "random-init": {"kl", "mlm", "cos"},
        "without-teacher": {"mlm"},
    }
    steps = {row["steps"] for name, row in report["models"].items() if name != "teacher"}
    assert len(steps) == 1  # equal for all


def test_the_teacher_got_a_head_and_kept_its_body(ablation, inputs):
    output, report = ablation
    body, teacher = (
        load_file(inputs / "bert" / "model.safetensors"),
        load_file(output / "teacher" / "model.safetensors"),
    )
    for name, tensor in teacher.items():
        if name.startswith("bert."):
            assert torch.equal(tensor, body[name.removeprefix("bert.")]), name
    assert any(name.startswith("cls.predictions.transform") for name in teacher)
    losses = [entry["mlm"] for entry in report["models"]["teacher"]["losses"]]
    assert losses[-1] < losses[0]


def test_the_held_out_loss_is_true(ablation):
    """Computed again by transformers alone, from the rows and masks."""
    import datasets
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    output, report = ablation
    tokenizer = AutoTokenizer.from_pretrained(output / "teacher")
    (corpus,) = (path for path in (output / "corpus").iterdir() if path.is_dir())
    held = MaskedDataset(datasets.Dataset.from_file(str(corpus / "holdout.arrow")), Masking(tokenizer, None))
    assert len(held) > 10
    for name in ("teacher", "student", "without-teacher"):
        model = AutoModelForMaskedLM.from_pretrained(output / name).eval()
        total, count = 0.0, 0
        for row in held:
            with torch.no_grad():
                logits = model(row["input_ids"][None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, row["labels"], reduction="sum"))
            count += int((row["labels"] != -100).sum())
        quality = report["models"][name]["quality"]
        assert quality["mlm"] == pytest.approx(total / count, rel=1e-4)
        assert quality["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-3)
        assert report["models"][name]["int8"]["mlm"] == pytest.approx(total / count, rel=0.05)


def test_report_and_model_card_read_well(ablation):
    from huggingface_hub import ModelCard

    output, report = ablation
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    card = ModelCard.load(output / "student" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["mlm"] == pytest.approx(report["models"]["student"]["quality"]["mlm"], abs=1e-5)
    assert (output / "student" / "losses.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "report.md").read_text()
    for row in report["models"].values():
        assert f"| {row['title']} | {row.get('start', '')} |" in text
    assert f"| {(output / 'student' / 'model.safetensors').stat().st_size / 1e3:.1f} kB |" in text
    for page in (text, card.text):
        assert re.search(r"## What it is made of\n(.*\n)+  distilbert.transformer.layer.0 +<- layer 0\n", page)
    for timings in report["speed"].values():
        assert set(timings) == {f"{m} {lib}" for m in ("teacher", "student") for lib in ("transformers", "optimize()")}


def test_again_does_nothing_anew_and_more_is_added(ablation, inputs, tmp_path):
    few = tmp_path / "few"
    mlm(inputs, few)
    written = (few / "student" / "model.safetensors").stat().st_mtime_ns
    report = mlm(inputs, few, ["without-kl"])
    assert (few / "student" / "model.safetensors").stat().st_mtime_ns == written
    assert set(report["models"]) == {"teacher", "student", "without-kl"}
    assert same(few / "student", ablation[0] / "student")
    assert same(few / "without-kl", ablation[0] / "without-kl")
    with pytest.raises(StageError, match="holds a distill-mlm with other settings"):
        mlm(inputs, few, objective={"alpha_cos": 2.0})


def test_other_data_of_the_same_name_is_refused(inputs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((inputs / "text.txt").read_bytes())
    recipe = Recipe(FAST, TEACHING, train_body=False, objective={"teacher_precision": "int8"})
    job = {"max_length": 16, "min_length": 4, "holdout": 0.1}
    report = distill(MlmJob([str(text)], **job), tmp_path / "out", inputs / "bert", recipe)
    effect = report["models"]["student"]["teacher_effect"]  # of int8
    assert set(effect) == {"kl", "loss_change"} and 0 < effect["kl"] < 0.1
    assert f"by the first rows: kl {effect['kl']:.2g} apart" in (tmp_path / "out" / "report.md").read_text()
    text.write_text(text.read_text() + "\nthe old cat on my hammer")
    with pytest.raises(RecipeError, match="was made from other data of that name"):
        distill(MlmJob([str(text)], **job), tmp_path / "out", inputs / "bert", recipe)


def test_a_task_with_its_baseline(inputs, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    recipe = Recipe(FAST, TEACHING, objective={"alpha": 0.7}, compare=["without-teacher"])
    report = distill(task_job(inputs), tmp_path / "out", inputs / "bert", recipe)
    rows = sentences(40, seed=2)
    for name, row in report["models"].items():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        with torch.no_grad():
            chosen = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
        right = sum(model.config.id2label[c] == label for c, (_, label) in zip(chosen, rows, strict=True))
        assert row["quality"]["accuracy"] == pytest.approx(right / 40)
    assert set(report["models"]["student"]["losses"][0]) == {"step", "loss", "kl", "ce"}
    assert set(report["models"]["without-teacher"]["losses"][0]) == {"step", "loss", "ce"}
    assert "agreement" not in report["models"]["teacher"]["quality"]
    # and a teacher that knows the task is taken as it is
    again = distill(task_job(inputs), tmp_path / "again", tmp_path / "out" / "teacher", recipe)
    assert again["models"]["teacher"]["losses"] == []
    assert same(tmp_path / "again" / "teacher", tmp_path / "out" / "teacher")
    assert same(tmp_path / "again" / "student", tmp_path / "out" / "student")
    # also if it counts its classes the other way round
    turned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    for tensor in (turned.classifier.weight, turned.classifier.bias):
        tensor.data = tensor.data.flip(0)
    turned.config.id2label = {0: "tool", 1: "animal"}
    turned.config.label2id = {"tool": 0, "animal": 1}
    turned.save_pretrained(tmp_path / "turned")
    tokenizer.save_pretrained(tmp_path / "turned")
    other = distill(task_job(inputs), tmp_path / "other", tmp_path / "turned", Recipe(FAST, TEACHING))
    for name in ("accuracy", "macro_f1"):
        assert other["models"]["teacher"]["quality"][name] == again["models"]["teacher"]["quality"][name]
    assert other["models"]["student"]["quality"]["accuracy"] > 0.8


def test_questions(inputs, tmp_path):
    contexts = [text for text, _ in sentences(60, seed=5)]
    named = {"cat", "dog", "horse", "hammer", "saw", "drill", "file", "goat", "otter", "mouse"}
    paragraphs = []
    for context in contexts:
        words = [word for word in context.split() if word in named]
        if words:
            answer = {"text": words[0], "answer_start": f" {context} ".index(f" {words[0]} ")}
            paragraphs.append({"context": context, "qas": [{"question": "one old", "answers": [answer]}]})
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    job = QaJob(*load_squad(tmp_path / "squad.json"), max_length=24, stride=4)
    teaching = Training(epochs=12, batch_size=8, micro_batch=8, learning_rate=1e-2)
    report = distill(job, tmp_path / "out", inputs / "bert", Recipe(FAST, teaching))
    assert report["models"]["teacher"]["quality"]["f1"] > 50  # the first of the named words; chance is a tenth
    assert set(report["models"]["student"]["quality"]) == {"exact_match", "f1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student": Training(epochs=0)}, "student epochs: expected above 0, got 0"),
        (
            {"student": Training(batch_size=24, micro_batch=16)},
            "student batch_size: expected a multiple of micro_batch",
        ),
        ({"student": Training(batch_size=0)}, "student batch_size: expected at least 1, got 0"),
        ({"student": Training(micro_batch=0)}, "student micro_batch: expected at least 1, got 0"),
        ({"student": Training(learning_rate=float("nan"))}, "student learning_rate: expected a finite number above 0"),
        ({"teacher": Training(epochs=-1)}, "teacher epochs: expected 0 or more, got -1"),
        ({"objective": {"alpha_cos": -1}}, "DistillationArguments: alpha_cos must be finite and 0 or more, got -1"),
        ({"shape": Shape(num_layers=3)}, "student_from_teacher: num_layers must be 1 to 2, the teacher's depth, got 3"),
        ({"shape": Shape(hidden_size=16)}, "the weight of cos must be 0 for a student of another hidden size"),
        ({"objective": {"teacher_precision": "int4"}}, "teacher_precision must be one of auto, model, "),
        (
            {"cache": 8, "objective": {"alpha_mse": 1}},
            "cache: expected 0 but for the losses kl, mlm and cos of mlm, got",
        ),
        ({"cache": 8, "objective": {"temperature": "linear:4:1"}}, "cache: expected 0 for a temperature that changes"),
        ({"cache": -1}, "cache: expected 0 to 37, the tokens there are, got -1"),
        ({"cache": 38}, "cache: expected 0 to 37, the tokens there are, got 38"),
        ({"cache": 8, "objective": {"kd_positions": "masked"}}, "cache: expected 0 for kd_positions masked with the "),
        ({"compare": ["without-layers"]}, "compare: expected of without-kl, without-cos, without-mlm, random-init, "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(inputs, tmp_path, changed, message):
    with pytest.raises(RecipeError) as caught:
        distill(mlm_job(inputs), tmp_path / "out", inputs / "bert", Recipe(**changed))
    assert str(caught.value).startswith("distill: ") and message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("positions", "architecture", "longest"), [(64, "roberta", 64), (60, "distilbert", 56), (512, "distilbert", 512)]
)
def test_rows_are_as_long_as_the_student_reads(inputs, tmp_path, positions, architecture, longest):
    """RoBERTa's first position comes after its padding id; rows are padded to a multiple of 8."""
    source = bert(tmp_path / "bert", max_position_embeddings=positions)
    recipe = Recipe(shape=Shape(architecture=architecture))
    check_models(mlm_job(inputs, max_length=longest), source, recipe)
    with pytest.raises(
        RecipeError, match=f"^distill: max_length: expected 4 to {longest}, the positions of the student"
    ):
        check_models(mlm_job(inputs, max_length=longest + 1), source, recipe)


def test_data_and_lengths_that_cannot_be(inputs, tmp_path):
    for number, (job, message) in enumerate(
        [
            (
                mlm_job(inputs, max_length=65),
                "distill: max_length: expected 4 to 64, the positions of the student, got 65",
            ),
            (mlm_job(inputs, holdout=0.0), "distill: holdout must leave a row to evaluate on, got 0.0"),
            (MlmJob(["nowhere.txt"], max_length=16), "distill: load_corpus: source must be files that are there, got"),
        ]
    ):
        with pytest.raises(RecipeError) as caught:
            distill(job, tmp_path / str(number), inputs / "bert", Recipe(FAST, TEACHING))
        assert str(caught.value).startswith(message)


def test_after_a_refusal_the_directory_is_free(inputs, tmp_path):
    """Rows were made, but nothing of them: they stay for the next command."""
    empty = tmp_path / "empty.txt"
    empty.touch()
    for job, message in (
        (MlmJob([str(empty)], max_length=16), "source must be files that hold text, got empty ones"),
        (mlm_job(inputs, probability=2.0), "probability must be above 0"),
        (mlm_job(inputs, holdout=0.0), "holdout must leave a row"),
    ):
        with pytest.raises(RecipeError, match=f"^distill: .*{message}"):
            distill(job, tmp_path / "out", inputs / "bert", Recipe(FAST, TEACHING))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus"]


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_full_disk_is_named_whoever_finds_it(inputs, tmp_path, what):
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(inputs / "bert")
    model = BertModel.from_pretrained(inputs / "bert") if what == "model" else tokenizer
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, limits[1]))  # the system refuses, as a full disk would
    try:
        with pytest.raises(OSError) as caught:
            save("distill", tmp_path / "out", model, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = f"distill: could not save '{tmp_path / 'out'}': File too large; the finished stages are kept"
    assert caught.value.strerror == expected and caught.value.errno == errno.EFBIG


def test_variants_that_change_nothing_are_left_out():
    """Where no KL is wanted, "without KL" is the student itself."""
    without_kl, without_cos, without_mlm, random, alone = MlmJob.variants[1:]
    given = [without_kl, without_cos, without_mlm, random, alone]
    for zero in (0.0, "0", "linear:0:0"):  # as in Python and as from a command line
        assert distinct(given, Recipe(objective={"alpha_ce": zero})) == [without_cos, without_mlm, random, alone]
        assert distinct(TaskJob.variants[1:2], Recipe(objective={"alpha": zero})) == []
    assert distinct(given, Recipe(), from_layers=False) == [without_kl, without_cos, without_mlm, alone]
    # nor can the only loss be left out
    only_kl = Recipe(objective={"alpha_mlm": "0", "alpha_cos": "0"})
    assert distinct(given, only_kl) == [random, alone]


def test_a_cached_teacher_teaches_as_one_that_runs(ablation, inputs, tmp_path):
    """All 37 tokens kept: nothing is lost but half precision."""
    report = mlm(inputs, tmp_path / "out", cache=37)
    assert (tmp_path / "out" / "teacher-cache" / "index.safetensors").is_file()
    ran, read = ablation[1]["models"]["student"], report["models"]["student"]
    assert read["quality"]["mlm"] == pytest.approx(ran["quality"]["mlm"], rel=1e-2)
    for one, other in zip(ran["losses"], read["losses"], strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=2e-2, abs=1e-3)
    assert ran["cache"] == {}
    assert read["cache"]["bytes_per_token"] > 37 * 4 + 2 * 32
    assert read["cache"]["tail_mass"] == 0 and abs(read["cache"]["loss_change"]) < 1e-2
    assert "  - the teacher's cache: " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_with_the_same_models(tmp_path):
    """At fewer by `make test`."""
    command = [sys.executable, "-m", "distillation.recipe_runs", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    died = json.loads(done.stdout.splitlines()[-1])
    for kind in ("mlm", "task"):
        assert len(died[kind]) >= many(4, 20)
        assert {"data", "teacher", "student"} <= set(died[kind])
        whole = tmp_path / kind / "whole"
        models = json.loads((whole / "report.json").read_text())["models"]
        for killed in (tmp_path / kind).glob("killed-*"):
            after = json.loads((killed / "report.json").read_text())["models"]
            for name, row in models.items():
                assert same(whole / name, killed / name)
                for part in ("losses", "quality", "int8"):
                    assert after[name][part] == row[part]
            assert not list(killed.glob(".*partial")) and not (killed / "checkpoints").exists()


def test_a_stream_has_no_end_and_a_head_to_evaluate_on(inputs, tmp_path, ablation):
    steps = Training(epochs=1, max_steps=20, batch_size=32, micro_batch=16, learning_rate=5e-3)
    recipe = Recipe(steps, dataclasses.replace(TEACHING, max_steps=10), train_body=False)
    report = distill(mlm_job(inputs, streaming=True), tmp_path / "out", inputs / "bert", recipe)
    assert report["models"]["student"]["steps"] == 20  # of 32 rows; there are 270
    assert report["data"]["rows"].startswith("at its head texts ") and report["data"]["streaming"]
    (head,), (stored,) = (
        [path for path in (output / "corpus").iterdir() if path.is_dir()] for output in (tmp_path / "out", ablation[0])
    )
    assert {path.name for path in head.glob("*.arrow")} == {"holdout.arrow"}
    assert (head / "holdout.arrow").read_bytes() == (stored / "holdout.arrow").read_bytes()  # so losses can be compared
    students = [report["models"]["student"] for report in (report, ablation[1])]
    assert students[0]["quality"]["mlm"] < students[1]["quality"]["mlm"]  # of 9 steps


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student": FAST}, "student max_steps: expected above 0 for a corpus that is streamed, got 0"),
        ({"teacher": TEACHING}, "teacher max_steps: expected above 0 for a corpus that is streamed, got 0"),
        ({"cache": 8}, "cache: expected 0 for a corpus that is streamed, got 8"),
    ],
)
def test_what_a_stream_cannot_have(inputs, tmp_path, changed, message):
    steps = dataclasses.replace(FAST, max_steps=9)
    with pytest.raises(RecipeError) as caught:
        distill(
            mlm_job(inputs, streaming=True),
            tmp_path / "out",
            inputs / "bert",
            Recipe(**{"student": steps, "teacher": steps, **changed}),
        )
    assert str(caught.value) == f"distill: {message}"
    assert not (tmp_path / "out").exists()


def test_a_stage_leaves_no_model_in_memory(inputs, monkeypatch):
    """With an ablation of a large student the memory of every stage would add up."""
    import gc
    import weakref

    from distilbert_fast.distillation.trainer import DistillationTrainer

    made, alive = [], []

    class Spy(DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.append(sum(one() is not None for one in made))
            made.extend(map(weakref.ref, (self, self.model)))

    monkeypatch.setattr("distilbert_fast.distillation.trainer.DistillationTrainer", Spy)
    gc.disable()
    try:
        distill(
            task_job(inputs), inputs / "forgetful", inputs / "bert", Recipe(FAST, TEACHING, compare=("random-init",))
        )
    finally:
        gc.enable()
    assert alive == [0, 0, 0]  # before the teacher, the student, its variant


def test_gradient_checkpointing_makes_the_same_student(inputs):
    again = Training(epochs=1, batch_size=32, micro_batch=16, learning_rate=5e-3, gradient_checkpointing=True)
    for name, student in (("kept", FAST), ("computed-again", again)):
        distill(task_job(inputs), inputs / name, inputs / "bert", Recipe(student, TEACHING))
    one, other = (load_file(inputs / name / "student" / "model.safetensors") for name in ("kept", "computed-again"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "message"),
    [
        (32, 16, None),
        (32, 32, None),  # a process has 16
        (33, 8, "distill: student batch_size: expected a multiple of the 2 processes, got 33"),
        (1, 8, "distill: student batch_size: expected a multiple of the 2 processes, got 1"),
        (36, 12, "distill: student batch_size: expected a multiple of micro_batch x 2 processes, got 36"),
    ],
)
def test_processes_share_a_batch_evenly(tmp_path, batch_size, micro_batch, message):
    training = Training(batch_size=batch_size, micro_batch=micro_batch)
    if message is None:
        training.check("student", 2)
        shared = training.arguments(tmp_path, 100, 2)
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        assert [shared[name] for name in names] == [16, 1]
        return
    with pytest.raises(RecipeError) as caught:
        training.check("student", 2)
    assert str(caught.value) == message


def test_a_process_that_has_several_gpus_is_told_of_torchrun(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RecipeError, match=r"^distill: GPUs: expected one a process, got 4; start it by torchrun "):
        distill(task_job(inputs), tmp_path / "out", inputs / "bert")
    assert not (tmp_path / "out").exists()


def test_a_world_that_nobody_launched_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ProcessError, match=r"^WORLD_SIZE is 2, but no launcher started so many: .* RANK expected"):
        Processes()


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        ({}, "distilbert-fast"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "torchrun --nproc-per-node 4 -m distilbert_fast"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "torchrun --nnodes 2 --nproc-per-node 4 -m distilbert_fast"),
    ],
)
def test_a_report_names_the_launcher(monkeypatch, world, expected):
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert " ".join(launcher()) == expected
