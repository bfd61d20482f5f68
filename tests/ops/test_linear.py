"""linear: the product of ours, on every tier, and who serves when."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops import linear as op
from distilbert_fast.ops.linear import linear
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

if not backends.availability("cpu").ok:
    pytest.skip("the native module is not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def ours():
    with distilbert_fast.backend("cpu"):
        yield


def run(function, x, weight, bias, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = function(x, weight, bias)
    y.backward(dy)
    return [y.detach(), x.grad, weight.grad] + ([] if bias is None else [bias.grad])


def check(x, weight, bias, dy):
    before = [t.clone() for t in (x, weight, dy)]
    mine = run(linear, x, weight, bias, dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, dy), strict=True))
    torchs = run(F.linear, x, weight, bias, dy)
    exact = run(F.linear, *(None if t is None else t.double() for t in (x, weight, bias, dy)))
    for name, *three in zip(("y", "dx", "dW", "db"), mine, torchs, exact, strict=False):
        assert_twice_rule(*three, name)


def case(n, c, f, bias=True):
    return logits(n, c, seed=1, spread=1.0), logits(f, c, seed=2, spread=1.0), logits(1, f, seed=3)[0] if bias else None


# One of each; odd; around a vector, a block, a tile and a panel; longer than one chain of sums; DistilBERT's own.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 16, 32), (17, 33, 65), (48, 15, 31), (49, 17, 33), (5, 800, 40), (1030, 9, 12)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "c", "f"), [*SHAPES, (130, 384, 1536)])
def test_values_and_gradients(n, c, f, bias, tier):
    check(*case(n, c, f, bias), logits(n, f, seed=4, spread=1.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads, tier):
    x, weight, bias = case(130, 96, 200)
    dy = logits(130, 200, seed=4)
    before = torch.get_num_threads()
    once = run(linear, x, weight, bias, dy)
    try:
        torch.set_num_threads(threads)
        for a, b in zip(once, run(linear, x, weight, bias, dy), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("of_dy", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, of_dy, tier):
    x, weight, bias = case(19, 21, 35)
    dy = torch.ones(()).expand(19, 35) if of_dy == "expanded" else lay_out(logits(19, 35, seed=4), of_dy)
    check(lay_out(x, layout), lay_out(weight, layout), bias, dy)


@pytest.mark.parametrize(("n", "c", "f"), [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)])
def test_nothing_to_multiply(n, c, f, tier):
    x, weight, bias = torch.randn(n, c), torch.randn(f, c), torch.randn(f)
    for mine, torchs in zip(
        run(linear, x, weight, bias, torch.randn(n, f)), run(F.linear, x, weight, bias, torch.randn(n, f)), strict=True
    ):
        assert mine.shape == torchs.shape
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_shapes_of_batches():
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(7, 8), torch.randn(7)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x[0, 0, 0], weight, bias), F.linear(x[0, 0, 0], weight, bias))


def test_who_serves(monkeypatch):
    """Ours where it is faster or forced, in float32 and outside autocast."""
    x, weight, bias = case(4, 8, 6)
    served = []
    monkeypatch.setattr(op._Linear, "apply", lambda *args: served.append(args) or F.linear(*args))
    linear(x, weight, bias)
    assert len(served) == 1
    linear(x.double(), weight.double(), bias.double())
    linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with distilbert_fast.backend("torch"):
        linear(x, weight, bias)
    assert len(served) == 1


def test_opcheck():
    x, weight, bias = case(5, 6, 7)
    torch.library.opcheck(torch.ops.distilbert_fast.linear_product.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.distilbert_fast.linear_product.default, (x.t(), weight[:, :5].clone(), None))


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3, 5), None, r"linear: weight must be of shape \[F, 4\], got \[3, 5\]"),
        (torch.zeros(3), None, r"linear: weight must be of shape \[F, 4\], got \[3\]"),
        (torch.zeros(3, 4), torch.zeros(4), r"linear: bias must be of shape \[3\], got \[4\]"),
    ],
)
def test_refuses(weight, bias, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        linear(torch.zeros(2, 4), weight, bias)


NATIVE = dict(
    a=64, a_row=4, a_step=1, b=64, b_row=4, b_step=1, bias=0, rows=2, columns=3, k=4, out=64, add=False, threads=1
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", -1, "rows, columns and k must be 0 or more, got -1, 3 and 4"),
        ("k", 1 << 40, f"rows, columns and k must fit in 31 bits, got 2, 3 and {1 << 40}"),
        ("a_step", 2, "a must have a stride of 1, got 4 and 2"),
        ("b_row", -4, "b must have a stride of 1, got -4 and 1"),
        ("a", 0, "a and b must point to memory, got null"),
        ("out", 0, "out must point to memory, got null"),
    ],
)
def test_the_native_entry_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"^linear: {message}$"):
        backends.cpu().linear_product(*(NATIVE | {name: value}).values())


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_memory(add, dtype, tier):
    """As linear_kl_div does, chunk by chunk; without ``add`` what stood there, NaN even, is gone."""
    a, b, bias = (x.to(dtype) for x in case(13, 900, 37))
    before = torch.full((13, 37), 3.0 if add else float("nan"), dtype=dtype)
    start = before.double() if add else 0.0
    for given in (None, bias):
        exact = start + F.linear(a.double(), b.double(), None if given is None else given.double())
        torchs = F.linear(a, b, given) + (before if add else 0.0)
        assert_twice_rule(op.product_into(before.clone(), a, b, given, add), torchs, exact)
