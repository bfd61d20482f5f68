"""the bits of its contract, its edge cases, the doors it is reached through, its messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

from distilbert_fast import backends
from distilbert_fast.ops.quantize import quantize, quantize_reference
from distilbert_fast.testing import LAYOUTS, lay_out, logits

TRACED = {
    "quantize": Traced(lambda x: quantize(x), lambda n: [torch.randn(n, 8)], gradient=False),
    "quantize by a scale": Traced(
        lambda x, s: quantize(x, s), lambda n: [torch.randn(n, 8), torch.rand(n)], gradient=False
    ),
}

pytestmark = pytest.mark.usefixtures("place")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = np.float32(2.0**-126)


def contract(x: torch.Tensor, scale: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The docstring of quantize, sentence by sentence, in numpy's float32."""
    rows = x.double().numpy().astype(np.float32)
    with np.errstate(all="ignore"):
        if scale is None:
            largest = np.abs(rows).max(axis=1) if rows.shape[1] else np.zeros(len(rows), np.float32)
            scale = largest / np.float32(127)
            scale[scale < TINY] = 0
        scale = np.asarray(scale, np.float32)
        inverse = np.where(scale >= TINY, np.float32(1) / scale, np.float32(0)).astype(np.float32)
        product = rows * (inverse[:, None] if inverse.ndim else inverse)
        assert product.dtype == np.float32
        codes = np.rint(np.clip(product, -127, 127))
    return torch.from_numpy(np.nan_to_num(codes, nan=0.0).astype(np.int8)), torch.from_numpy(scale)


def assert_contract(x: torch.Tensor, scale: torch.Tensor | float | None = None) -> None:
    x_q, x_scale = quantize(x, scale)
    given = scale.numpy() if isinstance(scale, torch.Tensor) else scale
    want_q, want_scale = contract(x, given)
    assert x_q.dtype == torch.int8 and x_scale.dtype == torch.float32
    torch.testing.assert_close(x_scale, want_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x_q, want_q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 7), (33, 129), (17, 768), (2, 30522)], ids=str)
def test_every_backend_can_reproduce_these_bits(shape, dtype):
    x = logits(*shape, dtype)
    assert_contract(x)
    assert_contract(x, 0.03125)
    assert_contract(x, torch.tensor(0.021))
    assert_contract(x, torch.rand(shape[0]) * 0.1 + 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_times_scale_are_within_half_a_step(dtype):
    x = logits(64, 768, dtype)
    x_q, scale = quantize(x)
    step = scale.double()[:, None]
    assert ((x_q * step - x.double()).abs() <= step * (0.5 + 1e-5)).all()
    assert (x_q.abs().amax(dim=1) == 127).all()
    ideal, _ = quantize_reference(x.double())
    assert (x_q.int() - ideal.int()).abs().max() <= 1


def test_ties_go_to_even_and_codes_are_symmetric():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -1e9, -127.5, -128.0]])
    x_q, scale = quantize(x, 1.0)
    assert x_q.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127, 127, -127, -127, -127]]
    assert scale.shape == () and scale == 1


def test_zero_and_subnormal_rows():
    smallest = 2.0**-149
    x = torch.zeros(6, 4)
    x[1, 2] = -0.0
    x[2, 0] = smallest
    x[3, 1] = -126.9 * 2.0**-126  # its scale would just be subnormal
    x[4, 1] = 127 * 2.0**-126  # the smallest row with a scale
    x[5, 0] = torch.finfo(torch.float32).max
    x_q, scale = quantize(x)
    assert scale[:4].tolist() == [0, 0, 0, 0] and not x_q[:4].any()
    assert scale[4] == TINY and x_q[4].tolist() == [0, 127, 0, 0]
    assert scale[5].isfinite() and x_q[5].tolist() == [127, 0, 0, 0]
    assert_contract(x)
    assert_contract(x, scale)


def test_a_non_finite_row_is_non_finite_and_leaves_the_others_exact():
    x = logits(6, 33)
    clean_q, clean_scale = quantize(x)
    x[1, 3], x[3, 0], x[4, 32] = float("nan"), float("inf"), float("-inf")
    x_q, scale = quantize(x)
    bad, good = [1, 3, 4], [0, 2, 5]
    assert not scale[bad].isfinite().any() and not x_q[bad].any()
    assert not (x_q.float() * scale[:, None])[bad].isfinite().any()
    assert torch.equal(x_q[good], clean_q[good]) and torch.equal(scale[good], clean_scale[good])
    assert_contract(x)


def test_a_given_scale_saturates_infinities_and_zeroes_nan():
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 0.25]])
    assert quantize(x, 0.5)[0].tolist() == [[0, 127, -127, 0]]
    for odd in (0.0, -1.0, float("nan"), 2.0**-127, float("inf")):
        x_q, scale = quantize(x, torch.tensor(odd))
        assert not x_q.any()
        torch.testing.assert_close(scale, torch.tensor(odd), rtol=0, atol=0, equal_nan=True)


def test_a_found_scale_gives_the_same_codes_again():
    x = logits(40, 65)
    x[3], x[7, 1] = 0, float("nan")
    x_q, scale = quantize(x)
    again, same = quantize(x, scale)
    assert torch.equal(again, x_q) and same.data_ptr() == scale.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_gives_contiguous_codes_and_leaves_the_input_alone(layout, dtype):
    x = logits(19, 37, dtype)
    laid = lay_out(x, layout)
    before = laid.clone()
    x_q, scale = quantize(laid)
    assert x_q.is_contiguous() and torch.equal(laid, before)
    want_q, want_scale = quantize(x)
    assert torch.equal(x_q, want_q) and torch.equal(scale, want_scale)
    assert all(torch.equal(quantize(laid)[0], x_q) for _ in range(3))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9),
    c=st.integers(0, 70),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-150, 126),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_magnitude(n, c, layout, dtype, exponent, seed):
    x = (logits(n, c, torch.float64, seed) * 2.0**exponent).to(dtype)
    assert_contract(lay_out(x, layout))


