"""The logic of csrc/cuda/int8_linear*.cu without a GPU: compiled for the CPU by cuda_on_cpu/, behind the real bindings
and the real call in ops/int8_linear.py. What a GPU does with it (speed, memory, rounding) is not seen here.
"""

from __future__ import annotations

import re

import pytest
import torch

from distilbert_fast.ops import int8_linear as op
from distilbert_fast.ops.quantize import quantize, quantize_reference
from distilbert_fast.testing import assert_twice_rule, lay_out, logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(cuda_on_cpu):
    yield cuda_on_cpu
    assert cuda_on_cpu.emulated_bank_conflicts() == 0


def codes(rows: int, c: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, (rows, c), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def run(x_q, x_scale, w_q, w_scale, bias=None, gelu=False, residual=None, out_scale=None, out_dtype=torch.float32):
    return op._forward_cuda(op.Call(x_q, x_scale, w_q, w_scale, bias, gelu, residual, out_scale, out_dtype))


def accumulators(x_q, w_q):
    """The exact sums by the kernel: float32 counts by ones as far as these depths go."""
    return run(x_q, torch.tensor(1.0), w_q, torch.ones(w_q.shape[0])).long()


def arguments(n, c, f):
    x_q, x_scale = quantize(logits(n, c))
    w_q, w_scale = quantize(logits(f, c, seed=1, spread=0.02))
    return x_q, x_scale, w_q, w_scale, logits(1, f, seed=2, spread=0.1)[0], logits(n, f, seed=3, spread=1.0)


# One number; an odd one of everything; around a fragment, a tile and a stage; depths around the pipeline's length.
@pytest.mark.parametrize(
    "n, c, f", [(1, 1, 1), (3, 7, 5), (8, 16, 8), (17, 33, 9), (64, 128, 64), (65, 129, 66), (5, 500, 70)]
)
def test_accumulators_are_exact(n, c, f):
    x_q, w_q = codes(n, c), codes(f, c, seed=1)
    assert torch.equal(accumulators(x_q, w_q), x_q.long() @ w_q.long().t())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("n, c, f", [(130, 208, 140), (129, 520, 16), (256, 0, 128)])
def test_accumulators_of_large_tiles_are_exact(emulated, capability, n, c, f):
    emulated.emulated_set_capability(capability)
    x_q, w_q = codes(n, c), codes(f, c, seed=1)
    assert torch.equal(accumulators(x_q, w_q), x_q.long() @ w_q.long().t())


KERNELS = {"small": (80, 0, 0), "large": (80, 100, 100), "hopper": (90, 100, 100)}  # capability, rows and columns more


@pytest.fixture(params=KERNELS)
def kernel(request, emulated):
    """Which of the three kernels serves: by the GPU, and by how many tiles there are."""
    capability, rows, columns = KERNELS[request.param]
    emulated.emulated_set_capability(capability)
    return lambda n, c, f: (n + rows, c, f + columns)


def reference(x_q, x_scale, w_q, w_scale, bias, gelu, residual, dtype):
    bias, residual = (None if x is None else x.to(dtype) for x in (bias, residual))
    activation = "gelu" if gelu else None
    return op.int8_linear_reference(x_q, x_scale.to(dtype), w_q, w_scale.to(dtype), bias, activation, residual)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_error_is_at_most_twice_torchs(kernel, with_residual, gelu, out_dtype):
    *layer, bias, residual = arguments(*kernel(33, 80, 41))
    residual = residual if with_residual else None
    ours = run(*layer, bias, gelu, residual, out_dtype=out_dtype)
    assert ours.dtype == out_dtype
    torchs = reference(*layer, bias, gelu, residual, torch.float32).to(out_dtype)
    assert_twice_rule(ours, torchs, reference(*layer, bias, gelu, residual, torch.float64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_low_precision_bias_and_residual_are_added_in_float32(dtype):
    *layer, bias, residual = arguments(9, 33, 19)
    bias, residual = bias.to(dtype), residual.to(dtype)
    assert torch.equal(run(*layer, bias, True, residual), run(*layer, bias.float(), True, residual.float()))


@pytest.mark.parametrize("out_scale", [torch.tensor(0.05), torch.linspace(0.01, 0.1, 200)], ids=["[]", "[N]"])
def test_codes_are_those_of_the_float32_result(kernel, out_scale):
    n, c, f = kernel(17, 64, 40)
    out_scale = out_scale[:n] if out_scale.dim() else out_scale
    *layer, bias, residual = arguments(n, c, f)
    y_q = run(*layer, bias, True, residual, out_scale)
    assert y_q.dtype == torch.int8 and y_q.unique().numel() > 50
    assert torch.equal(y_q, quantize_reference(run(*layer, bias, True, residual), out_scale)[0])


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-40, float("inf"), float("nan")])
def test_a_bad_out_scale_gives_codes_0(bad):
    layer = arguments(5, 20, 9)[:4]
    scale = torch.tensor([0.1, 0.1, bad, 0.1, 0.1])
    codes_, clean = run(*layer, out_scale=scale), run(*layer, out_scale=torch.full((5,), 0.1))
    others = torch.tensor([0, 1, 3, 4])
    assert not codes_[2].any() and torch.equal(codes_[others], clean[others])


def test_infinities_and_nan_become_codes():
    one = torch.ones(1, 1, dtype=torch.int8)
    bias = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    y = run(one, torch.tensor(1.0), one.expand(4, 1), torch.ones(4), bias, out_scale=torch.tensor(1.0))
    assert y.tolist() == [[127, -127, 0, 1]]


@pytest.mark.parametrize("layout", ["strided_rows", "strided_columns", "transposed", "misaligned"])
@pytest.mark.parametrize("columns", [45, 48])
def test_any_layout(kernel, layout, columns):
    n, c, f = kernel(19, columns, 40)
    x_q, x_scale, w_q, w_scale, bias, residual = arguments(n, c, f)
    want = run(x_q, x_scale, w_q, w_scale, bias, False, residual)
    vectors = [torch.stack([x, x], dim=1)[:, 0] for x in (x_scale, w_scale, bias)]  # stride 2
    laid = run(lay_out(x_q, layout), vectors[0], lay_out(w_q, layout), vectors[1], vectors[2], False,
               lay_out(residual, layout))  # fmt: skip
    assert torch.equal(laid, want)


@pytest.mark.parametrize("c", [16, 37, 80])
def test_no_byte_behind_a_tensor_is_touched(kernel, fenced, monkeypatch, c):
    """Rows that start on 16-byte boundaries or not, and end in the middle of a chunk, a stage and a tile."""
    n, c, f = kernel(5, c, 21)
    *layer, bias, residual = (fenced(x) for x in arguments(n, c, f))
    fake = op._forward_fake
    monkeypatch.setattr(op, "_forward_fake", lambda *given: fenced(fake(*given)))
    for out_scale in (None, fenced(torch.linspace(0.01, 0.1, n))):
        run(*layer, bias, True, residual, out_scale)


@pytest.mark.parametrize("n, c, f", [(0, 5, 3), (5, 3, 0), (3, 0, 5)])
def test_nothing_in_one_dimension(n, c, f):
    *layer, bias, residual = arguments(n, c, f) if c else (
        codes(n, 0), torch.zeros(n), codes(f, 0), torch.zeros(f), *arguments(n, 1, f)[4:])  # fmt: skip
    y = run(*layer, bias, False, residual)
    assert y.shape == (n, f)
    if n and f:
        assert torch.equal(y, bias + residual)


def test_device_and_stream(cuda_module, emulated):
    call = CALL | {name: x.data_ptr() for name, x in TENSORS.items()}
    cuda_module.int8_linear(*(call | dict(device=1, stream=0x1234)).values())
    assert emulated.emulated_launch_device() == 1 and emulated.emulated_device() == 0
    assert emulated.emulated_launch_stream() == 0x1234
    with pytest.raises(RuntimeError, match=r"^int8_linear: cudaSetDevice: invalid device ordinal$"):
        cuda_module.int8_linear(*(call | dict(device=7)).values())


TENSORS = dict(x=codes(2, 16), x_scale=torch.ones(2), w=codes(4, 16), w_scale=torch.ones(4), y=torch.empty(2, 4))
CALL = dict(x=64, x_stride=16, x_scale=64, x_scale_stride=1, w=64, w_stride=16, w_scale=64, bias=0, bias_dtype=0)
CALL |= dict(rows=2, columns=4, depth=16, gelu=False, residual=0, residual_stride=0, residual_dtype=0, y=64, y_dtype=0)
CALL |= dict(out_scale=0, out_scale_stride=0, device=0, stream=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", -1, "rows must be 0 or more, got -1"),
        ("columns", -1, "columns must be 0 or more, got -1"),
        ("depth", -1, "depth must be from 0 to 131071, got -1"),
        ("depth", 131072, "depth must be from 0 to 131071, got 131072"),
        *((f"{name}_stride", -1, f"{name}_stride must be 0 or more, got -1") for name in ("x", "w", "residual")),
        *((f"{name}_stride", 2, f"{name}_stride must be 0 or 1, got 2") for name in ("x_scale", "out_scale")),
        *((f"{name}_dtype", 3, f"{name}_dtype must be 0, 1 or 2, got 3") for name in ("bias", "residual")),
        ("y_dtype", 4, "y_dtype must be 0, 1, 2 or 3, got 4"),
        *((name, 0, f"{name} must point to codes, got null") for name in ("x", "w")),
        *((name, 0, f"{name} must point to numbers, got null") for name in ("x_scale", "w_scale")),
        ("y", 0, "y must point to memory, got null"),
        ("y_dtype", 3, "out_scale must point to numbers where y is int8, got null"),
    ],
)
def test_refuses(cuda_module, name, value, message):
    with pytest.raises(ValueError, match=f"^int8_linear: {re.escape(message)}$"):
        cuda_module.int8_linear(*(CALL | {name: value}).values())
