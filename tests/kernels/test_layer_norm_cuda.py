"""The logic of csrc/cuda/layer_norm.cu without a GPU: compiled for the CPU by cuda_on_cpu/, behind the real bindings
and the real calls in ops/_layer_norm_backends.py. What a GPU does with it (speed, memory, rounding) is not seen here.
"""

from __future__ import annotations

import re

import pytest
import torch

from distilbert_fast import backends
from distilbert_fast.ops import _layer_norm_backends as op
from distilbert_fast.ops.layer_norm import layer_norm
from distilbert_fast.ops.quantize import quantize_reference
from distilbert_fast.testing import assert_twice_rule, lay_out, logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(cuda_on_cpu):
    return cuda_on_cpu


def arguments(n, c, dtype=torch.float32, parameters=torch.float32):
    """x, weight, bias, residual."""
    weight, bias = 1 + logits(1, c, seed=1, spread=0.3)[0], logits(1, c, seed=2, spread=0.3)[0]
    return logits(n, c, dtype), weight.to(parameters), bias.to(parameters), logits(n, c, dtype, seed=3)


def check(x, weight, bias, residual, eps=1e-12):
    """y, and the gradients that follow from the kept statistics."""
    dy = logits(*x.shape, x.dtype, seed=9)

    def results(forward, dtype=None):
        given = [x, weight, bias, residual, dy]
        if dtype:
            given = [None if tensor is None else tensor.to(dtype) for tensor in given]
        *tensors, upstream = given
        y, mean, rstd = forward(op.Call(*tensors, None, eps, "statistics"))
        return y, *op._backward_torch(op.Gradient(upstream, tensors[0], tensors[1], tensors[3], mean, rstd))

    ours, torchs, exact = (
        results(op._forward_cuda),
        results(op._forward_torch),
        results(op._forward_torch, torch.double),
    )
    for name, *three in zip(("y", "dh", "dweight", "dbias"), ours, torchs, exact, strict=True):
        assert three[0].dtype == three[1].dtype
        assert_twice_rule(*three, name)
    alone, *nothing = op._forward_cuda(op.Call(x, weight, bias, residual, None, eps, "nothing"))
    assert torch.equal(alone, ours[0]) and not any(kept.numel() for kept in nothing)


