"""The trainer at work on objectives other than classification, and on teachers other than models."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from distillation import tiny

from distilbert_fast.distillation.arguments import DistillationArguments, objective_of
from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.objectives.task import QaObjective, TaskObjective
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.teachers.model import ModelTeacher
from distilbert_fast.distillation.trainer import DistillationTrainer

EVERY_LOSS = {"alpha_mse": 0.01, "alpha_hidden": 1.0, "alpha_relation": 1.0}


def masked_lm(output_dir, student=None, teacher=None, rows=16, **settings):
    teacher = tiny.teacher("MaskedLM") if teacher is None else teacher
    student = tiny.drop_in(tiny.student(tiny.teacher("MaskedLM"), dropout=0.0)) if student is None else student
    args = tiny.arguments(output_dir, objective="mlm", **settings)
    rows = tiny.masked_rows(rows)
    return DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)


def test_arguments_and_their_objective_read_from_a_command_line():
    words = "--output_dir out --use_cpu --objective mlm --temperature linear:4:1 --alpha_ce 3 --layer_map 0:1,1:0"
    words += " --alpha_hidden cosine:1:0 --kd_positions masked --relation_heads 8"
    (args,) = transformers.HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(words.split())
    assert (args.temperature, args.alpha_ce, args.alpha_hidden) == ("linear:4:1", 3.0, "cosine:1:0")
    assert json.loads(args.to_json_string())["temperature"] == "linear:4:1"
    model = tiny.teacher("MaskedLM")
    assert objective_of(args, model, tiny.teacher("MaskedLM")) == MlmObjective(
        "linear:4:1",
        kl=3.0,
        hidden="cosine:1:0",
        kd_positions="masked",
        layer_map=((0, 1), (1, 0)),
        relation_heads=8,
    )


def test_of_a_loss_less_is_better(tmp_path):
    for metric, greater in (
        ("kl", False), ("eval_mlm", False), ("eval_held_cos", False), ("label_mse", False), ("loss", False),
        ("accuracy", True), ("performance", True), (None, None),
    ):  # fmt: skip
        assert tiny.arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater, metric
    assert tiny.arguments(tmp_path, metric_for_best_model="kl", greater_is_better=True).greater_is_better


def test_what_is_left_open_comes_from_the_models(tmp_path):
    trainer = masked_lm(tmp_path, **EVERY_LOSS)
    assert trainer.objective.layer_map == ((0, 1),) and trainer.objective.relation_heads == 4
    assert objective_of(tiny.arguments(tmp_path), tiny.teacher(), None) == TaskObjective(2.0, 0.5)
    assert objective_of(tiny.arguments(tmp_path, objective="qa"), tiny.teacher(), None) == QaObjective(2.0, 0.5)


@pytest.mark.parametrize("bf16", [False, True])
def test_masked_lm_learns_what_its_teacher_answers(tmp_path, bf16):
    settings = {"learning_rate": 1e-2, "num_train_epochs": 8, "lr_scheduler_type": "constant"}
    trainer = masked_lm(tmp_path, bf16=bf16, **settings, **EVERY_LOSS)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("loss", "kl", "cos", "mse", "hidden", "relation"):
        assert after[f"eval_{name}"] < 0.9 * before[f"eval_{name}"], name
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not trainer.teacher.model.training and all(p.grad is None for p in trainer.teacher.model.parameters())


def test_evaluation_is_the_weighted_loss_over_the_dataset(tmp_path):
    trainer = masked_lm(tmp_path, per_device_eval_batch_size=3, rows=11)
    batch = {name: torch.tensor([row[name] for row in tiny.masked_rows(11)]) for name in tiny.masked_rows(1)[0]}
    objective = MlmObjective()
    sums = objective(trainer.model.eval(), trainer.teacher, batch, 0.0).sums / objective.counts(batch)
    metrics = trainer.evaluate()
    for name, value in zip(objective.names, sums.tolist(), strict=True):
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(float(sums.detach() @ torch.tensor([5.0, 2.0, 1.0])), rel=1e-5)
    prediction = trainer.predict(tiny.masked_rows(11))
    assert prediction.predictions is None and prediction.metrics["test_kl"] == pytest.approx(metrics["eval_kl"])


def test_gradient_checkpointing_computes_layers_again(tmp_path):
    for checkpointing, calls in ((False, 1), (True, 2)):
        trainer = masked_lm(tmp_path, gradient_checkpointing=checkpointing, max_steps=1)
        seen = []
        trainer.model.distilbert.transformer.layer[0].ffn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer.train()
        assert len(seen) == calls


@pytest.mark.parametrize("objective", ["task", "tokens", "regression", "qa", "mlm"])
def test_gradient_checkpointing_changes_no_step(tmp_path, objective):
    """Dropout too is drawn again as it was; autocast is entered again."""
    head = {"tokens": "TokenClassification", "qa": "QuestionAnswering", "mlm": "MaskedLM"}.get(
        objective, "SequenceClassification"
    )
    rows = tiny.masked_rows(8) if objective == "mlm" else tiny.rows(8, head, pairs=True)
    for row in rows:
        if objective == "qa":
            row.pop("labels")
            row |= {"start_positions": 2, "end_positions": 2}
        elif objective == "regression":
            row["labels"] = float(row["labels"])
    teacher = tiny.teacher(head, num_labels={"regression": 1, "qa": 2}.get(objective, tiny.CLASSES))
    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = {"gradient_checkpointing": checkpointing, "max_steps": 2, "gradient_accumulation_steps": 2}
        settings |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": True}
        kind = objective if objective in ("qa", "mlm") else "task"
        losses = EVERY_LOSS if objective == "mlm" else {}
        args = tiny.arguments(tmp_path / str(checkpointing), objective=kind, **settings, **losses)
        student = tiny.drop_in(tiny.student(teacher))
        DistillationTrainer(student, teacher, args, rows).train()
        weights.append(student.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, msg=name)


def test_it_resumes_with_its_schedules(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "temperature": "linear:4:1"}
    masked_lm(tmp_path, alpha_cos="cosine:1:0", **settings).train()
    with pytest.raises(ValueError, match=r"args\.alpha_cos was \"cosine:1:0\", is \"cosine:1:0.5\""):
        masked_lm(tmp_path, alpha_cos="cosine:1:0.5", **settings).train(resume_from_checkpoint="auto")
    other = tiny.arguments(tmp_path, objective="mlm", **settings)
    given = MlmObjective("linear:4:1", cos="cosine:1:0")
    teacher = tiny.teacher("MaskedLM")
    trainer = DistillationTrainer(tiny.student(teacher), teacher, other, tiny.masked_rows(16), objective=given)
    with pytest.raises(ValueError, match=r"objective was null, is \"MlmObjective\(temperature='linear:4:1', kl=5.0"):
        trainer.train(resume_from_checkpoint="auto")


def test_question_answering(tmp_path):
    teacher = tiny.teacher("QuestionAnswering", num_labels=2)
    student = tiny.student(teacher)
    rows = tiny.rows(8, pairs=True)
    for row in rows:
        row.pop("labels")
        row["start_positions"], row["end_positions"] = 2, 0
    args = tiny.arguments(tmp_path, objective="qa", learning_rate=1e-2, max_steps=8, logging_steps=1)
    dataset = pytest.importorskip("datasets").Dataset.from_list([{**row, "text": "not for a model"} for row in rows])
    trainer = DistillationTrainer(student, teacher, args, dataset, eval_dataset=dataset)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_loss"] == pytest.approx(0.5 * after["eval_kl"] + 0.5 * after["eval_ce"])
    assert trainer.predict(dataset).predictions[0].shape == (8, tiny.LENGTH)


def test_regression(tmp_path):
    teacher = tiny.teacher(num_labels=1)
    rows = [{**row, "labels": float(row["labels"])} for row in tiny.rows(8)]
    args = tiny.arguments(tmp_path, learning_rate=1e-2, max_steps=10)
    trainer = DistillationTrainer(tiny.student(teacher), teacher, args, rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_teacher_mse"] < before["eval_teacher_mse"] and after["eval_loss"] < before["eval_loss"]


class Stored:
    """A teacher that knows a model's answers by the rows' examples: all that the protocol asks of another kind."""

    columns, model = ("example",), None

    def __init__(self, model, rows):
        self.kept = ModelTeacher(model)
        self.inputs = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        self.asked = []

    def check(self, objective):
        assert isinstance(objective, MlmObjective)

    def prepare(self, device):
        self.kept.prepare(device)

    def describe(self):
        return {"stored": len(self.inputs["input_ids"])}

    def answer(self, batch, hidden_states=False):
        assert not hidden_states
        self.asked += batch["example"].tolist()
        return self.kept.answer({name: x[batch["example"]] for name, x in self.inputs.items()})


def test_a_teacher_that_is_no_model(tmp_path):
    model = tiny.teacher("MaskedLM")
    rows = [{**row, "example": index} for index, row in enumerate(tiny.masked_rows(16))]
    settings = {"objective": "mlm", "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    students = []
    for teacher in (model, Stored(model, rows)):
        student = tiny.student(model, dropout=0.0)
        trainer = DistillationTrainer(student, teacher, tiny.arguments(tmp_path, **settings), rows)
        trainer.train()
        students.append(student)
    assert sorted(teacher.asked) == list(range(16))
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_not_compiled_as_a_whole(tmp_path):
    with pytest.raises(ValueError) as caught:
        masked_lm(tmp_path, torch_compile=True)
    assert str(caught.value) == (
        "DistillationTrainer: args.torch_compile must be off, got True: compile the models' layers"
    )


def test_the_forward_of_a_student_is_its_own_again(tmp_path):
    trainer = masked_lm(tmp_path, max_steps=1, bf16=True)
    trainer.train()
    ids = torch.randint(0, tiny.VOCABULARY, (2, 5))
    assert trainer.model(ids).logits.shape == (2, 5, tiny.VOCABULARY)
    trainer.train_dataset = [{"input_ids": [1, 2], "attention_mask": [1, 1]}]
    with pytest.raises(ValueError, match="a batch must hold labels, got "):
        trainer.train()
    assert trainer.model(ids).logits.shape == (2, 5, tiny.VOCABULARY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_masked_lm_on_a_gpu(tmp_path, precision):
    trainer = masked_lm(tmp_path, use_cpu=False, learning_rate=1e-2, num_train_epochs=8, **precision, **EVERY_LOSS)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
def test_half_of_the_real_bert_by_masked_lm(tmp_path, bert_dir, tokenizer, architecture):
    """Real weights, real text; a head of random weights on both, which the student copied."""
    torch.manual_seed(0)
    teacher = transformers.BertForMaskedLM.from_pretrained(bert_dir, use_safetensors=True)
    student, _ = student_from_teacher(teacher, architecture=architecture)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    texts = [f"Return the {n} of a list, and nothing else." for n in ("length", "sum", "maximum", "median")]
    batch = [collate([tokenizer(text, padding="max_length", max_length=16) for text in texts])]
    rows = [{name: x[i].tolist() for name, x in batch[0].items()} for i in range(4)]
    args = tiny.arguments(tmp_path, objective="mlm", max_steps=6, learning_rate=2e-4, lr_scheduler_type="constant")
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("kl", "cos", "loss"):
        assert after[f"eval_{name}"] < 0.95 * before[f"eval_{name}"], name