def test_same_bits_on_any_number_of_threads():
    x, before = logits(301, 768), torch.get_num_threads()
    try:
        want = quantize(x)
        for threads in (1, 2, 3, 1, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(quantize(x), want, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("c", [1, 5, 16, 37, 768])
def test_native_codes_flipped_and_nothing_beside_them_is_touched(c, native_tier):
    x = logits(3, c)
    x[1, 0] = float("nan")
    want, scale = quantize(x)
    for scale_in in (0, scale.data_ptr()):
        frame, scales = torch.full((5, c + 6), 77, dtype=torch.uint8), torch.full((5,), 77.0)
        y_q = frame[1:-1, 3:-3]
        codes = y_q.data_ptr(), frame.stride(0), 0x80, scales[1:].data_ptr(), scale_in, 1
        backends.cpu().quantize(x.data_ptr(), c, 0, 3, c, codes, 1)
        assert torch.equal(y_q.int() - 128, want.int())
        torch.testing.assert_close(scales[1:4], scale, rtol=0, atol=0, equal_nan=True)
        y_q.fill_(77)
        assert (frame == 77).all() and scales[0] == scales[4] == 77


def test_native_bad_input(native_tier):
    good = dict(x=64, x_stride=4, x_dtype=0, rows=2, columns=4, codes=(64, 4, 0, 0, 0, 0), threads=1)
    for changed, message in (
        ({"rows": -1}, "rows must be 0 or more, got -1"),
        ({"columns": -1}, "columns must be 0 or more, got -1"),
        ({"x_dtype": 2}, "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        ({"x": 0}, "x must point to memory, got null"),
        ({"codes": (0, 4, 0, 0, 0, 0)}, "codes must point to memory, got null"),
    ):
        with pytest.raises(ValueError) as raised:
            backends.cpu().quantize(*{**good, **changed}.values())
        assert str(raised.value) == f"quantize: {message}"


def test_it_is_not_differentiable():
    x = logits(3, 4).requires_grad_()
    x_q, scale = quantize(x)
    assert not x_q.requires_grad and not scale.requires_grad
    x_q, scale = quantize(x, torch.rand(3, requires_grad=True))
    assert not x_q.requires_grad


@on_any_tier
def test_registered_op():
    x = lay_out(logits(5, 7, torch.bfloat16), "transposed")
    for scale in (None, torch.rand(5)):
        torch.library.opcheck(torch.ops.distilbert_fast.quantize_forward.default, (x, scale))


@on_any_tier
def test_compiles_whole_and_once_for_all_lengths():
    counter = CompileCounter()
    compiled = torch.compile(quantize, fullgraph=True, dynamic=True, backend=counter)
    for n in range(2, 12):
        x = logits(n, 33)
        assert torch.equal(compiled(x)[0], quantize(x)[0])
    assert counter.frame_count == 1
    compiled = torch.compile(quantize, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (None, 0.25, torch.tensor(0.25), torch.full((4,), 0.25)):
        x = logits(4, 33)
        for found, want in zip(compiled(x, scale), quantize(x, scale), strict=True):
            assert torch.equal(found, want)


def test_fake_and_meta():
    with FakeTensorMode():
        x_q, scale = quantize(torch.empty(3, 4, dtype=torch.bfloat16))
        assert x_q.shape == (3, 4) and x_q.dtype == torch.int8 and scale.shape == (3,)
        assert quantize(torch.empty(3, 4), 0.5)[1].shape == ()
    x_q, scale = quantize(torch.empty(3, 4, device="meta"))
    assert x_q.device.type == "meta" and scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0,), TypeError, "x must be a tensor, got float"),
        (
            (torch.ones(2, 3, dtype=torch.int32),),
            TypeError,
            "x must be float32 or bfloat16 or float16 or float64, got int32",
        ),
        ((torch.ones(3),), ValueError, "x must be of shape [N, C], got [3]"),
        ((torch.ones(2, 3), 0.0), ValueError, "scale must be finite and above 0, got 0.0"),
        ((torch.ones(2, 3), float("nan")), ValueError, "scale must be finite and above 0, got nan"),
        ((torch.ones(2, 3), 1e-40), ValueError, "scale must be from 1.18e-38 to 3.4e+38, got 1e-40"),
        ((torch.ones(2, 3), 1e39), ValueError, "scale must be from 1.18e-38 to 3.4e+38, got 1e+39"),
        ((torch.ones(2, 3), "1"), TypeError, "scale must be a number, got str"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, "scale must be of shape [] or [2], got [3]"),
        ((torch.ones(2, 3), torch.ones(2, 1)), ValueError, "scale must be of shape [] or [2], got [2, 1]"),
        ((torch.ones(2, 3), torch.ones(2).double()), TypeError, "scale must be float32, got float64"),
        ((torch.ones(2, 3), torch.ones(2, device="meta")), ValueError, "scale must be on cpu, got meta"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as raised:
        quantize(*arguments)
    assert str(raised.value) == f"quantize: {message}"
