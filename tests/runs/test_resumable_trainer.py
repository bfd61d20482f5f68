from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cases import many
from distillation import tiny
from safetensors.torch import load_file

from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.runs import manifest
from distilbert_fast.runs.resumable_trainer import ResumableTrainer, newest_complete_checkpoint
from distilbert_fast.runs.training_state import load_state, random_state, save_state, set_random_state


def trainer(output_dir, rows=None, alpha=0.5, callbacks=(), seed=0, student=None, **settings):
    """12 steps, saved after every third."""
    teacher = tiny.teacher(seed=seed)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12, "learning_rate": 1e-2}
    args = tiny.arguments(output_dir, alpha=alpha, per_device_train_batch_size=4, **{**saving, **settings})
    student = tiny.student(tiny.teacher()) if student is None else student
    rows = tiny.rows(20) if rows is None else rows
    return DistillationTrainer(student, teacher, args, rows, eval_dataset=tiny.rows(6), callbacks=list(callbacks))


def names(output_dir):
    return sorted((path.name for path in Path(output_dir).iterdir()), key=lambda name: (len(name), name))


def weights(path):
    return load_file(Path(path, "model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(transformers.TrainerCallback):
    """An exception after a step: the run is gone, as far as its directory can tell."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(output_dir, step, **settings):
    with pytest.raises(KeyboardInterrupt):
        trainer(output_dir, callbacks=[Stop(step)], **settings).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of a run from its first step to its last."""
    path = tmp_path_factory.mktemp("whole")
    trainer(path).train()
    return path


# Runs in processes of their own -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The directory that ``runs.py`` trained in, and what it has to tell."""
    directory = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "distillation.runs", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout)


def test_killed_at_any_moment_a_run_ends_with_the_bytes_of_one_that_was_not(runs):
    directory, told = runs
    kills = told["killed"]
    assert kills["time"] >= many(1, 3) and kills["saving"] >= many(2, 4)  # one may have been quicker
    for name in ("time", "saving"):
        assert names(directory / name) == ["checkpoint-10", "checkpoint-12"]
        for file in ("model.safetensors", "optimizer.safetensors", "random_state_0.safetensors"):
            whole = (directory / "whole" / "checkpoint-12" / file).read_bytes()
            assert (directory / name / "checkpoint-12" / file).read_bytes() == whole, (name, file)


@pytest.mark.parametrize("name", ["weights", "optimizer", "manifest"])
def test_a_full_disk_leaves_the_checkpoint_before(runs, name):
    directory, told = runs
    errno, message, left = told["full"][name]
    assert message == (
        f"[Errno {errno}] could not save {directory}/{name}/checkpoint-6: File too large; "
        f"{directory}/{name}/checkpoint-4 is kept"
    )
    assert left == ["checkpoint-2", "checkpoint-4"]
    # and with room again, the run could go on
    assert same(*(weights(directory / run / "checkpoint-12") for run in ("whole", name)))


def test_a_full_disk_leaves_the_model_before(runs):
    directory, told = runs
    errno, message, left = told["full"]["model"]
    assert message == (f"[Errno {errno}] could not save {directory}/model: File too large; the old files are kept")
    assert left == ["config.json", "model.safetensors"]
    assert same(weights(directory / "model"), tiny.student(tiny.teacher()).state_dict())


def test_two_processes_take_the_steps_of_one(runs):
    directory, told = runs
    for one, two in zip(told["logs"]["one"], told["logs"]["two"], strict=True):
        for name in one.keys() & {"loss", "kl", "ce", "eval_loss", "eval_kl", "eval_ce"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    one, two = (weights(directory / name / "checkpoint-5") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)


def test_two_processes_resume(runs):
    directory, _ = runs
    assert same(*(weights(directory / name / "checkpoint-5") for name in ("two", "resumed")))
    states = [name for name in names(directory / "resumed" / "checkpoint-5") if name.startswith("random")]
    assert states == ["random_state_0.safetensors", "random_state_1.safetensors"]


# What is in a checkpoint --------------------------------------------------------------------------------------


def test_a_checkpoint_holds_no_pickle(whole, tmp_path):
    for path in manifest.checkpoints(whole):
        assert names(path) == [
            "config.json",
            "model.safetensors",
            "trainer_state.json",
            "optimizer.safetensors",
            "checkpoint_manifest.json",
            "random_state_0.safetensors",
        ]
    done = trainer(tmp_path)
    done.save_model(tmp_path / "model")
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]


def test_a_pickle_that_gets_into_a_checkpoint_stops_the_run(tmp_path):
    class Pickling(ResumableTrainer):
        def _save_scaler(self, output_dir):
            Path(output_dir, "scaler.pt").touch()

    teacher = tiny.teacher()
    args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    with pytest.raises(RuntimeError) as caught:
        Pickling(tiny.student(teacher), args, train_dataset=tiny.rows(4)).train()
    assert str(caught.value) == f"{tmp_path}/checkpoint-1: a checkpoint must hold no pickle file, got scaler.pt"
    assert names(tmp_path) == []


def test_state_files_keep_every_bit(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4).t()}, 1: {}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "fused": True, "params": [0, 1]}],
        "half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 3),
        "huge": 2**80,
        "infinite": float("-inf"),
        "text": "τ²",
    }
    save_state(tmp_path / "state.safetensors", state)
    got = load_state(tmp_path / "state.safetensors")
    tensors = [
        (state["state"][0]["exp_avg"], got["state"][0]["exp_avg"]),
        (state["half"], got["half"]),
        (state["empty"], got["empty"]),
    ]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors)
    assert got["state"][0]["step"].shape == () and got["state"][1] == {}
    for name in ("groups", "huge", "infinite", "text"):
        assert got[name] == state[name]
    assert type(got["groups"][0]["betas"]) is tuple


