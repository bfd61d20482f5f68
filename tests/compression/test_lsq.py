"""Float weights that are trained as int8 ones: gradients, both trainers, and the model that comes of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from distillation import tiny as tiny_distillation
from tiny_models import answers, assert_same_bits, padded_batch, tiny
from torch import nn

from distilbert_fast import CodebookConfig, Int8Config, SparsityConfig, optimize, prepare_qat, prune_connections
from distilbert_fast import quantize_model as to_int8
from distilbert_fast.compression.lsq import LsqLinear
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.layers import Int8Linear


def lsq(model):
    return [module for module in model.modules() if isinstance(module, LsqLinear)]


def adopted(rows=7, columns=30, spread=1.0):
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows)
    LsqLinear.adopt(layer)
    with torch.no_grad():
        layer.factor.mul_(spread)
    return layer


@pytest.mark.parametrize("spread", [1.0, 0.4, -0.9])
def test_gradients_are_those_of_the_paper(spread):
    """By the formulas, in float64; a small scale puts a part of the weights outside of the range."""
    layer, x, dy = adopted(spread=spread), torch.randn(5, 30, requires_grad=True), torch.randn(5, 7)
    layer(x).backward(dy)
    w, s = layer.weight.detach().double(), layer.weight_scale.detach().double()[:, None]
    x_scale = x.detach().abs().amax(1, keepdim=True).double() / 127
    x_hat = (x.detach() / x_scale).round().clamp(-127, 127) * x_scale
    v = w / s
    inside, codes = v.abs() <= 127, v.round().clamp(-127, 127)
    dw_hat = dy.double().T @ x_hat
    ds = (dw_hat * torch.where(inside, codes - v, codes)).sum(1) / math.sqrt(127 * 30)
    if spread == 0.4:
        assert bool((~inside).any())
    torch.testing.assert_close(layer.weight.grad.double(), dw_hat * inside, rtol=1e-3, atol=1e-4)
    sign = math.copysign(1, spread)
    torch.testing.assert_close(layer.factor.grad.double(), sign * ds * layer.start.double(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), dy.double() @ (codes * s), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


def test_a_row_of_zeros_and_no_rows():
    layer = nn.Linear(30, 3)
    layer.weight.data[1] = 0
    LsqLinear.adopt(layer)
    layer(torch.randn(4, 30)).square().sum().backward()
    assert bool(layer.factor.grad.isfinite().all()) and bool(layer.weight.grad.isfinite().all())
    assert layer(torch.zeros(2, 0, 30)).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_as_the_model_that_it_becomes(dtype):
    model, batch = tiny().to(dtype), padded_batch()
    names = list(model.state_dict())
    assert prepare_qat(model, Int8Config(heads=True)) is model and len(lsq(model)) == 14
    assert [name for name in model.state_dict() if not name.endswith((".start", ".factor"))] == names
    with torch.no_grad():
        for layer in lsq(model):
            layer.factor.mul_(torch.rand_like(layer.factor) + 0.5)
    expected = copy.deepcopy(model)
    to_int8(model, Int8Config(heads=True))
    assert not lsq(model) and sum(isinstance(module, Int8Linear) for module in model.modules()) == 14
    assert_same_bits(model, expected, batch)
    assert {name for name in model.state_dict() if not name.endswith("weight_scale")} == set(names)


def test_distillation_trains_weights_and_scales_and_the_int8_model_gives_the_same_classes(tmp_path):
    teacher, rows = tiny_distillation.teacher(), tiny_distillation.rows(48)
    student = prepare_qat(tiny_distillation.student(teacher, 0.0), Int8Config())
    scales, weights = (
        [getattr(layer, part).detach().clone() for layer in lsq(student)] for part in ("factor", "weight")
    )
    args = tiny_distillation.arguments(
        tmp_path, num_train_epochs=6, per_device_train_batch_size=8, learning_rate=5e-3, save_strategy="no"
    )
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    for layer, scale, weight in zip(lsq(student), scales, weights, strict=True):
        assert not torch.equal(layer.factor, scale) and not torch.equal(layer.weight, weight)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    expected = answers(student.eval(), batch)[0]
    to_int8(student, Int8Config())
    assert torch.equal(answers(student, batch)[0], expected)
    student.save_pretrained(tmp_path / "int8")
    read = type(student).from_pretrained(tmp_path / "int8")
    assert torch.equal(answers(read, batch)[0], expected)
    assert torch.equal(answers(optimize(read), batch)[0].argmax(1), expected.argmax(1))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def trainer(path, **settings):
        teacher = tiny_distillation.teacher()
        student = prepare_qat(tiny_distillation.student(teacher), Int8Config())
        args = tiny_distillation.arguments(
            path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, **settings
        )
        return DistillationTrainer(student, teacher, args, tiny_distillation.rows(20))

    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "b", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert any(name.endswith(".factor") for name in whole.model.state_dict())
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_refused():
    for model, config, error, message in (
        (tiny(), Int8Config(embeddings=True), ValueError, "config.embeddings must be False"),
        (prepare_qat(tiny(), Int8Config()), Int8Config(), ValueError, "model must be one that is not prepared yet"),
        (
            prune_connections(tiny(), SparsityConfig(amount=0.5)),
            Int8Config(),
            TypeError,
            "bert.encoder.layer.0.attention.self.query must be an nn.Linear, got SparseLinear",
        ),
    ):
        with pytest.raises(error, match=f"^prepare_qat: {message}"):
            prepare_qat(model, config)
    name = "bert.encoder.layer.0.attention.self.query"
    for config, given, message in (
        (CodebookConfig(16), {}, f"config of {name} must be int8, as which it was trained, got codebook"),
        (
            Int8Config(modules_to_not_convert=["layer.0"]),
            {},
            f"config of {name} must be int8, as which it was trained, got float",
        ),
        (
            None,
            {"calibration": [padded_batch()]},
            "calibration must be None after prepare_qat, which trained the scales",
        ),
    ):
        model = prepare_qat(tiny(), Int8Config())
        with pytest.raises(ValueError) as caught:
            to_int8(model, config, **given)
        assert str(caught.value).startswith(f"quantize_model: {message}")
        assert len(lsq(model)) == 12
