"""SparseLinear: what it computes, trains, saves and reads."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distilbert_fast.sparse import SparseLinear, pack_mask, unpack_mask

SHAPES = [(7, 30), (5, 8), (3, 1), (0, 9), (4, 0), (1, 65)]


def made(rows=7, columns=30, bias=True, share=0.3):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias)
    return linear, SparseLinear.from_linear(linear, torch.rand(rows, columns) < share)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_a_bit_a_weight(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], -(-shape[1] // 8))
    for row, line in zip(mask.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(line), "little") == sum(1 << c for c, kept in enumerate(row) if kept)
    assert torch.equal(unpack_mask(packed, shape[1]), mask)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30,), (5, 30), (2, 3, 30), (0, 30)])
def test_it_computes_with_the_weights_in_its_mask(shape, bias):
    linear, sparse = made(bias=bias)
    x = torch.randn(shape)
    expected = F.linear(x.double(), (linear.weight * sparse.mask).double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(sparse(x), expected.float(), rtol=1e-5, atol=1e-6)
    assert sparse.bias is linear.bias
    torch.testing.assert_close(sparse.dense()(x), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_is_gone_stays_gone_whatever_trains_it(optimizer):
    _, sparse = made()
    before, steps = sparse.dequantized().detach(), optimizer(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        sparse(torch.randn(4, 30)).square().sum().backward()
        assert not sparse.weight.grad[~sparse.mask].any() and bool(sparse.weight.grad[sparse.mask].all())
        steps.step()
    assert torch.equal(sparse.dequantized() != 0, sparse.mask)
    assert not torch.equal(sparse.dequantized(), before)


def test_what_stands_outside_of_the_mask_is_neither_computed_with_nor_saved():
    _, sparse = made()
    x = torch.randn(4, 30)
    expected, state = sparse(x).detach(), {name: part.clone() for name, part in sparse.state_dict().items()}
    with torch.no_grad():
        sparse.weight[~sparse.mask] = torch.inf
    assert torch.equal(sparse(x), expected)
    assert all(torch.equal(part, state[name]) for name, part in sparse.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_state(bias):
    _, sparse = made(bias=bias)
    state = sparse.state_dict()
    assert list(state) == ["weight", "bias", "values"] if bias else ["weight", "values"]
    assert state["weight"].shape == (1, 7, 4) and state["weight"].dtype == torch.uint8
    assert torch.equal(state["values"], sparse.weight[sparse.mask])
    _, other = made(bias=bias, share=0.6)
    weight, mask = other.weight, other.mask
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.weight is weight and other.mask is mask  # in place: an optimizer knows them
    assert torch.equal(other.dequantized(), sparse.dequantized()) and torch.equal(other.mask, sparse.mask)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    _, sparse = made()
    again = copied(sparse)
    assert torch.equal(again.dequantized(), sparse.dequantized()) and torch.equal(again.mask, sparse.mask)
    assert again.to(torch.bfloat16).mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"weight": torch.zeros(7, 30)}, "weight must be a mask, uint8 [1, 7, 4], got float32 [7, 30]"),
        (lambda s: s | {"weight": s["weight"][:, :6]}, "weight must be a mask, uint8 [1, 7, 4], got uint8 [1, 6, 4]"),
        (lambda s: s | {"weight": s["weight"] | 128}, "weight must have 0 in the 2 bits after the last of 30 columns"),
        (lambda s: s | {"values": s["values"][1:]}, "values must be the [{n}] that its mask leaves, got [{less}]"),
    ],
)
def test_a_state_of_another_layer_is_refused(change, message):
    _, sparse = made()
    before, n = sparse.dequantized().detach().clone(), int(sparse.mask.sum())
    with pytest.raises(RuntimeError) as caught:
        sparse.load_state_dict(change(sparse.state_dict()))
    assert message.format(n=n, less=n - 1) in str(caught.value)
    assert torch.equal(sparse.dequantized(), before)


def test_a_state_that_lacks_something():
    _, sparse = made()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "values"'):
        sparse.load_state_dict({name: x for name, x in sparse.state_dict().items() if name != "values"})


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^SparseLinear: mask must be of shape \[7, 30\], got \[30, 7\]$"):
        SparseLinear.from_linear(nn.Linear(30, 7), torch.ones(30, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^SparseLinear: mask must be bool, got uint8$"):
        SparseLinear.from_linear(nn.Linear(30, 7), torch.ones(7, 30, dtype=torch.uint8))


def test_traced_exported_and_under_autocast():
    _, sparse = made()
    x = torch.randn(4, 30)
    expected = sparse(x)
    exported = torch.export.export(sparse, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(sparse)(x), expected)