def test_states_of_other_things_are_refused(tmp_path):
    with pytest.raises(TypeError) as caught:
        save_state(tmp_path / "x", {"a": [object()]})
    assert str(caught.value) == "save_state: state must hold tensors, numbers, strings and None, got object"


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()

    draw()
    save_state(tmp_path / "random.safetensors", random_state(torch.device("cpu")))
    expected = draw()
    draw()
    set_random_state(load_state(tmp_path / "random.safetensors"), torch.device("cpu"))
    assert draw() == expected


# Which checkpoint is taken ------------------------------------------------------------------------------------


def checkpoint(path, content=b"0123456789"):
    path.mkdir(parents=True)
    manifest.begin(path)
    (path / "model.safetensors").write_bytes(content)
    (path / "deep").mkdir()
    (path / "deep" / "file").write_bytes(b"abc")
    manifest.complete(path, {"seed": 1})
    return path


def flip(path):
    (path / "model.safetensors").write_bytes(b"0123456780")


DAMAGE = [
    (lambda path: os.truncate(path / "model.safetensors", 4), "model.safetensors has 4 bytes, its manifest says 10"),
    (flip, "the contents of model.safetensors do not fit their checksum"),
    (lambda path: (path / "deep" / "file").unlink(), "deep/file is missing"),
    (lambda path: (path / manifest.MANIFEST).unlink(), "it has no checkpoint_manifest.json"),
    (manifest.begin, "half-written: saving began and did not end"),
    (
        lambda path: os.truncate(path / manifest.MANIFEST, 1),
        "its checkpoint_manifest.json is damaged: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    (
        lambda path: (path / manifest.MANIFEST).write_text("[]"),
        "its checkpoint_manifest.json is damaged: not an object",
    ),
    (
        lambda path: (path / manifest.MANIFEST).write_text('{"format": 2, "complete": true}'),
        "its manifest has format 2, this version reads 1",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[reason.split(",")[0] for _, reason in DAMAGE])
def test_what_is_not_complete_is_passed_over(tmp_path, caplog, damage, reason):
    old, new = checkpoint(tmp_path / "checkpoint-9"), checkpoint(tmp_path / "checkpoint-10")
    assert newest_complete_checkpoint(tmp_path) == str(new)
    damage(new)
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(str(tmp_path)) == str(old)
    assert caplog.messages == [f"passing over {new}: {reason}"]


def test_no_checkpoint_at_all(tmp_path):
    assert newest_complete_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-12-old").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert newest_complete_checkpoint(tmp_path) is None


def test_a_run_goes_on_from_the_newest_complete_one(tmp_path, whole, caplog):
    stopped(tmp_path, 10)
    os.truncate(tmp_path / "checkpoint-9" / "optimizer.safetensors", 1000)
    size = (whole / "checkpoint-9" / "optimizer.safetensors").stat().st_size
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint="auto")
    assert f"passing over {tmp_path}/checkpoint-9: optimizer.safetensors has 1000 bytes, its manifest says {size}" in (
        caplog.messages
    )
    assert same(weights(tmp_path / "checkpoint-12"), weights(whole / "checkpoint-12"))
    assert same(weights(tmp_path / "checkpoint-9"), weights(whole / "checkpoint-9"))
    assert resumed.state.global_step == 12


