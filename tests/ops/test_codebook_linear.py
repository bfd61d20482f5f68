"""codebook_linear: error, gradients, autocast, codes at the edges, the doors it is reached through, its messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

from distilbert_fast import backends
from distilbert_fast.ops.codebook_linear import (
    codebook_linear,
    codebook_linear_reference,
    pack_codes,
    packed_size,
    unpack_codes,
)
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

TRACED = {
    "codebook_linear": Traced(
        lambda x, c, k, b: codebook_linear(x, c, k, b),
        lambda n: [torch.randn(n, 8), torch.randint(16, (6, 8), dtype=torch.uint8), torch.randn(16), torch.randn(6)],
    )
}

pytestmark = pytest.mark.usefixtures("place")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arguments(n: int, c: int, f: int, k: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """x, codes, codebook, bias; the last value of the codebook is used."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, k, (f, c), generator=generator, dtype=torch.uint8)
    codes.view(-1)[:1] = k - 1
    codebook, bias = (logits(1, size, dtype, seed + i, spread=0.05)[0] for i, size in ((1, k), (2, f)))
    return [logits(n, c, dtype, seed + 3, spread=1.0), codes, codebook, bias]


def results(op, x, codes, codebook, bias, dy, bits=8, group_size=None) -> list[torch.Tensor]:
    """y, dx, dcodebook, and dbias if there is a bias."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, codebook, bias)]
    y = op(leaves[0], codes, *leaves[1:], bits, group_size)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(x, codes, codebook, bias, dy, bits=8, group_size=None) -> None:
    doubles = [tensor if tensor is None else tensor.double() for tensor in (x, codebook, bias)]
    exact = results(codebook_linear_reference, doubles[0], codes, *doubles[1:], dy, bits, group_size)
    torchs = results(codebook_linear_reference, x, codes, codebook, bias, dy, bits, group_size)
    ours = results(codebook_linear, x, codes, codebook, bias, dy, bits, group_size)
    for found, torch_, want in zip(ours, torchs, exact, strict=True):
        assert found.dtype == torch_.dtype and found.shape == want.shape
        assert_twice_rule(found, torch_, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "c", "f", "k"),
    [
        *[(0, 5, 3, 4), (5, 0, 3, 4), (5, 3, 0, 4), (1, 1, 1, 1), (3, 7, 5, 2), (33, 129, 65, 256), (9, 768, 40, 16)],
        *[(13, 300, 32, 8), (130, 31, 33, 255)],
    ],
)
def test_error_is_at_most_twice_torchs(n, c, f, k, dtype):
    x, codes, codebook, bias = arguments(n, c, f, k, dtype)
    dy = logits(n, f, dtype, seed=9, spread=1.0)
    check(x, codes, codebook, bias, dy)
    check(x, codes, codebook, None, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(("n", "c", "f", "group"), [(5, 7, 5, 1), (33, 129, 65, 16), (70, 30, 37, 5), (9, 33, 8, 99)])
def test_groups_of_rows_and_packed_codes(n, c, f, group, bits, dtype):
    k, groups = 1 << bits, -(-f // group)
    x, codes, _, bias = arguments(n, c, f, k, dtype)
    codebook = logits(groups, k, dtype, seed=4, spread=0.05)
    check(x, pack_codes(codes, bits), codebook, bias, logits(n, f, dtype, seed=9, spread=1.0), bits, group)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 4, 5, 7, 8, 64, 129])
def test_packed_codes_are_what_they_were(columns, bits):
    codes = torch.randint(0, 1 << bits, (6, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (6, packed_size(columns, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, columns, bits), codes)
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << i * bits for i, code in enumerate(row))
        assert bytes(line) == number.to_bytes(packed_size(columns, bits), "little")


def test_packed_codes_outside_their_codebook():
    codes = pack_codes(CODES, 4)
    for book, end in ((BOOK[:3], 3), (BOOK[:1], 1)):
        with pytest.raises(ValueError) as raised:
            codebook_linear(X, codes, book, None, 4)
        assert str(raised.value) == f"codebook_linear: codes must be in [0, {end}), the values of codebook, got 3"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_inputs_and_of_the_upstream_gradient(layout):
    x, codes, codebook, bias = arguments(19, 37, 11, 200, torch.float32)
    dy = logits(19, 11, seed=9)
    want = results(codebook_linear, x, codes, codebook, bias, dy)
    vectors = [lay_out(torch.stack([vector, vector]), layout)[0] for vector in (codebook, bias)]
    given = [lay_out(x, layout), lay_out(codes, layout), *vectors, lay_out(dy, layout)]
    first = results(codebook_linear, *given)
    for _ in range(3):
        again = results(codebook_linear, *given)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert first[0].is_contiguous()
    for found, expected in zip(first, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(given, (x, codes, codebook, bias, dy), strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9),
    c=st.integers(0, 50),
    f=st.integers(0, 20),
    k=st.integers(1, 256),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(n, c, f, k, layouts, dtype, with_bias, seed):
    x, codes, codebook, bias = arguments(n, c, f, k, dtype, seed)
    dy = lay_out(logits(n, f, dtype, seed + 4, spread=1.0), layouts[2])
    check(lay_out(x, layouts[0]), lay_out(codes, layouts[1]), codebook, bias if with_bias else None, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_at_every_place(dtype):
    """Columns of the identity: y is the table itself, whatever lies around the codes."""
    codes = lay_out(torch.arange(256 * 37).view(256, 37).remainder(251).to(torch.uint8), "strided_rows")
    codebook = logits(1, 256, dtype, seed=1)[0]
    y = codebook_linear(torch.eye(37, dtype=dtype), codes, codebook)
    assert torch.equal(y, codebook[codes.long()].t())


@pytest.mark.parametrize(("n", "c", "f"), [(3, 40, 200), (200, 30, 5), (150, 512, 70)])
def test_same_bits_on_any_number_of_threads(n, c, f, native_tier):
    call = arguments(n, c, f, 200, torch.float32)
    before, results_ = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results_.append(codebook_linear(*call))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results_[0]) for y in results_)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_leaves_the_others_exact(bad):
    x, *others = arguments(9, 70, 33, 60, torch.float32)
    clean = codebook_linear(x, *others)
    x[4, 69] = bad
    y = codebook_linear(x, *others)
    assert not y[4].isfinite().any()
    assert torch.equal(y[torch.arange(9) != 4], clean[torch.arange(9) != 4])


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias):
    x, codes, codebook, bias = arguments(4, 5, 3, 4, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in ((x, codebook, bias) if with_bias else (x, codebook))]
    assert torch.autograd.gradcheck(lambda x, *rest: codebook_linear(x, codes, *rest), leaves)


@pytest.mark.parametrize("wanted", [0, 2, 3])
def test_each_gradient_alone(wanted):
    tensors = arguments(4, 5, 3, 4, torch.float64)
    tensors[wanted].requires_grad_()
    codebook_linear(*tensors).square().sum().backward()
    ours, tensors[wanted].grad = tensors[wanted].grad, None
    codebook_linear_reference(*tensors).square().sum().backward()
    torch.testing.assert_close(ours, tensors[wanted].grad)
    assert all(tensor.grad is None for i, tensor in enumerate(tensors) if i != wanted)


def test_a_value_that_no_code_names_has_gradient_zero():
    x, codes, codebook, bias = arguments(4, 5, 3, 7, torch.float32)
    codes[codes == 2] = 0
    gradient = results(codebook_linear, x, codes, codebook, bias, torch.ones(4, 3))[2]
    assert gradient[2] == 0 and gradient.count_nonzero() == 6


def test_a_large_layer_sums_its_codebook_gradient_accurately_and_the_same_every_run():
    x, codes, codebook, bias = arguments(16, 1024, 512, 2, torch.float32)
    dy = logits(16, 512, seed=9, spread=1.0) + 1
    x = x + 1  # half a million terms of one sign for each of the two values
    check(x, codes, codebook, bias, dy)
    runs = [results(codebook_linear, x, codes, codebook, bias, dy)[2] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_autocast_as_torchs_linear():
    x, codes, codebook, bias = arguments(5, 33, 9, 16, torch.float32)
    dy = torch.randn(5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = results(codebook_linear, x, codes, codebook, bias, dy)
        want, *wanted = results(codebook_linear_reference, x, codes, codebook, bias, dy)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.1)


@on_any_tier
def test_registered_ops():
    ops = torch.ops.distilbert_fast
    x, codes, codebook, bias = arguments(5, 7, 3, 9, torch.bfloat16)
    x, codes, dy = lay_out(x, "transposed"), lay_out(codes, "strided_rows"), logits(5, 3, torch.bfloat16)
    for added, wanted in ((None, [True, True, False]), (bias, [False, True, True])):
        torch.library.opcheck(ops.codebook_linear_forward.default, (x, codes, codebook, added))
        torch.library.opcheck(ops.codebook_linear_backward.default, (dy, x, codes, codebook, wanted))


@on_any_tier
def test_compiles_whole_with_gradients():
    compiled = torch.compile(codebook_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5):
        tensors, dy = arguments(n, 33, 9, 16, torch.float32), logits(n, 9)
        for found, want in zip(results(compiled, *tensors, dy), results(codebook_linear, *tensors, dy), strict=True):
            assert torch.equal(found, want)
    with pytest.raises(
        ValueError, match="codebook_linear: codes must be in \\[0, 15\\), the values of codebook, got 15"
    ):
        compiled(tensors[0], tensors[1], tensors[2][:15])


@on_any_tier
def test_compiles_whole_and_once_for_all_lengths():
    counter = CompileCounter()
    compiled = torch.compile(codebook_linear, fullgraph=True, dynamic=True, backend=counter)
    x, *rest = arguments(12, 33, 65, 50, torch.float32)
    for n in range(2, 12):
        assert torch.equal(compiled(x[:n], *rest), codebook_linear(x[:n], *rest))
    assert counter.frame_count == 1


def test_fake_and_meta():
    with FakeTensorMode():
        x, codebook = torch.empty(3, 4, dtype=torch.float16, requires_grad=True), torch.empty(7, dtype=torch.float16)
        codes = torch.empty(5, 4, dtype=torch.uint8)
        y = codebook_linear(x, codes, codebook)
        assert y.shape == (3, 5) and y.dtype == torch.float16
        y.sum().backward()
        assert x.grad.shape == (3, 4)
    codes = torch.empty(5, 4, dtype=torch.uint8, device="meta")
    x = torch.empty(3, 4, device="meta")
    assert codebook_linear(x, codes, x[0]).device.type == "meta"


X = torch.ones(2, 4)
CODES = torch.tensor([[0, 1, 2, 3]] * 3, dtype=torch.uint8)
BOOK = torch.ones(4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x must be of shape [N, C], got [4]"),
        ({"x": X.int()}, TypeError, "x must be float32 or bfloat16 or float16 or float64, got int32"),
        ({"codes": CODES.int()}, TypeError, "codes must be uint8, got int32"),
        ({"codes": CODES[:, :3]}, ValueError, "codes must be of shape [F, 4], got [3, 3]"),
        ({"codes": CODES.to("meta")}, ValueError, "codes must be on cpu, got meta"),
        ({"codes": CODES + 252}, ValueError, "codes must be in [0, 4), the values of codebook, got 255"),
        ({"codebook": BOOK[:3]}, ValueError, "codes must be in [0, 3), the values of codebook, got 3"),
        ({"codebook": BOOK[:0]}, ValueError, "codes must be in [0, 0), the values of codebook, got 3"),
        ({"codebook": BOOK[None]}, ValueError, "codebook must be of shape [K], got [1, 4]"),
        ({"bits": 5}, ValueError, "bits must be one of 8, 6, 4, got 5"),
        ({"bits": 6}, ValueError, "codes must be of shape [F, 3], got [3, 4]"),
        ({"group_size": 2}, ValueError, "codebook must be of shape [2, K], got [4]"),
        ({"group_size": 0}, ValueError, "group_size must be an integer of 1 or more, got 0"),
        ({"group_size": 2, "codebook": BOOK[None]}, ValueError, "codebook must be of shape [2, K], got [1, 4]"),
        ({"codebook": BOOK.double()}, TypeError, "codebook must be float32, got float64"),
        ({"codebook": torch.ones(257)}, ValueError, "codebook must be of at most 256 values, got [257]"),
        ({"bias": BOOK}, ValueError, "bias must be of shape [3], got [4]"),
        ({"bias": 0.5}, TypeError, "bias must be a tensor, got float"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error) as raised:
        codebook_linear(**{"x": X, "codes": CODES, "codebook": BOOK, **changed})
    assert str(raised.value) == f"codebook_linear: {message}"


# The native entry ------------------------------------------------------------------------------------------------

Y = torch.full((2, 3), 7.0)
NATIVE = dict(x=X.data_ptr(), x_stride=4, dtype=0, codes=CODES.data_ptr(), codes_stride=4, bits=8)
NATIVE |= dict(
    codebook=BOOK.data_ptr(), values=4, group=3, bias=0, rows=2, columns=3, depth=4, y=Y.data_ptr(), threads=1
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "rows, columns and depth must be 0 or more, got -1, 3 and 4"),
        ({"columns": -1}, "rows, columns and depth must be 0 or more, got 2, -1 and 4"),
        ({"depth": -1}, "rows, columns and depth must be 0 or more, got 2, 3 and -1"),
        ({"depth": 2**31}, "rows, columns and depth must fit in 31 bits, got 2, 3 and 2147483648"),
        ({"rows": 2**62}, f"rows, columns and depth must fit in 31 bits, got {2**62}, 3 and 4"),
        ({"dtype": 2}, "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        ({"values": 257}, "codebook must be of at most 256 values, got 257"),
        ({"values": -1}, "codebook must be of at most 256 values, got -1"),
        ({"values": 3}, "codes must be in [0, 3), the values of codebook, got 3"),
        ({"bits": 5}, "bits must be 4, 6 or 8, got 5"),
        ({"group": 0}, "group must be 1 or more, got 0"),
        ({"values": 3, "rows": 0}, "codes must be in [0, 3), the values of codebook, got 3"),
        ({"x": 0}, "x must point to memory, got null"),
        ({"codes": 0}, "codes must point to memory, got null"),
        ({"codebook": 0}, "codebook must point to memory, got null"),
        ({"y": 0}, "y must point to memory, got null"),
    ],
)
def test_the_native_entry_refuses_before_it_touches_memory(changed, message, native_tier):
    with pytest.raises(ValueError) as raised:
        backends.cpu().codebook_linear(*(NATIVE | changed).values())
    assert str(raised.value) == f"codebook_linear: {message}"
    assert (Y == 7).all()


def test_the_native_entry_writes_its_rows_alone(native_tier):
    room = torch.full((4, 3), 7.0)
    backends.cpu().codebook_linear(*(NATIVE | {"y": room[1].data_ptr()}).values())
    assert (room[1:3] == 4).all() and (room[::3] == 7).all()
