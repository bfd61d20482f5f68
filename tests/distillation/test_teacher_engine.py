"""A teacher by the engine: the model's own answers to the engine's error, for every head, and what it costs is told."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from distillation import tiny

from distilbert_fast.distillation.arguments import DistillationArguments
from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.objectives.task import TaskObjective
from distilbert_fast.distillation.teachers.effect import teacher_effect
from distilbert_fast.distillation.teachers.model import TEACHER_PRECISIONS, ModelTeacher
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.modeling import optimize as optimizing
from distilbert_fast.testing import assert_twice_rule

CPU = torch.device("cpu")


def batch_of(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def served(monkeypatch):
    """Calls that the engine answered."""
    calls = []
    serve = optimizing._serve
    monkeypatch.setattr(optimizing, "_serve", lambda *given: calls.append(output := serve(*given)) or output)
    return calls


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_the_default_is_the_models_answer_by_the_2x_rule(head, served):
    labels = {"num_labels": 2} if head == "QuestionAnswering" else {}
    model, exact = tiny.teacher(head, **labels), tiny.teacher(head, **labels).double()
    batch = batch_of(tiny.rows(6, head if head == "TokenClassification" else "SequenceClassification", pairs=True))
    real = batch["attention_mask"].bool()

    def logits(teacher):
        output = teacher.answer(batch).logits()
        output = output.start_logits if head == "QuestionAnswering" else output.logits
        return output[real] if output.shape[:2] == real.shape else output

    ours, theirs, oracle = ModelTeacher(model), ModelTeacher(model, "model"), ModelTeacher(exact, "model")
    assert_twice_rule(logits(ours), logits(theirs), logits(oracle))
    assert len(served) == 1 and not isinstance(served[0], str)  # padded batches of question answering too
    rows = real.flatten().nonzero().flatten()
    answers = [teacher.answer(batch, hidden_states=True) for teacher in (ours, theirs, oracle)]
    for layer in (-1, 0):
        assert_twice_rule(*(answer.hidden(rows, layer) for answer in answers))
    for three in zip(*(answer.attention_inputs() for answer in answers), strict=True):
        assert_twice_rule(*(x.flatten(0, 1)[rows] for x in three))
    assert len(served) == 2
    if head == "MaskedLM":
        assert_twice_rule(*(answer.soft_targets(rows).h for answer in answers))


def test_the_model_itself_is_left_as_it_was(served):
    model, batch = tiny.teacher("MaskedLM"), batch_of(tiny.masked_rows(4))
    before, described = type(model.base_model), ModelTeacher(model, "model").describe()
    teacher = ModelTeacher(model, "int8")
    teacher.prepare(CPU)
    teacher.answer(batch).hidden(torch.arange(3))
    assert type(model.base_model) is before and "_accelerator" not in vars(model.base_model) and len(served) == 1
    model(batch["input_ids"])
    assert len(served) == 1
    assert teacher.describe() == described | {"precision": "int8"}


def test_it_follows_the_weights_and_a_student_under_autocast(served):
    model, batch = tiny.teacher("MaskedLM"), batch_of(tiny.masked_rows(4))
    teacher, rows = ModelTeacher(model), torch.arange(5)
    before = teacher.answer(batch).hidden(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.answer(batch).hidden(rows), before)
    with torch.no_grad():
        model.base_model.encoder.layer[0].output.dense.bias *= 2
    changed = teacher.answer(batch).hidden(rows)
    assert len(served) == 3 and not any(isinstance(output, str) for output in served)
    torch.testing.assert_close(changed, ModelTeacher(model, "model").answer(batch).hidden(rows), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, before)


def test_a_model_that_the_engine_does_not_take():
    model = tiny.teacher("MaskedLM", hidden_act="relu")
    batch = batch_of(tiny.masked_rows(4))
    answer = ModelTeacher(model).answer(batch)
    assert answer.model is model and torch.equal(answer.logits().logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"optimize: model.config.hidden_act must be 'gelu', got 'relu'"):
        ModelTeacher(model, "fp32").prepare(CPU)
    with pytest.raises(ValueError) as caught:
        ModelTeacher(model, "int4")
    names = ", ".join(map(repr, TEACHER_PRECISIONS))
    assert str(caught.value) == f"ModelTeacher: precision must be one of {names}, got 'int4'"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_effect_of_a_precision(precision):
    """On a masked LM: against its definition, and small for all, least for fp32."""
    model, rows = tiny.teacher("MaskedLM"), tiny.masked_rows(12)
    student = tiny.student(model).train()
    teacher, reference = ModelTeacher(model, precision), ModelTeacher(model, "model")
    objective = MlmObjective(2.0)
    batches = [batch_of(rows[:5]), batch_of(rows[5:])]
    effect = teacher_effect(objective, student, teacher, reference, batches)
    assert student.training

    student.eval()
    whole = batch_of(rows)
    counts = objective.counts(whole)
    with torch.no_grad():
        apart, taught, usual = (
            objective(of, by, whole, 0.0).sums.double() / counts
            for of, by in ((model, teacher), (student, teacher), (student, reference))
        )
    weights = torch.tensor(objective.weights(0.0), dtype=torch.float64)
    assert effect["kl"] == pytest.approx(float(apart[0]), rel=1e-3, abs=1e-6)
    assert effect["loss_change"] == pytest.approx(float(taught @ weights / (usual @ weights)) - 1, abs=1e-5)
    limit = {"fp32": 1e-6, "bf16": 0.02, "int8": 0.05}[precision]
    assert abs(effect["kl"]) < limit and abs(effect["loss_change"]) < limit
    assert precision == "fp32" or effect["kl"] > 1e-6


def test_an_objective_of_labels_alone_has_no_effect_to_tell():
    model = tiny.teacher()
    teachers = ModelTeacher(model), ModelTeacher(model, "model")
    assert teacher_effect(TaskObjective(2.0, 0.0), tiny.student(model), *teachers, [batch_of(tiny.rows(2))]) == {}
    effect = teacher_effect(TaskObjective(2.0, 0.5), tiny.student(model), *teachers, [batch_of(tiny.rows(4))])
    assert effect.keys() == {"kl", "loss_change"}


@pytest.mark.parametrize("objective", ["task", "mlm"])
def test_training_logs_it_once_and_resumes_at_the_same_precision(tmp_path, objective):
    head, rows = {
        "task": ("SequenceClassification", tiny.rows(16)),
        "mlm": ("MaskedLM", tiny.masked_rows(16)),
    }[objective]

    def trainer(directory, precision, **settings):
        settings |= {"objective": objective, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        model = tiny.teacher(head)
        student = tiny.student(model)
        args = tiny.arguments(directory, teacher_precision=precision, max_steps=2, **settings)
        return DistillationTrainer(student, model, args, rows)

    whole = trainer(tmp_path / "int8", "int8")
    whole.train()
    logged = [entry for entry in whole.state.log_history if "teacher_kl" in entry]
    assert len(logged) == 1 and logged[0]["step"] == 0 and 0 < logged[0]["teacher_kl"] < 0.1
    quiet = trainer(tmp_path / "quiet", "model")
    quiet.train()
    assert not any("teacher_kl" in entry for entry in quiet.state.log_history)
    with pytest.raises(ValueError, match=r"teacher was .*\"precision\": \"int8\".*, is .*\"precision\": \"bf16\""):
        trainer(tmp_path / "int8", "bf16").train(resume_from_checkpoint="auto")


def test_telling_the_effect_does_not_change_the_run(tmp_path, monkeypatch):
    weights = []
    for told in (True, False):
        if not told:
            monkeypatch.setattr(DistillationTrainer, "_log_teacher_effect", lambda self: None)
        model = tiny.teacher("MaskedLM")
        torch.manual_seed(1)
        args = tiny.arguments(tmp_path, objective="mlm", teacher_precision="int8", max_steps=3)
        trainer = DistillationTrainer(tiny.student(model), model, args, tiny.masked_rows(16))
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_telling_it_leaves_evaluation_its_own_rows(tmp_path):
    """Where workers are persistent, Trainer keeps the loader that it made for the first evaluation."""
    model, held_out = tiny.teacher("MaskedLM"), tiny.masked_rows(3, seed=1)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    args = tiny.arguments(tmp_path, objective="mlm", teacher_precision="int8", max_steps=1, **workers)
    trainer = DistillationTrainer(tiny.student(model), model, args, tiny.masked_rows(8), eval_dataset=held_out)
    trainer.train()
    assert trainer.get_eval_dataloader().dataset is held_out


@pytest.mark.parametrize("head", ["MaskedLM", "QuestionAnswering"])
@pytest.mark.parametrize("precision", ["auto", "model", "fp32"])
def test_float16_teaches_under_bfloat16(tmp_path, head, precision):
    """Modules of float16 weights fail in an autocast to bfloat16 on a CPU."""
    model, settings = tiny.teacher(head, num_labels=2), {"objective": "mlm", "alpha_hidden": 1.0, "alpha_relation": 1.0}
    rows, losses = tiny.masked_rows(8), []
    if head == "QuestionAnswering":
        settings = {"objective": "qa"}
        rows = [{**row, "start_positions": 0, "end_positions": 0} for row in tiny.rows(8, pairs=True)]
    for dtype, bf16 in ((torch.float32, False), (torch.float16, True)):
        student = tiny.student(model.float(), dropout=0.0)
        args = tiny.arguments(tmp_path, teacher_precision=precision, max_steps=1, bf16=bf16, **settings)
        losses.append(DistillationTrainer(student, model.to(dtype), args, rows).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_settings(tmp_path):
    words = "--output_dir out --use_cpu --teacher_precision int8"
    (args,) = transformers.HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(words.split())
    assert json.loads(args.to_json_string())["teacher_precision"] == "int8"
    for settings, message in (
        ({"teacher_precision": "int4"}, "must be one of auto, model, fp32, bf16, fp16, int8, got int4"),
        ({"teacher_precision": "bf16", "teacher_cache": "x"}, "must be auto with a teacher_cache, got bf16"),
    ):
        with pytest.raises(ValueError) as caught:
            tiny.arguments(tmp_path, **settings)
        assert str(caught.value) == f"DistillationArguments: teacher_precision {message}"
    model = tiny.teacher()
    with pytest.raises(ValueError) as caught:
        args = tiny.arguments(tmp_path, teacher_precision="bf16")
        DistillationTrainer(tiny.student(model), ModelTeacher(model), args, tiny.rows(2))
    assert str(caught.value) == (
        "DistillationTrainer: args.teacher_precision is for a teacher that is a model, got 'bf16'"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", TEACHER_PRECISIONS)
def test_on_a_gpu(precision):
    device = torch.device("cuda")
    model = tiny.teacher("MaskedLM")
    teacher, reference = ModelTeacher(model, precision), ModelTeacher(model, "model")
    teacher.prepare(device)
    batch = {name: x.to(device) for name, x in batch_of(tiny.masked_rows(12)).items()}
    assert teacher.answer(batch).by_engine == (precision not in ("auto", "model"))
    student = tiny.student(model).to(device)
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            effect = teacher_effect(MlmObjective(2.0), student, teacher, reference, [batch])
        assert abs(effect["kl"]) < 0.05 and abs(effect["loss_change"]) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_real_bert(bert_dir, tokenizer, precision):
    """Real weights below a masked-LM head of its own word embeddings: what a precision costs there."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM.from_pretrained(bert_dir, use_safetensors=True).eval()
    texts = [f"The {word} of a sequence is what its elements say." for word in ("sum", "order", "length", "median")]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) > 0.3, -100)
    objective = MlmObjective(2.0, mlm=0.0)
    student = transformers.BertForMaskedLM(model.config).eval()
    reference = ModelTeacher(model, "model")
    effect = teacher_effect(objective, student, ModelTeacher(model, precision), reference, [batch])
    limit = {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}[precision]
    assert abs(effect["kl"]) < limit and abs(effect["loss_change"]) < limit
