from __future__ import annotations

import copy
import inspect
import shutil

import pytest
import torch
import transformers
from distillation import tiny

import distilbert_fast
from distilbert_fast.distillation.objectives.losses import task_loss
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.trainer import DistillationArguments, DistillationTrainer, DivergedError

HEADS = ["SequenceClassification", "TokenClassification"]


def tensors(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def logits(model, batch):
    names = inspect.signature(model.forward).parameters
    return model(**{name: value for name, value in batch.items() if name in names and name != "labels"}).logits


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, head):
    teacher = tiny.teacher(head)
    rows = tiny.rows(8, head, seed=5)
    fresh = tiny.student(teacher, dropout=0.0)
    loss = task_loss(logits(fresh, tensors(rows)), logits(teacher, tensors(rows)), tensors(rows)["labels"], 3.0, 0.7)
    gradients = torch.autograd.grad(loss.loss, list(fresh.parameters()), allow_unused=True)
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8), (3, 3)):
        student = copy.deepcopy(fresh)
        args = tiny.arguments(
            tmp_path / f"{size}x{accumulation}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=1,
            logging_steps=1,
            temperature=3.0,
            alpha=0.7,
        )
        trainer = DistillationTrainer(student, teacher, args, rows)
        trainer.train()
        for (name, before), after, gradient in zip(
            fresh.named_parameters(), student.parameters(), gradients, strict=True
        ):
            expected = torch.zeros_like(before) if gradient is None else gradient
            torch.testing.assert_close(before - after, expected, atol=2e-6, rtol=2e-5, msg=f"{name} {size}")
        logged = trainer.state.log_history[0]
        for part in loss._fields:
            assert logged[part] == pytest.approx(getattr(loss, part).item(), rel=1e-4), part


def test_both_parts_of_the_loss_are_logged_and_reach_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    teacher = tiny.teacher()
    args = tiny.arguments(
        tmp_path,
        report_to="tensorboard",
        alpha=0.25,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    trainer = DistillationTrainer(
        tiny.student(teacher),
        teacher,
        args,
        tiny.rows(16),
        eval_dataset=tiny.rows(7, seed=1),
        compute_metrics=accuracy,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6] and evaluated[0]["step"] == 4
    for entry, prefix in [*((entry, "") for entry in logged), (evaluated[0], "eval_")]:
        loss, kl, ce = (entry[f"{prefix}{part}"] for part in ("loss", "kl", "ce"))
        assert kl > 0 and ce > 0
        assert loss == pytest.approx(0.25 * kl + 0.75 * ce, rel=1e-4)
    assert 0 <= evaluated[0]["eval_accuracy"] <= 1
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert {"train/loss", "train/kl", "train/ce", "eval/kl", "eval/ce"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train/kl")] == pytest.approx([e["kl"] for e in logged])


def test_evaluation_is_the_loss_over_the_dataset(tmp_path):
    teacher = tiny.teacher("TokenClassification")
    student, rows = tiny.student(teacher), tiny.rows(11, "TokenClassification")
    args = tiny.arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    batch = tensors(rows)
    whole = task_loss(logits(student.eval(), batch), logits(teacher, batch), batch["labels"])
    assert metrics["eval_kl"] == pytest.approx(whole.kl.item(), rel=1e-4)
    assert metrics["eval_ce"] == pytest.approx(whole.ce.item(), rel=1e-4)
    assert trainer.predict(rows).metrics["test_kl"] == pytest.approx(whole.kl.item(), rel=1e-4)


def test_multiple_choice(tmp_path):
    teacher = tiny.teacher("MultipleChoice")
    student = tiny.student(teacher, dropout=0.0)
    names = ("input_ids", "attention_mask", "token_type_ids")
    texts = tiny.rows(12)
    rows = [
        {name: [row[name] for row in texts[i : i + 3]] for name in names} | {"labels": i // 3 % 3}
        for i in range(0, 12, 3)
    ]
    batch = tensors(rows)
    whole = task_loss(logits(student, batch), logits(teacher, batch), batch["labels"])
    args = tiny.arguments(tmp_path, max_steps=2, logging_steps=1, gradient_accumulation_steps=2)
    trainer = DistillationTrainer(student, teacher, args, rows)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(whole.kl.item(), rel=1e-4, abs=1e-6)


def test_rows_without_labels_are_predicted(tmp_path):
    teacher = tiny.teacher()
    student = tiny.student(teacher)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in tiny.rows(5)]
    prediction = DistillationTrainer(student, teacher, tiny.arguments(tmp_path)).predict(rows)
    expected = logits(student.eval(), tensors(rows)).detach()
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), expected)
    assert not [name for name in prediction.metrics if "kl" in name]


