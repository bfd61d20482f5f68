"""kernels/quantize.py through the public function, on a CUDA device or in Triton's interpreter: its very bits."""

from __future__ import annotations

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops._rows import TINY
from distilbert_fast.ops.quantize import quantize_reference
from distilbert_fast.testing import LAYOUTS, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import quantize as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import tuning  # noqa: E402
from distilbert_fast.kernels.common import row_configs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: 1 / 0, 0 · ∞
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def triton(x, scale=None):
    with distilbert_fast.backend("triton"):
        return distilbert_fast.quantize(x, scale)


def check(x, scale=None):
    """The bits of the reference on the CPU, codes and scales, and an input left as it was."""
    before = x.clone()
    x_q, found = triton(x, scale)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    want_q, want = quantize_reference(x.float().cpu(), None if scale is None else torch.as_tensor(scale).cpu())
    assert x_q.dtype == torch.int8 and x_q.is_contiguous() and found.dtype == torch.float32
    assert torch.equal(x_q.cpu(), want_q)
    torch.testing.assert_close(found.cpu(), want, rtol=0, atol=0, equal_nan=True)
    return x_q, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1030, 1), (3, 7), (67, 17), (9, 768), (3, 3072), (2, 4099), (1, 30522)]
)
def test_shapes(shape, dtype):
    check(logits(*shape, dtype, device=DEVICE))


def test_given_scales():
    x = logits(37, 129, device=DEVICE)
    each = 0.01 + torch.rand(74, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for scale in (0.04, torch.tensor(0.03, device=DEVICE), each[:37], each[::2], each[:1].expand(37)):
        check(x, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    check(lay_out(logits(19, 37, dtype, device=DEVICE), layout))


def test_one_row_for_all():
    check(logits(1, 100, device=DEVICE).expand(3, -1))


@pytest.mark.parametrize("exponent", [-149, -133, -127, -120, -60, 60, 120, 124])
def test_magnitudes(exponent):
    check((logits(8, 70, torch.float64) * 2.0**exponent).float().to(DEVICE))


def test_zero_and_subnormal_rows():
    x = torch.zeros(6, 4)
    x[1, 2] = -0.0
    x[2, 0] = 2.0**-149
    x[3, 1] = -126.9 * 2.0**-126  # its scale would just be subnormal
    x[4, 1] = 127 * 2.0**-126  # the smallest row with a scale
    x[5, 0] = torch.finfo(torch.float32).max
    x_q, scale = check(x.to(DEVICE))
    assert scale[:5].tolist() == [0, 0, 0, 0, TINY] and x_q[4].tolist() == [0, 127, 0, 0]
    check(x.to(DEVICE), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(dtype):
    x = logits(6, 33, dtype, device=DEVICE)
    clean_q, clean = triton(x)
    x[1, 3], x[3, 0], x[4, 32] = NAN, INF, -INF
    x_q, scale = check(x)
    good, bad = [0, 2, 5], [1, 3, 4]
    assert not scale[bad].isfinite().any() and not x_q[bad].any()
    assert torch.equal(x_q[good], clean_q[good]) and torch.equal(scale[good], clean[good])
    check(x, 0.5)
    for odd in (0.0, -1.0, NAN, 2.0**-127, INF):
        assert not check(x, torch.tensor(odd, device=DEVICE))[0].any()


@pytest.mark.parametrize("c", [1, 24, 129, 768])
def test_every_configuration_gives_the_same_bits(c):
    x = logits(5, c, device=DEVICE)
    want = triton(x)
    for config in row_configs(c):
        with tuning.choosing(lambda kernel, key, candidates, config=config: config):
            assert all(torch.equal(a, b) for a, b in zip(triton(x), want, strict=True))


@pytest.mark.parametrize("c", [5, 64, 768])
@pytest.mark.parametrize("given", [False, True])
def test_nothing_outside_the_outputs_is_written(c, given):
    x = logits(3, c, device=DEVICE)
    scale = torch.full((), 0.05, device=DEVICE) if given else None
    frame = torch.full((5 * c + 32,), 77, dtype=torch.int8, device=DEVICE)
    scales = torch.full((35,), 77.0, device=DEVICE)
    x_q, found = frame[16 : 16 + 3 * c].view(3, c), scales[16:19]
    kernels.quantize(x, scale, x_q, found)
    assert torch.equal(x_q, triton(x, scale)[0]) and (found == 77).all() == given
    x_q.fill_(77)
    found.fill_(77)
    assert (frame == 77).all() and (scales == 77).all()
