"""CodebookLinear: what it computes, how near its values are to the weights, its gradients, where it may go."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from distilbert_fast.layers import CodebookLinear

SIZES = (256, 64, 16)


def layer(num_values=16, group_size=None, c=30, f=7, **kind):
    torch.manual_seed(0)
    return CodebookLinear.from_linear(nn.Linear(c, f, **kind), num_values, group_size)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_values", SIZES)
@pytest.mark.parametrize("shape", [(30,), (5, 30), (2, 3, 30), (0, 30), (2, 0, 30)])
def test_computes_what_its_values_say(shape, num_values, bias):
    made = layer(num_values, 3, bias=bias)
    x = torch.randn(shape)
    w = torch.stack([made.values[f // 3][made.codes[f].long()] for f in range(7)])
    assert torch.equal(made.dequantized(), w)
    torch.testing.assert_close(made(x), nn.functional.linear(x, w, made.bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (1, 7), (3, 3), (7, 1), (50, 1)])
@pytest.mark.parametrize(("num_values", "size"), [(256, 30), (64, 23), (16, 15)])
def test_what_it_holds(num_values, size, group_size, groups):
    made = layer(num_values, group_size)
    assert made.weight.shape == (1, 7, size) and made.weight.dtype == torch.uint8 and not made.weight.requires_grad
    assert made.values.shape == (groups, num_values) and made.values.requires_grad
    assert list(made.state_dict()) == ["weight", "values", "bias"]


def test_smaller_groups_are_nearer_and_enough_values_exact():
    torch.manual_seed(0)
    linear = nn.Linear(60, 40)

    def error(*size):
        made = CodebookLinear.from_linear(linear, *size)
        assert made.bias is linear.bias
        return float(((made.dequantized() - linear.weight) ** 2).detach().sum())

    assert 0 == error(64, 1) < error(16, 1) < error(16, 4) < error(16, None)
    assert error(256, None) < error(64, None) < error(16, None)


def test_important_weights_are_nearer():
    torch.manual_seed(0)
    linear, importance = nn.Linear(60, 40), torch.ones(40, 60)
    importance[:, :5] = 1e6
    plain, weighted = (CodebookLinear.from_linear(linear, 16, 8, given) for given in (None, importance))
    errors = [((made.dequantized() - linear.weight) ** 2).detach() for made in (plain, weighted)]
    assert errors[1][:, :5].sum() < 0.5 * errors[0][:, :5].sum()
    assert errors[1].sum() > errors[0].sum()


@pytest.mark.parametrize(("c", "f"), [(0, 5), (5, 0), (0, 0)])
def test_layers_without_weights(c, f):
    made = CodebookLinear.from_linear(nn.Linear(c, f) if f and c else _empty(c, f), 16, 3)
    assert torch.equal(made(torch.randn(2, c)), made.bias.expand(2, f))
    assert bool(made.values.isfinite().all())


def _empty(c, f):
    made = nn.Linear(1, 1)
    made.in_features, made.out_features = c, f
    made.weight, made.bias = nn.Parameter(torch.empty(f, c)), nn.Parameter(torch.randn(f))
    return made


def test_gradient_of_a_value_is_the_sum_of_those_of_its_weights():
    made = layer(16, 3)
    x, dy = torch.randn(2, 5, 30, requires_grad=True), torch.randn(2, 5, 7)
    made(x).backward(dy)
    dense = made.dequantized().detach().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    nn.functional.linear(x2, dense, made.bias.detach()).backward(dy)
    expected = torch.zeros(3, 16)
    for f in range(7):
        expected[f // 3].index_add_(0, made.codes[f].long(), dense.grad[f])
    torch.testing.assert_close(made.values.grad, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(made.bias.grad, dy.sum((0, 1)))
    assert made.weight.grad is None


def test_values_learn_and_codes_stay():
    made = layer(16, None)
    target, x, before = nn.Linear(30, 7), torch.randn(200, 30), made.weight.clone()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(made(x), target(x).detach())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0] and torch.equal(made.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_go_where_the_model_goes_and_codes_stay(dtype):
    made = layer(64)
    codes = made.weight.clone()
    made.to(dtype)
    assert made.values.dtype == dtype and torch.equal(made.weight, codes)
    with torch.no_grad():
        assert made(torch.randn(2, 30, dtype=dtype)).dtype == dtype
    again = CodebookLinear(30, 7, 64, dtype=dtype)
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    stream.seek(0)
    again.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(again.dequantized(), made.dequantized())
    assert torch.equal(copy.deepcopy(made).dequantized(), made.dequantized())


def test_what_it_says_of_itself():
    assert repr(layer(16, 3)).endswith("(in_features=30, out_features=7, bias=True, num_values=16, group_size=3)")


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^CodebookLinear: num_values must be one of 256, 64, 16, got 32$"):
        CodebookLinear(3, 4, 32)
    with pytest.raises(ValueError, match=r"^CodebookLinear: num_values must be one of 256, 64, 16, got 16\.0$"):
        CodebookLinear(3, 4, 16.0)


def test_weights_that_are_no_numbers_are_refused():
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        linear.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^kmeans: x must be finite, got nan$"):
        CodebookLinear.from_linear(linear, 16)
