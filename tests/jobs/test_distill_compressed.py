"""`distill` with a student that is compressed while it is trained: what is saved, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from distillation import tiny
from transformers import AutoModelForSequenceClassification

pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from jobs.quick import FAST, TEACHING, same, task_job

from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.jobs.compressed_student import StudentCompression
from distilbert_fast.jobs.distill import Recipe, distill
from distilbert_fast.jobs.flow import RecipeError
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.sparse import SparseLinear

pytestmark = pytest.mark.usefixtures("short_clocks")


def recipe(**settings):
    return Recipe(FAST, TEACHING, compression=StudentCompression(**settings))


def student_of(path):
    return AutoModelForSequenceClassification.from_pretrained(path / "student")


def test_killed_and_continued_a_sparse_student_ends_with_the_same_bytes(inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    settings = {"sparsity": 0.8, "sparsity_method": "movement"}
    report = distill(task_job(inputs), tmp_path / "whole", inputs / "bert", recipe(**settings))
    assert report["settings"]["compression"]["sparsity_method"] == "movement"
    save = DistillationTrainer._save_checkpoint

    def save_and_die(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 3 and self.teacher is not None:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationTrainer, "_save_checkpoint", save_and_die)
        distill(task_job(inputs), tmp_path / "killed", inputs / "bert", recipe(**settings))
    report = distill(task_job(inputs), tmp_path / "killed", inputs / "bert", recipe(**settings))
    assert report["models"]["student"]["resumed"]
    assert same(tmp_path / "whole" / "student", tmp_path / "killed" / "student")
    layers = [module for module in student_of(tmp_path / "killed").modules() if isinstance(module, SparseLinear)]
    gone = torch.cat([~layer.mask.flatten() for layer in layers])
    assert len(layers) == 6 and float(gone.float().mean()) == pytest.approx(0.8, abs=0.001)
    assert all(layer.scores is None for layer in layers)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "killed" / "teacher")
    assert not any(isinstance(module, SparseLinear) for module in teacher.modules())


def test_a_student_is_trained_as_int8(inputs, tmp_path):
    report = distill(task_job(inputs), tmp_path / "out", inputs / "bert", recipe(qat="int8"))
    assert sum(isinstance(module, Int8Linear) for module in student_of(tmp_path / "out").modules()) == 6
    assert report["models"]["student"]["quality"]["accuracy"] > 0.8


@pytest.mark.parametrize("qat", ["codebook", "values"])
def test_shared_values_are_trained_or_the_weights_that_share_them(qat):
    teacher, rows = tiny.teacher(), tiny.rows(40)
    job = SimpleNamespace(train_rows=rows, collator=transformers.default_data_collator, streaming=False)
    student, settings = tiny.student(teacher), StudentCompression(qat=qat, codebook=16, group_size=16)
    settings.check(student, job)
    settings.begin(student, job)
    assert sum(isinstance(module, CodebookLinear) for module in student.modules()) == (6 if qat == "values" else 0)
    student.train()(input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([1])).loss.backward()
    settings.end(student)
    layers = [module for module in student.modules() if isinstance(module, CodebookLinear)]
    assert len(layers) == 6 and {(layer.values.shape[1], layer.group_size) for layer in layers} == {(16, 16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.2}, "SparsityConfig: amount must be above 0 and below 1, got 1.2"),
        (
            {"sparsity": 0.8, "sparsity_pattern": "2:4"},
            "SparsityConfig: amount must be 0.5 for the pattern 2:4, got 0.8",
        ),
        ({"sparsity": 0.8, "qat": "int8"}, "sparsity: expected 0 with qat int8, got 0.8"),
        ({"qat": "int4"}, "qat: expected int8, codebook or values, got int4"),
        ({"qat": "codebook", "codebook": 32}, "CodebookConfig: values must be one of 256, 64, 16, got 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(settings, message, inputs, tmp_path):
    with pytest.raises(RecipeError) as caught:
        distill(task_job(inputs), tmp_path / "out", inputs / "bert", recipe(**settings))
    assert str(caught.value) == f"distill: {message}"
    assert not (tmp_path / "out" / "teacher").exists()
