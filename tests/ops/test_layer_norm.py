"""layer_norm and layer_norm_quantize: error, gradients, edge cases, the doors they are reached through, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.layer_norm import layer_norm, layer_norm_quantize, layer_norm_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

TRACED = {
    "layer_norm": Traced(
        lambda x, w, b, r: layer_norm(x, w, b, r),
        lambda n: [torch.randn(n, 8), *torch.randn(2, 8), torch.randn(n, 8)],
    ),
    "layer_norm_quantize": Traced(
        lambda x, w, b: layer_norm_quantize(x, w, b, out_scale=0.1)[:2],
        lambda n: [torch.randn(n, 8), *torch.randn(2, 8)],
        gradient=False,
    ),
}

pytestmark = pytest.mark.usefixtures("place")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(0, 5), (5, 0), (0, 0), (1, 3), (3, 7), (33, 129), (17, 768), (2, 30522)]


def arguments(n: int, c: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """x, weight, bias, residual."""
    weight = 1 + logits(1, c, torch.float64, seed + 1, spread=0.3)[0]
    bias = logits(1, c, torch.float64, seed + 2, spread=0.3)[0]
    return [logits(n, c, dtype, seed), weight.to(dtype), bias.to(dtype), logits(n, c, dtype, seed + 3)]


def torchs(x, weight, bias, residual=None, eps=1e-12):
    h = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(h, h.shape[1:], weight, bias, eps)


def results(op, tensors: list[torch.Tensor | None], dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of all of ``tensors``."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = op(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(tensors: list[torch.Tensor | None], dy: torch.Tensor) -> None:
    exact = results(layer_norm_reference, [t if t is None else t.double() for t in tensors], dy.double())
    same = results(torchs, tensors, dy)
    for ours, torch_, want in zip(results(layer_norm, tensors, dy), same, exact, strict=True):
        assert ours.dtype == torch_.dtype
        assert_twice_rule(ours, torch_, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(shape, dtype):
    x, weight, bias, residual = arguments(*shape, dtype)
    dy = logits(*shape, dtype, seed=9)
    check([x, weight, bias, residual], dy)
    check([x, weight, bias, None], dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_inputs_and_of_the_upstream_gradient(layout, dtype):
    x, weight, bias, residual = arguments(19, 37, dtype)
    dy = logits(19, 37, dtype, seed=9)
    want = results(layer_norm, [x, weight, bias, residual], dy)
    wide = lay_out(torch.stack([weight, bias]), layout)
    given = [lay_out(x, layout), wide[0], wide[1], lay_out(residual, layout)]
    before = [tensor.clone() for tensor in given]
    upstream = lay_out(dy, layout)
    for _ in range(2):
        found = results(layer_norm, given, upstream)
        assert found[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert torch.equal(upstream, dy)


def test_upstream_gradient_of_stride_zero():
    tensors = [tensor.requires_grad_() for tensor in arguments(5, 7, torch.float64)]
    layer_norm(*tensors).sum().backward()
    found = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    layer_norm_reference(*tensors).sum().backward()
    for ours, want in zip(found, tensors, strict=True):
        torch.testing.assert_close(ours, want.grad)


def test_the_two_gradients_of_the_sum_share_no_memory():
    x, weight, bias, residual = (tensor.requires_grad_() for tensor in arguments(5, 7, torch.float32))
    y = layer_norm(x, weight, bias, residual)
    dy = torch.randn(5, 7)
    y.backward(dy, retain_graph=True)
    once = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, once)
    y.backward(dy)
    assert torch.equal(residual.grad, 2 * once) and torch.equal(x.grad, once)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes_promote_as_the_sum_does(x, residual):
    tensors = arguments(9, 31, torch.float32)
    tensors[0], tensors[3] = tensors[0].to(x), tensors[3].to(residual)
    y, *gradients = results(layer_norm, tensors, torch.randn(9, 31))
    assert y.dtype == (tensors[0] + tensors[3]).dtype
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]
    exact = layer_norm_reference(*(tensor.double() for tensor in tensors))
    torch.testing.assert_close(y, exact.to(y.dtype), rtol=2 * torch.finfo(y.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_variance_survives_a_large_mean(offset):
    x, weight, bias, _ = arguments(8, 768, torch.float64)
    x = (x + offset).float()
    check([x, weight.float(), bias.float(), None], torch.ones(8, 768))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 2])
def test_one_or_two_columns_normalise_to_constants(c, dtype):
    x, weight, bias, residual = arguments(6, c, dtype)
    h = x.double() + residual.double()
    sign = torch.zeros(6, 1) if c == 1 else torch.sign(h - h.flip(1))
    want = (sign * weight + bias).to(dtype)
    found = layer_norm(x, weight, bias, residual)
    torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_constant_row_gives_the_bias():
    x, weight, bias, _ = arguments(3, 64, torch.float32)
    x[:] = torch.tensor([0.0, 2.5, -1024.0])[:, None]
    assert torch.equal(layer_norm(x, weight, bias), bias.expand(3, 64))


def test_a_non_finite_row_leaves_the_others_exact():
    x, weight, bias, residual = arguments(6, 33, torch.float32)
    clean = layer_norm_quantize(x, weight, bias, residual)
    x[1, 3], residual[3, 0], x[4, 32] = float("nan"), float("inf"), float("-inf")
    y, y_q, y_scale = layer_norm_quantize(x, weight, bias, residual)
    bad, good = [1, 3, 4], [0, 2, 5]
    assert y[bad].isnan().all() and y_scale[bad].isnan().all() and not y_q[bad].any()
    for found, want in zip((y, y_q, y_scale), clean, strict=True):
        assert torch.equal(found[good], want[good])


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual):
    tensors = [tensor.requires_grad_() for tensor in arguments(4, 5, torch.float64)]
    assert torch.autograd.gradcheck(layer_norm, tensors if with_residual else tensors[:3])


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted):
    tensors = arguments(4, 5, torch.float64)
    tensors[wanted].requires_grad_()
    layer_norm(*tensors).square().sum().backward()
    ours, tensors[wanted].grad = tensors[wanted].grad, None
    layer_norm_reference(*tensors).square().sum().backward()
    torch.testing.assert_close(ours, tensors[wanted].grad)
    assert all(tensor.grad is None for i, tensor in enumerate(tensors) if i != wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_is_that_of_the_unrounded_result(shape, dtype):
    x, weight, bias, residual = arguments(*shape, dtype)
    y, y_q, y_scale = layer_norm_quantize(x, weight, bias, residual)
    assert torch.equal(y, layer_norm(x, weight, bias, residual)) and y.dtype == dtype
    with distilbert_fast.backend(backends.select("layer_norm", x.device, dtype)):  # the one that made y
        unrounded = layer_norm(x.float(), weight.float(), bias.float(), residual.float())
    if dtype != torch.float64:
        want_q, want_scale = quantize(unrounded)
        assert torch.equal(y_q, want_q) and torch.equal(y_scale, want_scale)
        for scale in (0.03125, torch.tensor(0.021), torch.rand(shape[0])):
            same, found_q, found_scale = layer_norm_quantize(x, weight, bias, residual, out_scale=scale)
            want_q, want_scale = quantize(unrounded, scale)
            assert torch.equal(same, y)
            assert torch.equal(found_q, want_q) and torch.equal(found_scale, want_scale)
    else:
        assert torch.equal(y_q, quantize(y)[0])


def test_quantize_carries_no_gradient():
    tensors = [tensor.requires_grad_() for tensor in arguments(4, 5, torch.float32)]
    assert not any(result.requires_grad for result in layer_norm_quantize(*tensors))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9),
    c=st.integers(3, 70),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(DTYPES),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(n, c, layouts, dtype, with_residual, seed):
    x, weight, bias, residual = arguments(n, c, dtype, seed)
    given = [lay_out(x, layouts[0]), weight, bias, lay_out(residual, layouts[1]) if with_residual else None]
    check(given, lay_out(logits(n, c, dtype, seed + 4), layouts[2]))


def test_same_bits_on_any_number_of_threads(place):
    tensors, dy = arguments(301, 768, torch.float32), logits(301, 768, seed=9)
    before = torch.get_num_threads()

    def everything():
        gradients = [] if place == "torch" else results(layer_norm, tensors, dy)  # torch's own depend on it
        return [*layer_norm_quantize(*tensors), *gradients]

    try:
        want = everything()
        for threads in (1, 2, 3, 1, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    finally:
        torch.set_num_threads(before)


def native(x, weight, bias, residual, y, y_low, y_q, flip, scale_out, mean, rstd, scale_in=None):
    """The native entry, with every output that it has; null where None is given."""

    def rows(tensor):
        return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))

    def code(tensor):
        return 0 if tensor is None else [torch.float32, torch.bfloat16].index(tensor.dtype)

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    n, c = x.shape
    codes = *rows(y_q), flip, address(scale_out), address(scale_in), 1
    outputs = *rows(y), code(y), *rows(y_low), address(mean), address(rstd), codes
    backends.cpu().layer_norm_forward(
        *(*rows(x), code(x), *rows(residual), code(residual), n),
        (c, weight.data_ptr(), bias.data_ptr(), 1e-12, *outputs),
        1,
    )


def framed(n: int, c: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [n, c] of 77s and the larger one of 77s whose middle it is."""
    frame = torch.full((n + 2, c + 6), 77, dtype=dtype)
    return frame[1:-1, 3:-3], frame


