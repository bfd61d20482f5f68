"""linear: the product of ours in float32 and in bfloat16, on every tier, and who serves when."""

from __future__ import annotations

import contextlib

import places
import pytest
import torch
import torch.nn.functional as F
from traced import Traced

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops import linear as op
from distilbert_fast.ops.linear import linear
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

TRACED = {
    "linear": Traced(lambda x, w, b: linear(x, w, b), lambda n: [torch.randn(n, 8), torch.randn(6, 8), torch.randn(6)])
}

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


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(params=[tier for tier in places.TIERS if tier in ("amx", "avx512_bf16")])
def pairs(request):
    """A tier that multiplies bfloat16."""
    with places.on_tier(request.param):
        assert backends.cpu().multiplies_bfloat16()
        yield request.param


@pytest.fixture
def widened(monkeypatch):
    """A processor without instructions for bfloat16, of torch's or of ours."""
    monkeypatch.setattr(op, "_torch_multiplies_bfloat16", lambda: False)
    with places.on_tier("scalar"):
        yield


def check_bfloat16(x, weight, bias, dy, context=autocast):
    """Against torch under the same autocast; gradients have the dtypes of their leaves."""
    before = [t.clone() for t in (x, weight, dy)]
    with context():
        mine, torchs = run(linear, x, weight, bias, dy), run(F.linear, x, weight, bias, dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, dy), strict=True))
    exact = run(F.linear, *(None if t is None else t.double() for t in (x, weight, bias, dy)))
    for name, *three in zip(("y", "dx", "dW", "db"), mine, torchs, exact, strict=False):
        assert three[0].dtype == three[1].dtype, name
        assert_twice_rule(*three, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "c", "f"), [*SHAPES, (33, 2, 95), (97, 64, 130), (130, 384, 1536)])
def test_bfloat16_values_and_gradients(n, c, f, dtype, bias, pairs):
    x, weight, bias = case(n, c, f, bias)
    check_bfloat16(x.to(dtype), weight, bias, logits(n, f, torch.bfloat16, seed=4, spread=1.0))


def test_bfloat16_weights(pairs):
    x, weight, bias = (t.bfloat16() for t in case(35, 37, 39))
    dy = logits(35, 39, torch.bfloat16, seed=4)
    check_bfloat16(x, weight, bias, dy, contextlib.nullcontext)
    check_bfloat16(x.float(), weight, bias.float(), dy)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "c", "f"), [*SHAPES, (0, 4, 3), (4, 0, 3)])
def test_bfloat16_is_widened(n, c, f, dtype, bias, widened):
    x, weight, bias = case(n, c, f, bias)
    dy = logits(n, f, torch.bfloat16, seed=4, spread=1.0)
    check_bfloat16(x.to(dtype), weight, bias, dy)
    low = [None if t is None else t.bfloat16() for t in (x, weight, bias)]
    check_bfloat16(*low, dy, contextlib.nullcontext)


def test_no_bfloat16_is_multiplied_where_it_is_widened(widened, monkeypatch):
    multiplied = []

    def product(x, weight, bias=None, of=F.linear):
        assert not torch.is_autocast_enabled("cpu")  # it would round the operands again
        multiplied.extend(t.dtype for t in (x, weight, bias) if t is not None)
        return of(x, weight, bias)

    monkeypatch.setattr(F, "linear", product)
    x, weight, bias = case(5, 6, 7)
    with autocast():
        run(linear, x.bfloat16(), weight, bias, torch.ones(5, 7, dtype=torch.bfloat16))
    assert multiplied == [torch.float32] * 9  # y; dx, dW; db as a product too


