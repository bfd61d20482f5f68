"""Tile functions of kernels/common.py alone, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from distilbert_fast import backends
from distilbert_fast.ops.quantize import quantize_reference
from distilbert_fast.testing import logits

triton = pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

import triton.language as tl  # noqa: E402

from distilbert_fast.kernels.common import rounded_gelu, to_int8  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: 0 · ∞
INF, NAN = float("inf"), float("nan")


@triton.jit
def _codes_kernel(x, r, codes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(codes + i, to_int8(tl.load(x + i), tl.load(r)))


@triton.jit
def _gelu_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, rounded_gelu(tl.load(x + i)))


def test_rounded_gelu():
    x = torch.cat([torch.linspace(-8, 8, 4092), torch.tensor([-3e38, 3e38, INF, NAN])])
    y = torch.empty_like(x, device=DEVICE)
    _gelu_kernel[(1,)](x.to(DEVICE), y, BLOCK=x.numel())
    y, want = y.cpu(), torch.nn.functional.gelu(x.double())
    assert (y[:-4] - want[:-4]).abs().max() < 6e-5
    assert (y[:-4] - want[:-4])[x[:-4].abs() < 1].abs().max() < 4e-5
    assert y[-4:-1].tolist() == [0, x[-3].item(), INF] and y[-1].isnan()


def codes(x: torch.Tensor, r: float) -> torch.Tensor:
    found = torch.empty(x.shape, dtype=torch.int8, device=DEVICE)
    _codes_kernel[(1,)](x.to(DEVICE), torch.tensor(r, device=DEVICE), found, BLOCK=x.numel())
    return found.cpu()


def test_to_int8_of_every_half_and_its_neighbours():
    half = torch.arange(-1024, 1024) / 8  # every eighth, and beyond both clamps
    for x in (half, half.nextafter(torch.tensor(INF)), half.nextafter(torch.tensor(-INF))):
        assert torch.equal(codes(x, 1.0), x.clamp(-127, 127).round().to(torch.int8))


@pytest.mark.parametrize("scale", [2.0**-126, 2e-38, 0.013, 1.0, 3e36])
def test_to_int8_rounds_the_product_as_the_reference_does(scale):
    x = logits(1, 2048, spread=60.0)[0] * scale
    want, _ = quantize_reference(x[None], torch.tensor(scale))
    assert torch.equal(codes(x, float(torch.tensor(scale).reciprocal())), want[0])


def test_to_int8_of_what_is_no_number():
    x = torch.tensor([NAN, INF, -INF, -NAN, 0.0, -0.0, 3e38, -3e38])
    assert codes(x, 2.0).tolist() == [0, 127, -127, 0, 0, 0, 127, -127]
    assert codes(x, 0.0).tolist() == [0] * 8