@pytest.mark.parametrize("steps", [3, 5])  # of 5 in an epoch
def test_a_finished_run_is_loaded_and_nothing_is_trained(tmp_path, steps):
    first = trainer(tmp_path, max_steps=steps, logging_steps=3)
    first.train(resume_from_checkpoint="auto")
    again = trainer(tmp_path, max_steps=steps)
    with torch.no_grad():
        again.model.classifier.weight.zero_()
    output = again.train(resume_from_checkpoint="auto")
    assert output.global_step == again.state.global_step == steps
    assert output.training_loss == first.state.log_history[0]["loss"]
    assert same(again.model.state_dict(), first.model.state_dict())
    assert names(tmp_path) == [f"checkpoint-{step}" for step in {3, steps}]
    assert again.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]


def test_a_model_that_was_saved_in_this_process_resumes(tmp_path, whole):
    """A cell of a notebook that is stopped and run again: saving has written the class and the dtype into config."""
    student = tiny.student(tiny.teacher())
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Stop(7)], student=student).train()
    again = trainer(tmp_path, student=student)
    again.train(resume_from_checkpoint="auto")
    assert same(again.model.state_dict(), weights(whole / "checkpoint-12"))


def test_a_path_and_true_resume_too(tmp_path, whole):
    for asked in (True, None):
        path = tmp_path / str(asked)
        stopped(path, 7)
        trainer(path).train(resume_from_checkpoint=asked or str(path / "checkpoint-6"))
        assert same(weights(path / "checkpoint-12"), weights(whole / "checkpoint-12"))
    elsewhere = trainer(tmp_path / "elsewhere")
    elsewhere.train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    assert names(tmp_path / "elsewhere") == ["checkpoint-9", "checkpoint-12"]
    assert same(weights(tmp_path / "elsewhere" / "checkpoint-12"), weights(whole / "checkpoint-12"))


def test_resuming_nothing(tmp_path, whole):
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path).train(resume_from_checkpoint=True)
    assert str(caught.value) == (f"train: resume_from_checkpoint is True, but {tmp_path} has no complete checkpoint")
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert str(caught.value) == f"train: cannot resume from {tmp_path}/checkpoint-1: it is not a directory"
    checkpoint(tmp_path / "checkpoint-2")
    flip(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert str(caught.value) == (
        f"train: cannot resume from {tmp_path}/checkpoint-2: "
        "the contents of model.safetensors do not fit their checksum"
    )


def test_a_pickle_checkpoint_is_refused_and_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    foreign = tmp_path / "checkpoint-3"
    foreign.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Bomb(), foreign / name)
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path).train(resume_from_checkpoint=str(foreign))
    assert str(caught.value) == (
        f"train: cannot resume from {foreign}: it has no checkpoint_manifest.json; it holds pickle files, which "
        "are never loaded: optimizer.pt, pytorch_model.bin, rng_state.pth, scheduler.pt, training_args.bin"
    )
    trainer(tmp_path).train(resume_from_checkpoint="auto")
    assert not (tmp_path / "exploded").exists()
    # nothing of another program's is lost, where it was in the way
    aside = tmp_path / "checkpoint-3.replaced-1"
    assert (aside / "optimizer.pt").is_file()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-12", aside.name]


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"learning_rate": 2e-2}, "args.learning_rate was 0.01, is 0.02"),
        ({"temperature": 3.0}, "args.temperature was 2.0, is 3.0"),
        ({"max_steps": 15}, "args.max_steps was 12, is 15"),
        (
            {"gradient_accumulation_steps": 2, "alpha": 0.7},
            "args.alpha was 0.5, is 0.7; args.gradient_accumulation_steps was 1, is 2",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path, whole, change, found):
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, **change).train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    assert str(caught.value) == (
        f"train: {whole}/checkpoint-6 was written with other settings: {found}; "
        "resume with the old ones, or choose another output_dir to start again"
    )