@pytest.mark.parametrize("n", [4096, 4097, 9000])
def test_sums_over_many_rows_stay_exact(n, pairs):
    """dW of thousands of tokens, whose parts are summed one after the other."""
    x, dy = torch.ones(n, 3), torch.ones(n, 2, dtype=torch.bfloat16)
    x[::2] = 2.0**-7
    with autocast():
        *_, dW, db = run(linear, x, torch.zeros(2, 3), torch.zeros(2), dy)
    assert (dW == (n + 1) // 2 * 2.0**-7 + n // 2).all() and (db == n).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits_in_bfloat16(threads, pairs):
    x, weight, bias = case(130, 96, 200)
    dy = logits(130, 200, torch.bfloat16, seed=4)
    before = torch.get_num_threads()
    try:
        with autocast():
            torch.set_num_threads(1)
            once = run(linear, x, weight, bias, dy)
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(once, run(linear, x, weight, bias, dy), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("of_dy", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_in_bfloat16(dtype, layout, of_dy, pairs):
    x, weight, bias = case(33, 64, 35)
    dy = logits(33, 35, torch.bfloat16, seed=4)
    dy = torch.ones((), dtype=dy.dtype).expand(33, 35) if of_dy == "expanded" else lay_out(dy, of_dy)
    check_bfloat16(lay_out(x.to(dtype), layout), lay_out(weight, layout), bias, dy)


@pytest.mark.parametrize(("n", "c", "f"), [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)])
def test_nothing_to_multiply_in_bfloat16(n, c, f, pairs):
    given = torch.randn(n, c), torch.randn(f, c), torch.randn(f), torch.randn(n, f).bfloat16()
    with autocast():
        for mine, torchs in zip(run(linear, *given), run(F.linear, *given), strict=True):
            assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
            torch.testing.assert_close(mine, torchs, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("wanted", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_only_the_gradients_that_are_wanted(wanted, pairs):
    leaves = [t.requires_grad_(bool(want)) for t, want in zip(case(9, 10, 11), wanted, strict=True)]
    with autocast():
        y = linear(*leaves)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.float().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [bool(want) for want in wanted]


def test_what_is_not_finite_stays_in_its_row(pairs):
    x, weight, bias = case(20, 40, 50)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    with autocast():
        y, exact = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(y.isfinite(), exact.isfinite()) and not y[3].isfinite().any()


def test_who_serves(monkeypatch, tier):
    """Ours in float32, and in bfloat16 where the tier multiplies it or torch does not, if it is faster or forced."""
    x, weight, bias = case(4, 8, 6)
    low = [t.bfloat16() for t in (x, weight, bias)]
    served = []
    monkeypatch.setattr(op._Linear, "apply", lambda *args: served.append(args[3]) or F.linear(*args[:3]))
    linear(x, weight, bias)
    linear(*low)
    with autocast():
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert linear(low[0], weight, bias).dtype == torch.bfloat16
    assert served == [torch.float32] + 3 * [torch.bfloat16] * (
        backends.cpu().multiplies_bfloat16() or not op._torch_multiplies_bfloat16()
    )
    served.clear()
    linear(x.double(), weight.double(), bias.double())
    with autocast(), contextlib.suppress(RuntimeError):  # torch leaves float64 alone
        linear(x.double(), weight, bias)
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight, bias).dtype == torch.float16
    with distilbert_fast.backend("torch"):
        linear(x, weight, bias)
        linear(*low)
    assert served == []


def test_compiled_autocast_is_torchs():
    x, weight, bias = case(4, 8, 6)
    with autocast():
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)(x, weight, bias)
        assert torch.equal(compiled, F.linear(x, weight, bias))


def test_opcheck():
    x, weight, bias = case(5, 6, 7)
    torch.library.opcheck(torch.ops.distilbert_fast.linear_product.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.distilbert_fast.linear_product.default, (x.t(), weight[:, :5].clone(), None))
    torch.library.opcheck(torch.ops.distilbert_fast.linear_product.default, (x, weight, bias, torch.bfloat16))


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3, 5), None, r"linear: weight must be of shape \[F, 4\], got \[3, 5\]"),
        (torch.zeros(3), None, r"linear: weight must be of shape \[F, 4\], got \[3\]"),
        (torch.zeros(3, 4), torch.zeros(4), r"linear: bias must be of shape \[3\], got \[4\]"),
    ],
)
def test_refuses(weight, bias, message, place):
    with pytest.raises(ValueError, match=f"^{message}$"):
        linear(torch.zeros(2, 4), weight, bias)


def test_refuses_another_dtype(place):
    with pytest.raises(TypeError, match=r"^linear: weight must be float32, got bfloat16$"):
        linear(torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16))


NATIVE = dict(
    a=64, a_dtype=0, a_row=4, a_step=1, b=64, b_dtype=0, b_row=4, b_step=1, bias=0, rows=2, columns=3, k=4, out=64,
    out_dtype=0, add=False, threads=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", -1, "rows, columns and k must be 0 or more, got -1, 3 and 4"),
        ("k", 1 << 40, f"rows, columns and k must fit in 31 bits, got 2, 3 and {1 << 40}"),
        ("a_step", 2, "a must have a stride of 1, got 4 and 2"),
        ("a_dtype", 2, r"dtype must be 0 \(float32\) or 1 \(bfloat16\), got 2"),
        ("b_row", -4, "b must have a stride of 1, got -4 and 1"),
        ("a", 0, "a and b must point to memory, got null"),
        ("out", 0, "out must point to memory, got null"),
    ],
)
def test_the_native_entry_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"^linear: {message}$"):
        backends.cpu().linear_product(*(NATIVE | {name: value}).values())


@pytest.mark.parametrize("name", ["a_dtype", "b_dtype", "out_dtype"])
def test_the_native_entry_refuses_bfloat16_where_the_tier_has_none(name, tier):
    if backends.cpu().multiplies_bfloat16():
        pytest.skip("the tier has it")
    with pytest.raises(ValueError, match=f"^linear: the tier in use must multiply bfloat16, got {tier}$"):
        backends.cpu().linear_product(*(NATIVE | {name: 1}).values())


def test_torch_sums_into_float32_on_a_gpu_as_we_call_it():
    """Nothing else has these; so a CPU refuses by their names."""
    out, a, b = torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"'aten::addmm\.dtype_out'"):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    with pytest.raises(NotImplementedError, match=r"'aten::mm\.dtype_out'"):
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 900), (torch.bfloat16, 900), (torch.bfloat16, 4100), (torch.bfloat16, 9000)]
)
def test_into_memory(add, dtype, k, tier):
    """As linear_kl_div does, chunk by chunk; without ``add`` what stood there, NaN even, is gone."""
    a, b, bias = (x.to(dtype) for x in case(13, k, 37))
    before = torch.full((13, 37), 3.0 if add else float("nan"), dtype=dtype)
    start = before.double() if add else 0.0
    for given in (None, bias):
        exact = start + F.linear(a.double(), b.double(), None if given is None else given.double())
        torchs = F.linear(a, b, given) + (before if add else 0.0)
        assert_twice_rule(op.product_into(before.clone(), a, b, given, add), torchs, exact)


@pytest.mark.parametrize("add", [False, True])
def test_bfloat16_into_float32(add, tier):
    """By ours or by torch's, where torch has no such product."""
    a, b, bias = case(13, 900, 37)
    before = torch.full((13, 37), 3.0 if add else float("nan"))
    start = before.double() if add else 0.0
    for x, y in ((a.bfloat16(), b.bfloat16()), (a.bfloat16(), b), (a, b.bfloat16())):
        exact = start + F.linear(x.double(), y.double(), bias.double())
        torchs = F.linear(x.bfloat16(), y.bfloat16(), bias.bfloat16()).float() + (before if add else 0.0)
        assert_twice_rule(op.product_into(before.clone(), x, y, bias, add), torchs, exact)