class Watch(torch.nn.Module):
    """Notes in what state a layer of the teacher was called."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x):
        y = self.layer(x)
        self.seen.append((y.dtype, self.training, torch.is_grad_enabled()))
        return y


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("precision", ["model", "auto"])
def test_the_teacher_answers_in_eval_mode_without_gradients(tmp_path, bf16, precision):
    """By its own forward under the student's autocast, by the engine in its own dtype."""
    teacher = tiny.teacher().train()
    before = copy.deepcopy(teacher.state_dict())
    teacher.classifier = Watch(teacher.classifier)
    args = tiny.arguments(tmp_path, bf16=bf16, teacher_precision=precision, max_steps=3, learning_rate=1e-2)
    student = tiny.student(tiny.teacher())
    trainer = DistillationTrainer(student, teacher, args, tiny.rows(8), eval_dataset=tiny.rows(4))
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    trainer.evaluate()
    dtype = torch.bfloat16 if bf16 and precision == "model" else torch.float32
    assert teacher.classifier.seen == [(dtype, False, False)] * 4
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    teacher.classifier = teacher.classifier.layer
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_token_types_reach_the_teacher(tmp_path):
    """Of sentence pairs the student cannot read the token types; its teacher must."""
    from datasets import Dataset

    teacher = tiny.teacher()
    student, rows = tiny.student(teacher), tiny.rows(4, pairs=True)
    dataset = Dataset.from_list([{**row, "text": "not for a model"} for row in rows])
    args = tiny.arguments(tmp_path, alpha=1.0, per_device_eval_batch_size=4)
    got = DistillationTrainer(student, teacher, args, dataset, eval_dataset=dataset).evaluate()
    batch = tensors(rows)
    with torch.no_grad():
        wanted = task_loss(logits(student.eval(), batch), logits(teacher, batch), batch["labels"]).kl
        batch["token_type_ids"].zero_()
        blind = task_loss(logits(student, batch), logits(teacher, batch), batch["labels"]).kl
    assert got["eval_kl"] == pytest.approx(wanted.item(), rel=1e-4)
    assert got["eval_kl"] != pytest.approx(blind.item(), rel=1e-2)


def test_the_student_learns_what_its_teacher_answers(tmp_path):
    teacher = tiny.teacher()
    torch.manual_seed(7)
    student = transformers.DistilBertForSequenceClassification(tiny.student(teacher).config)
    rows = tiny.rows(64)
    args = tiny.arguments(
        tmp_path, alpha=1.0, temperature=4.0, learning_rate=3e-3, num_train_epochs=12, lr_scheduler_type="constant"
    )
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.3 * before
    batch = tensors(rows)
    same = logits(student.eval(), batch).argmax(-1) == logits(teacher, batch).argmax(-1)
    assert same.float().mean() > 0.85


def test_without_teacher_it_fine_tunes(tmp_path):
    student = tiny.student(tiny.teacher())
    args = tiny.arguments(tmp_path, alpha=0.0, max_steps=2, logging_steps=1)
    trainer = DistillationTrainer(student, None, args, tiny.rows(8))
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(entry["ce"]) and "kl" not in entry