def test_another_teacher_or_other_data_is_refused(tmp_path, whole):
    other = tiny.rows(20)
    other[7]["labels"] = (other[7]["labels"] + 1) % 3
    for change, name in (({"seed": 1}, "teacher"), ({"rows": other}, "train_dataset")):
        with pytest.raises(ValueError, match=f"^train: .* other settings: {name} was .*; resume with the old"):
            trainer(tmp_path, **change).train(resume_from_checkpoint=str(whole / "checkpoint-6"))


def test_how_often_to_log_evaluate_and_save_may_change(tmp_path, whole):
    changed = trainer(tmp_path, save_steps=2, logging_steps=1, save_total_limit=1, eval_strategy="steps", eval_steps=1)
    changed.train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    assert names(tmp_path) == ["checkpoint-12"]
    assert same(weights(tmp_path / "checkpoint-12"), weights(whole / "checkpoint-12"))


def test_a_run_is_not_started_over_another(tmp_path):
    stopped(tmp_path, 7)
    held = weights(tmp_path / "checkpoint-6")
    for asked in (None, False, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError) as caught:
            trainer(tmp_path).train(resume_from_checkpoint=asked)
        assert str(caught.value) == (
            f"train: {tmp_path} already holds checkpoint-6, complete; "
            'pass resume_from_checkpoint="auto" to go on from it, or choose another output_dir'
        )
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert same(weights(tmp_path / "checkpoint-6"), held)


def test_what_cannot_be_resumed_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, save_only_model=True)
    assert str(caught.value) == "DistillationTrainer: args.save_only_model must be off, got True"
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path).train(trial=object())
    assert str(caught.value) == "DistillationTrainer: train: hyperparameter search is not supported"


# Rotation -----------------------------------------------------------------------------------------------------


def test_rotation_never_deletes_the_newest_complete_one(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path / f"checkpoint-{step}")
    os.truncate(tmp_path / "checkpoint-8" / "model.safetensors", 3)
    manifest.begin(tmp_path / "checkpoint-4")  # half-written
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "pytorch_model.bin").touch()  # another program's
    manifest.rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    manifest.rotate(tmp_path, 0, None)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("limit", "left"), [(None, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (3, [1, 3, 4]), (2, [1, 4]), (1, [1, 4])]
)
def test_rotation_keeps_the_best(tmp_path, limit, left):
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path / f"checkpoint-{step}")
    manifest.rotate(tmp_path, limit, tmp_path / "checkpoint-1")
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """With one checkpoint to keep, Trainer itself would end without the newest."""
    run = trainer(
        tmp_path,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_first",
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=3,
    )
    run.compute_metrics = lambda _: {"first": run.state.global_step}
    run.train()
    assert run.args.save_total_limit == 1
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-12"]
    assert same(run.model.state_dict(), weights(tmp_path / "checkpoint-3"))
    again = trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    again.train(resume_from_checkpoint="auto")
    assert same(again.model.state_dict(), weights(tmp_path / "checkpoint-3"))


def test_evaluation_does_not_change_training(tmp_path, whole):
    often = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    often.train()
    assert same(weights(tmp_path / "checkpoint-12"), weights(whole / "checkpoint-12"))


def test_early_stopping_counts_on(tmp_path):
    """Evaluations that are ever worse: the first is the best, and after the third more of them it is over."""

    def run(name):
        seen = [transformers.EarlyStoppingCallback(3)]
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "growing"}
        made = trainer(tmp_path / name, callbacks=seen, greater_is_better=False, **settings)
        made.compute_metrics = lambda prediction: {"growing": made.state.global_step}
        made.args.load_best_model_at_end = True  # what the callback asks for
        return made.train(resume_from_checkpoint="auto").global_step

    assert run("whole") == 4
    for step in (1, 3):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    assert run("resumed") == 4


def test_any_trainer_can_be_resumable(tmp_path):
    """Fine-tuning with the model's own loss, from a datasets.Dataset."""
    from datasets import Dataset

    def make(path):
        args = tiny.arguments(path, save_strategy="epoch", num_train_epochs=3, learning_rate=1e-2)
        return ResumableTrainer(tiny.teacher(), args, train_dataset=Dataset.from_list(tiny.rows(10)))

    make(tmp_path / "whole").train()
    partial = make(tmp_path / "part")
    partial.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        partial.train()
    make(tmp_path / "part").train(resume_from_checkpoint="auto")
    final = [weights(tmp_path / name / "checkpoint-6") for name in ("whole", "part")]
    assert same(*final)