@pytest.mark.parametrize("c", [1, 5, 16, 37, 768, 4096, 4099, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_native_output_is_whole_and_nothing_beside_it_is_touched(c, dtype, native_tier):
    n = 3
    x, weight, bias, residual = arguments(n, c, torch.float32)
    want, want_q, want_scale = layer_norm_quantize(x, weight, bias, residual)
    double = (x + residual).double()
    outputs = [framed(n, c, wanted) for wanted in (dtype, torch.bfloat16, torch.uint8)]
    outputs += [framed(1, n, torch.float32) for _ in range(3)]
    y, y_low, y_q, scale, mean, rstd = (inner for inner, _ in outputs)
    native(x, weight, bias, residual, y, y_low, y_q, 0x80, scale, mean, rstd)
    assert torch.equal(y, want.to(dtype)) and torch.equal(y_low, want.bfloat16())
    assert torch.equal(y_q.int() - 128, want_q.int()) and torch.equal(scale[0], want_scale)
    torch.testing.assert_close(mean[0].double(), double.mean(1), rtol=1e-6, atol=1e-6)
    if c > 1:
        torch.testing.assert_close(rstd[0].double(), double.var(1, correction=0).rsqrt(), rtol=1e-5, atol=0)
    for inner, frame in outputs:
        inner.fill_(77)
        assert (frame == 77).all()

    native(x, weight, bias, residual, None, None, y_q, 0, None, None, None, scale_in=want_scale)
    assert torch.equal(y_q.view(torch.int8), want_q)
    native(x, weight, bias, residual, None, y_low, None, 0, None, None, None)
    assert torch.equal(y_low, want.bfloat16())


@pytest.mark.parametrize("c", [5, 768, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("over", ["x", "residual"])
def test_native_y_may_be_the_memory_of_an_input(c, dtype, over, native_tier):
    x, weight, bias, residual = arguments(3, c, dtype)
    weight, bias = weight.float(), bias.float()
    y, y_q, y_scale = layer_norm_quantize(x, weight, bias, residual)
    found_q, found_scale = torch.empty_like(y_q), torch.empty_like(y_scale)
    out = x if over == "x" else residual
    native(x, weight, bias, residual, out, None, found_q, 0, found_scale, None, None)
    assert torch.equal(out, y) and torch.equal(found_q, y_q) and torch.equal(found_scale, y_scale)


@pytest.mark.parametrize("c", [1, 5, 37, 768, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_gradients_fill_their_memory_and_no_more(c, dtype, native_tier):
    n, edge = 67, 16  # rows of two chunks
    x, weight, bias, residual = (tensor.to(dtype) for tensor in arguments(n, c, dtype))
    dy = logits(n, c, dtype, seed=9)
    want = results(layer_norm, [x, weight.float(), bias.float(), residual], dy)
    _, mean, rstd = torch.ops.distilbert_fast.layer_norm_forward(x, weight, bias, residual, None, 1e-12, "statistics")
    weight, code = weight.float(), [torch.float32, torch.bfloat16].index(dtype)
    frames = [torch.full((size + 2 * edge,), 77, dtype=kind) for size, kind in ((n * c, dtype), (c, torch.float32))]
    frames.append(frames[1].clone())
    dh, dweight, dbias = (frame[edge:-edge] for frame in frames)
    pointers = weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dh.data_ptr(), code
    backends.cpu().layer_norm_backward(
        *(x.data_ptr(), c, code, residual.data_ptr(), c, code, n),
        (c, dy.data_ptr(), c, code, *pointers),
        *(dweight.data_ptr(), dbias.data_ptr(), 1),
    )
    for found, expected in zip((dh.view(n, c), dweight, dbias), want[1:4], strict=True):
        assert torch.equal(found, expected)
    for frame in frames:
        frame[edge:-edge] = 77
        assert (frame == 77).all()


def test_native_bad_gradients(native_tier):
    x = 64, 4, 0, 0, 0, 0, 2
    good = dict(columns=4, dy=64, dy_stride=4, dy_dtype=0, weight=64, mean=64, rstd=64, dh=64, dh_dtype=0)
    for changed, pointers, message in (
        ({"columns": -1}, (64, 64), "columns must be 0 or more, got -1"),
        ({"dy_dtype": 3}, (64, 64), "dtype must be 0 (float32) or 1 (bfloat16), got 3"),
        ({"dy": 0}, (64, 64), "dy must point to memory, got null"),
        ({"mean": 0}, (64, 64), "mean must point to memory, got null"),
        ({"dh": 0}, (64, 64), "dh must point to memory, got null"),
        ({}, (0, 64), "dweight must point to memory, got null"),
        ({}, (64, 0), "dbias must point to memory, got null"),
    ):
        with pytest.raises(ValueError) as raised:
            backends.cpu().layer_norm_backward(*x, tuple({**good, **changed}.values()), *pointers, 1)
        assert str(raised.value) == f"layer_norm: {message}"


def test_native_bad_input(native_tier):
    x = dict(x=64, x_stride=4, x_dtype=0, residual=0, residual_stride=0, residual_dtype=0, rows=2)
    out = dict(columns=4, weight=64, bias=64, eps=1e-12)
    rest = 0, 4, 0, 0, 0, 0, 0, (0, 0, 0, 0, 0, 0)
    for changed, message in (
        ({"rows": -1}, "rows must be 0 or more, got -1"),
        ({"columns": -1}, "columns must be 0 or more, got -1"),
        ({"columns": 2**61}, f"rows · columns must fit in 60 bits, got 2 · {2**61}"),
        ({"x_dtype": 2}, "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        ({"eps": 0.0}, "eps must be finite and above 0, got 0.000000"),
        ({"x": 0}, "x must point to memory, got null"),
        ({"weight": 0}, "weight must point to memory, got null"),
        ({"bias": 0}, "bias must point to memory, got null"),
    ):
        first, second = ({name: changed.get(name, good[name]) for name in good} for good in (x, out))
        with pytest.raises(ValueError) as raised:
            backends.cpu().layer_norm_forward(*first.values(), (*second.values(), *rest), 1)
        assert str(raised.value) == f"layer_norm: {message}"


def test_autocast_changes_nothing():
    tensors = arguments(5, 33, torch.float32)
    dy = torch.randn(5, 33)
    want = results(layer_norm, tensors, dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer_norm, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@on_any_tier
def test_registered_ops():
    ops = torch.ops.distilbert_fast
    x, weight, bias, residual = arguments(5, 7, torch.bfloat16)
    x = lay_out(x, "transposed")
    mean, rstd, dy = torch.randn(5), torch.rand(5), lay_out(residual, "strided_columns")
    for added, keep, scale in ((None, "statistics", None), (residual.float(), "nothing", torch.tensor(0.1))):
        torch.library.opcheck(ops.layer_norm_forward.default, (x, weight, bias, added, None, 1e-12, keep))
        torch.library.opcheck(ops.layer_norm_forward.default, (x, weight, bias, added, scale, 1e-12, "codes"))
        torch.library.opcheck(ops.layer_norm_backward.default, (dy, x, weight, added, mean, rstd))


@on_any_tier
def test_compiles_whole_with_gradients():
    compiled = torch.compile(layer_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5):
        tensors, dy = arguments(n, 33, torch.float32), logits(n, 33)
        for found, want in zip(results(compiled, tensors, dy), results(layer_norm, tensors, dy), strict=True):
            assert torch.equal(found, want)


@on_any_tier
def test_compiles_whole_and_once_for_all_lengths():
    counter = CompileCounter()
    compiled = torch.compile(layer_norm_quantize, fullgraph=True, dynamic=True, backend=counter)
    for n in range(2, 12):
        tensors = arguments(n, 33, torch.float32)
        for found, want in zip(compiled(*tensors), layer_norm_quantize(*tensors), strict=True):
            assert torch.equal(found, want)
    assert counter.frame_count == 1


def test_fake_and_meta():
    with FakeTensorMode():
        x, weight = torch.empty(3, 4, dtype=torch.bfloat16, requires_grad=True), torch.empty(4)
        y = layer_norm(x, weight, weight, x.float())
        assert y.shape == (3, 4) and y.dtype == torch.float32
        y.sum().backward()
        assert x.grad.dtype == torch.bfloat16
        y, y_q, y_scale = layer_norm_quantize(x, weight, weight)
        assert y.dtype == torch.bfloat16 and y_q.dtype == torch.int8 and y_scale.shape == (3,)
    x, weight = torch.empty(3, 4, device="meta"), torch.empty(4, device="meta")
    assert layer_norm(x, weight, weight).device.type == "meta"


ONES = torch.ones(4)
ROWS = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, "x must be of shape [N, C], got [2, 3, 4]"),
        ({"x": ROWS.int()}, TypeError, "x must be float32 or bfloat16 or float16 or float64, got int32"),
        ({"weight": torch.ones(3)}, ValueError, "weight must be of shape [4], got [3]"),
        ({"weight": ONES.to("meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"bias": ROWS}, ValueError, "bias must be of shape [4], got [2, 4]"),
        ({"residual": torch.ones(1, 4)}, ValueError, "residual must be of shape [2, 4], got [1, 4]"),
        ({"eps": 0.0}, ValueError, "eps must be finite and above 0, got 0.0"),
        ({"eps": float("inf")}, ValueError, "eps must be finite and above 0, got inf"),
        ({"eps": "1e-12"}, TypeError, "eps must be a number, got str"),
    ],
)
@pytest.mark.parametrize("op", [layer_norm, layer_norm_quantize])
def test_bad_input(op, changed, error, message):
    with pytest.raises(error) as raised:
        op(**{"x": ROWS, "weight": ONES, "bias": ONES, **changed})
    assert str(raised.value) == f"{op.__name__}: {message}"


def test_bad_out_scale():
    with pytest.raises(ValueError) as raised:
        layer_norm_quantize(ROWS, ONES, ONES, out_scale=ONES)
    assert str(raised.value) == "layer_norm_quantize: out_scale must be of shape [] or [2], got [4]"


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("columns", [1, 2, 16])
def test_no_rounding_is_left_where_the_gradient_is_zero(columns, offset, native_tier):
    """Rows of one column or of constants have rstd = 1 / √ε = 10⁶."""
    x = (torch.randn(64, 1).expand(64, columns) + offset).contiguous().requires_grad_()
    dy = torch.randn(64, 1).expand(64, columns)
    layer_norm(x, torch.full((columns,), 0.7), torch.zeros(columns)).backward(dy)
    assert x.grad.eq(0).all()