def test_label_smoothing_is_honoured(tmp_path):
    student = tiny.student(tiny.teacher())
    args = tiny.arguments(tmp_path, alpha=0.0, label_smoothing_factor=0.3, per_device_eval_batch_size=8)
    metrics = DistillationTrainer(student, None, args, eval_dataset=tiny.rows(8)).evaluate()
    batch = tensors(tiny.rows(8))
    wanted = torch.nn.functional.cross_entropy(logits(student.eval(), batch), batch["labels"], label_smoothing=0.3)
    assert metrics["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_arguments_read_from_a_command_line():
    (args,) = transformers.HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(
        ["--output_dir", "out", "--temperature", "4", "--alpha", "0.9", "--use_cpu"]
    )
    assert (args.temperature, args.alpha) == (4.0, 0.9)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("temperature", 0.0, "temperature must be finite and above 0, got 0.0"),
        ("temperature", -1.0, "temperature must be finite and above 0, got -1.0"),
        ("temperature", float("inf"), "temperature must be finite and above 0, got inf"),
        ("temperature", float("nan"), "temperature must be finite and above 0, got nan"),
        ("alpha", 1.5, "alpha must be 0 to 1, got 1.5"),
        ("alpha", -0.1, "alpha must be 0 to 1, got -0.1"),
        ("alpha", float("nan"), "alpha must be 0 to 1, got nan"),
    ],
)
def test_bad_arguments(tmp_path, setting, value, message):
    with pytest.raises(ValueError) as caught:
        tiny.arguments(tmp_path, **{setting: value})
    assert str(caught.value) == f"DistillationArguments: {message}"


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    return model


def regression():
    model = tiny.teacher()
    model.config.problem_type = "regression"
    return model


BAD = [
    (
        lambda: (tiny.student(tiny.teacher()), tiny.teacher(num_labels=4)),
        "teacher and student must have the same number of classes, got 4 and 3",
    ),
    (
        lambda: (tiny.student(tiny.teacher()), tiny.teacher(vocab_size=65)),
        "teacher and student must have the same vocabulary size, got 65 and 64",
    ),
    (
        lambda: (named(tiny.student(tiny.teacher()), "abc"), named(tiny.teacher(), "acb")),
        "teacher and student must have the same class names, got ['a', 'c', 'b'] and ['a', 'b', 'c']",
    ),
    (lambda: (tiny.student(tiny.teacher()), None), "teacher must be given for alpha above 0, got None for 0.5"),
    (lambda: (tiny.teacher(),) * 2, "teacher must be another model than the student, got the same"),
    (
        lambda: (tiny.student(tiny.teacher()), regression()),
        "BertForSequenceClassification must classify into one class each, got problem_type regression",
    ),
    (
        lambda: (tiny.teacher(num_labels=1), tiny.teacher()),
        "BertForSequenceClassification must have 2 classes or more, got 1",
    ),
    (
        lambda: (tiny.teacher("QuestionAnswering", num_labels=2), tiny.teacher(num_labels=2)),
        "model and teacher must have logits [..., classes], got BertForQuestionAnswering",
    ),
    (
        lambda: (tiny.student(tiny.teacher()), tiny.teacher().bert),
        "model and teacher must have logits [..., classes], got BertModel",
    ),
]