# Less than a vector; around a warp's vectors; DistilBERT's own; the last that a warp takes; a block's; several turns.
@pytest.mark.parametrize("c", [1, 3, 8, 255, 257, 384, 768, 1023, 1024, 1025, 5001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_torchs(dtype, c):
    x, weight, bias, residual = arguments(5, c, dtype, dtype)
    check(x, weight, bias, residual)
    check(x, weight, bias, None)


@pytest.mark.parametrize("parameters", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, residual_dtype, parameters):
    x, weight, bias, residual = arguments(3, 70, dtype, parameters)
    check(x, weight, bias, residual.to(residual_dtype))
    check(x, weight, bias.float(), None)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_variance_survives_a_large_mean(offset):
    x, weight, bias, _ = arguments(4, 768)
    check(x + offset, weight, bias, None)


@pytest.mark.parametrize("c", [64, 700, 1100])
def test_a_constant_row_gives_the_bias(c):
    x, weight, bias, _ = arguments(4, c)
    x[:] = torch.tensor([0.0, 2.5, -1024.0, 3e8])[:, None]
    y, _, rstd = op._forward_cuda(op.Call(x, weight, bias, None, None, 1e-12, "statistics"))
    assert torch.equal(y[:3], bias.expand(3, c)) and rstd.isfinite().all()


def test_more_rows_than_blocks_take_at_once(emulated):
    emulated.emulated_set_max_blocks(2)
    for c in (40, 1100):
        check(*arguments(11, c))


def quantized(tensors, out_scale=None):
    y, y_q, found = op._forward_cuda(op.Call(*tensors, out_scale, 1e-12, "codes"))
    alone = op._forward_cuda(op.Call(*tensors, None, 1e-12, "nothing"))[0]
    torch.testing.assert_close(y, alone, rtol=0, atol=0, equal_nan=True)
    return y, y_q, found


@pytest.mark.parametrize("c", [1, 37, 768, 1027, 2048])
def test_codes_and_scales_are_bit_for_bit_those_of_the_float32_result(c):
    tensors = arguments(7, c)
    y, y_q, found = quantized(tensors)
    want, scale = quantize_reference(y)
    assert torch.equal(y_q, want) and torch.equal(found, scale)
    for out_scale in (torch.tensor(0.02), torch.linspace(0.001, 0.1, 14)[::2]):
        _, y_q, found = quantized(tensors, out_scale)
        assert found.numel() == 0 and torch.equal(y_q, quantize_reference(y, out_scale)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [70, 1100])
def test_codes_are_of_the_result_before_it_is_rounded(dtype, c):
    """Half a code from the exact result, as no codes of a rounded one are."""
    tensors = arguments(5, c, dtype)
    exact = op._forward_torch(op.Call(*(tensor.double() for tensor in tensors), None, 1e-12, "nothing"))[0]
    _, y_q, scale = quantized(tensors)
    assert ((exact / scale[:, None] - y_q).abs() <= 0.5001).all()


def test_rows_without_codes():
    """All zero; below the smallest scale; not finite: scale 0, 0 and not finite, codes 0; the others are exact."""
    x, weight, bias, _ = arguments(5, 300)
    bias = torch.zeros_like(bias)
    clean = quantized((x, weight, bias, None))
    x[1], x[2, 7], x[4, 299] = 3.0, float("nan"), float("inf")
    y, y_q, scale = quantized((x, weight, bias, None))
    assert not y[1].any() and scale[1] == 0 and not y_q[[1, 2, 4]].any()
    assert y[[2, 4]].isnan().all() and not scale[[2, 4]].isfinite().any()
    for ours, want in zip((y, y_q, scale), clean, strict=True):
        assert torch.equal(ours[[0, 3]], want[[0, 3]])
    _, y_q, scale = quantized((x, weight * 1e-37, bias, None))
    assert scale[0] == 0 and not y_q.any()


@pytest.mark.parametrize("layout", ["strided_rows", "strided_columns", "transposed", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [48, 1032])
def test_any_layout(layout, dtype, c):
    x, weight, bias, residual = arguments(6, c, dtype, dtype)
    vectors = [torch.stack([vector, vector], dim=1)[:, 0] for vector in (weight, bias)]
    laid = (lay_out(x, layout), *vectors, lay_out(residual, layout))
    for ours, want in zip(quantized(laid), quantized((x, weight, bias, residual)), strict=True):
        assert torch.equal(ours, want)


@pytest.mark.parametrize("c", [1, 37, 48, 1030])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_byte_behind_a_tensor_is_touched(fenced, monkeypatch, dtype, c):
    tensors = [fenced(tensor) for tensor in arguments(3, c, dtype, dtype)]
    like = op.forward_like
    monkeypatch.setattr(op, "forward_like", lambda call: tuple(fenced(x) if x.numel() else x for x in like(call)))
    quantized(tensors)
    op._forward_cuda(op.Call(*tensors, None, 1e-12, "statistics"))


@pytest.mark.parametrize("n, c", [(0, 5), (5, 0), (0, 0)])
def test_nothing_in_one_dimension(n, c):
    y, y_q, scale = quantized(arguments(n, c))
    assert y.shape == y_q.shape == (n, c) and torch.equal(scale, torch.zeros(n))


def test_backward_is_another_backends(monkeypatch):
    """CUDA C++ has forward only: who forces it gets the gradients from whom free choice gives."""
    monkeypatch.setattr(backends, "availability", lambda name: backends.Availability(True, "as if"))
    monkeypatch.setattr(backends, "_runs_on", lambda name, device: True)
    backends._choose.cache_clear()
    x, weight, bias, residual = arguments(3, 40)
    leaf = x.clone().requires_grad_()
    try:
        with backends.backend("cuda"):
            assert backends.select("layer_norm", x.device, x.dtype) == "cuda"
            assert backends.select_backward("layer_norm", x.device, x.dtype) != "cuda"
            y = layer_norm(leaf, weight, bias, residual)
            y.backward(residual)
    finally:
        backends._choose.cache_clear()
    want, mean, rstd = op._forward_cuda(op.Call(x, weight, bias, residual, None, 1e-12, "statistics"))
    assert torch.equal(y, want)
    dh, _, _ = op._backward_torch(op.Gradient(residual, x, weight, residual, mean, rstd))
    torch.testing.assert_close(leaf.grad, dh)


def test_device_and_stream(cuda_module, emulated):
    tensors = dict(x=torch.ones(2, 8), weight=torch.ones(8), bias=torch.ones(8), y=torch.empty(2, 8))
    call = CALL | {name: tensor.data_ptr() for name, tensor in tensors.items()}
    cuda_module.layer_norm(*(call | dict(device=1, stream=0x1234)).values())
    assert emulated.emulated_launch_device() == 1 and emulated.emulated_device() == 0
    assert emulated.emulated_launch_stream() == 0x1234
    with pytest.raises(RuntimeError, match=r"^layer_norm: cudaSetDevice: invalid device ordinal$"):
        cuda_module.layer_norm(*(call | dict(device=7)).values())


CALL = dict(x=64, x_stride=8, residual=0, residual_stride=0, dtype=0, weight=64, bias=64, parameter_dtype=0, rows=2)
CALL |= dict(columns=8, eps=1e-5, y=64, mean=0, rstd=0, codes=0, scale_out=0, scale_in=0, scale_in_stride=0)
CALL |= dict(device=0, stream=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=-1), "rows must be 0 or more, got -1"),
        (dict(columns=-1), "columns must be 0 or more, got -1"),
        (dict(x_stride=-1), "x_stride must be 0 or more, got -1"),
        (dict(residual_stride=-1), "residual_stride must be 0 or more, got -1"),
        (dict(dtype=3), "dtype must be 0, 1 or 2, got 3"),
        (dict(parameter_dtype=1), "parameter_dtype must be 0 or that of x, got 1"),
        (dict(eps=0.0), "eps must be finite and above 0, got 0.000000"),
        (dict(eps=float("nan")), "eps must be finite and above 0, got nan"),
        (dict(scale_in_stride=2), "scale_in_stride must be 0 or 1, got 2"),
        (dict(codes=64), "codes must come with scale_in or scale_out, got neither"),
        (dict(scale_out=64), "codes must point to memory where there is a scale, got null"),
        (dict(codes=64, scale_in=64, scale_out=64), "codes must come with scale_in or scale_out, got both"),
        *((dict.fromkeys([name], 0), f"{name} must point to numbers, got null") for name in ("x", "weight", "bias")),
        (dict(y=0), "y must point to memory, got null"),
    ],
)
def test_refuses(cuda_module, changes, message):
    with pytest.raises(ValueError, match=f"^layer_norm: {re.escape(message)}$"):
        cuda_module.layer_norm(*(CALL | changes).values())
