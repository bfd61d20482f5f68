"""Layers of shared values in the engine: int8 codes of them by default, their floats where floats are asked for."""

from __future__ import annotations

import pytest
import torch
from tiny_encoder import MASK, V, make
from torch import nn

from distilbert_fast import backend
from distilbert_fast.engine.engine import Engine
from distilbert_fast.layers import CodebookLinear


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


def pair(num_values, group_size, dtype=torch.float32):
    """An encoder of shared values, and one of plain layers with the same weights."""
    shared, plain = make(dtype=dtype), make(dtype=dtype)
    for i, layer in enumerate(shared.layers):
        linears = {name: module for name, module in layer._asdict().items() if isinstance(module, nn.Linear)}
        made = {name: CodebookLinear.from_linear(linear, num_values, group_size) for name, linear in linears.items()}
        for name, module in made.items():
            getattr(plain.layers[i], name).weight.data.copy_(module.dequantized())
        shared.layers[i] = layer._replace(**made)
    return shared, plain


@pytest.mark.parametrize(("num_values", "group_size"), [(256, None), (64, 7), (16, 1)])
@pytest.mark.parametrize("precision", [None, "int8", "fp32", "bf16"])
def test_computes_what_layers_with_these_weights_do(num_values, group_size, precision, ids, tier):
    shared, plain = pair(num_values, group_size)
    found, expected = Engine.from_model(shared, precision), Engine.from_model(plain, precision or "int8")
    assert found.is_native and expected.is_native
    assert torch.equal(found(ids, MASK), expected(ids, MASK))
    heads = torch.tensor([1.0, 0.0, 0.5])
    assert torch.equal(found(ids, MASK, head_mask=heads), expected(ids, MASK, head_mask=heads))


@pytest.mark.parametrize("precision", [None, "int8", "fp32", "bf16", "fp16"])
def test_op_by_op(precision, ids):
    shared, plain = pair(16, 5)
    with backend("torch"):
        found, expected = Engine.from_model(shared, precision), Engine.from_model(plain, precision or "int8")
        assert torch.equal(found(ids, MASK), expected(ids, MASK))


def test_static_scales_are_those_of_these_weights(ids):
    shared, plain = pair(64, None)
    found, expected = (
        Engine.from_model(model, "int8").calibrated([{"input_ids": ids}, {"input_ids": ids[:2]}])
        for model in (shared, plain)
    )
    assert torch.equal(found(ids, MASK), expected(ids, MASK))


def test_a_model_of_half_precision(ids):
    shared, plain = pair(16, None, torch.bfloat16)
    for precision in (None, "bf16"):
        found, expected = Engine.from_model(shared, precision), Engine.from_model(plain, precision or "int8")
        assert torch.equal(found(ids, MASK), expected(ids, MASK))


def test_error_of_the_int8_codes():
    """Each value is at most max|row| / 254 away from its code; of 16 values, of the largest of four rows."""
    torch.manual_seed(0)
    from distilbert_fast.engine.weights import _linear_weights

    for num_values, rows in ((64, 1), (16, 4)):
        made = CodebookLinear.from_linear(nn.Linear(90, 40), num_values, 8)
        codes, _, scale, _ = _linear_weights(made, None)
        exact = made.dequantized().detach()
        bound = exact.view(40 // rows, -1).abs().amax(1).repeat_interleave(rows)[:, None] / 254
        assert bool(((codes * scale[:, None] - exact).abs() <= bound * 1.001).all())