@pytest.mark.parametrize(("pair", "message"), BAD)
def test_models_that_do_not_fit(tmp_path, pair, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        DistillationTrainer(*pair(), tiny.arguments(tmp_path))
    assert str(caught.value) == f"DistillationTrainer: {message}"


def test_other_arguments_are_refused(tmp_path):
    teacher = tiny.teacher()
    student = tiny.student(teacher)
    with pytest.raises(TypeError) as caught:
        DistillationTrainer(student, teacher, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    assert str(caught.value) == ("DistillationTrainer: args must be a DistillationArguments, got TrainingArguments")
    with pytest.raises(ValueError) as caught:
        DistillationTrainer(student, teacher, tiny.arguments(tmp_path), compute_loss_func=len)
    assert str(caught.value) == ("DistillationTrainer: compute_loss_func must be None, the loss is this trainer's own")


def test_a_batch_without_labels_cannot_be_trained_on(tmp_path):
    teacher = tiny.teacher()
    rows = [{"input_ids": row["input_ids"]} for row in tiny.rows(4)]
    trainer = DistillationTrainer(tiny.student(teacher), teacher, tiny.arguments(tmp_path), rows)
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert str(caught.value) == "DistillationTrainer: a batch must hold labels, got input_ids"


def test_a_label_out_of_range_is_named(tmp_path):
    teacher, rows = tiny.teacher(), tiny.rows(4)
    rows[2]["labels"] = 3
    trainer = DistillationTrainer(tiny.student(teacher), teacher, tiny.arguments(tmp_path), rows)
    with pytest.raises(ValueError, match=r"^task_loss: labels must be 0 to 2, or -100 for none, got 3$"):
        trainer.train()


@pytest.mark.parametrize("how", ["logged", "saved"])
def test_a_run_that_diverges_ends_and_leaves_no_checkpoint_of_it(tmp_path, how):
    teacher, settings = tiny.teacher(), {"learning_rate": 1e30, "max_steps": 6, "save_strategy": "steps"}
    settings |= {"save_steps": 100, "logging_steps": 2} if how == "logged" else {"save_steps": 2, "logging_steps": 100}
    arguments = tiny.arguments(tmp_path, optim="sgd", max_grad_norm=0.0, **settings)
    trainer = DistillationTrainer(tiny.student(teacher), teacher, arguments, tiny.rows(24))
    of = (
        "losses must be finite, got (kl|ce) " if how == "logged" else "weights must be finite, got others in distilbert"
    )
    with pytest.raises(DivergedError, match=rf"^DistillationTrainer: {of}.* by step [24]: a lower learning_rate "):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_half_of_the_real_bert_learns_from_the_whole(tmp_path, bert_dir, tokenizer):
    """Real weights, real text: two classes told apart by their wording."""
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification.from_pretrained(bert_dir, num_labels=2, use_safetensors=True)
    student, _ = student_from_teacher(teacher)
    texts = [f"Return the {n} of a list." for n in ("length", "sum", "maximum", "minimum", "median", "mean")]
    texts += [f"The {n} slept in the garden." for n in ("dog", "cat", "old man", "child", "gardener", "bee")]
    rows = [{**tokenizer(text), "labels": int(index >= 6)} for index, text in enumerate(texts)]
    args = tiny.arguments(tmp_path, learning_rate=2e-4, num_train_epochs=3, per_device_train_batch_size=4)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_the_drop_in_classes_are_trained_alike(tmp_path, head):
    teacher = tiny.teacher(head)
    student = tiny.student(teacher, dropout=0.0)
    student.save_pretrained(tmp_path / "student")
    fast = getattr(distilbert_fast, f"DistilBertFor{head}").from_pretrained(tmp_path / "student")
    for module in fast.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses = []
    for model in (student, fast):
        args = tiny.arguments(tmp_path / "run", max_steps=4, learning_rate=1e-2)
        losses.append(DistillationTrainer(model, teacher, args, tiny.rows(8, head)).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    again, report = student_from_teacher(fast)
    assert report.left_out == () and type(again) is type(fast)


def test_noise_on_embeddings_is_that_of_transformers(tmp_path):
    """NEFTune's hook takes its scale from the length of the padded rows."""
    teacher, losses = tiny.teacher(), []
    tiny.student(teacher, dropout=0.0).save_pretrained(tmp_path / "student")
    for library in (transformers, distilbert_fast):
        model = library.DistilBertForSequenceClassification.from_pretrained(tmp_path / "student")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for alpha in (None, 30.0):
            args = tiny.arguments(tmp_path / "run", max_steps=2, neftune_noise_alpha=alpha)
            losses.append(DistillationTrainer(copy.deepcopy(model), teacher, args, tiny.rows(8)).train().training_loss)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5) and losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_batch_that_was_too_large_is_not_in_the_logs(tmp_path):
    teacher = tiny.teacher()
    args = tiny.arguments(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=1, logging_steps=1
    )
    trainer = DistillationTrainer(tiny.student(teacher), teacher, args, tiny.rows(8))
    compute = trainer.compute_loss

    def small(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.compute_loss = small
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.5 * logged["kl"] + 0.5 * logged["ce"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_on_a_gpu_it_learns_and_resumes(tmp_path, precision):
    def make(name):
        teacher = tiny.teacher()
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2}
        args = tiny.arguments(tmp_path / name, use_cpu=False, logging_steps=6, **saving, **precision)
        return DistillationTrainer(tiny.student(teacher), teacher, args, tiny.rows(24), eval_dataset=tiny.rows(8))

    whole, resumed = make("whole"), make("resumed")
    before = whole.evaluate()["eval_loss"]
    loss = whole.train().training_loss
    assert loss < float("inf") and whole.evaluate()["eval_loss"] < before
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed.train(resume_from_checkpoint="auto")
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
