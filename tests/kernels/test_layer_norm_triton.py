"""kernels/layer_norm.py through the public functions, on a CUDA device or in Triton's interpreter.

The interpreter checks the logic; its bfloat16 stores truncate where a GPU rounds, which the bound on errors still
covers.
"""

from __future__ import annotations

import os

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.layer_norm import layer_norm, layer_norm_quantize, layer_norm_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import layer_norm as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: ∞ − ∞, 0 / 0
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 5), (5, 0), (1, 1), (1030, 1), (1, 3), (3, 7), (33, 129), (11, 384), (5, 768), (3, 3072), (2, 4099)]


def arguments(n, c, dtype=torch.float32, seed=0):
    """x, weight, bias, residual."""
    weight = 1 + logits(1, c, torch.float64, seed + 1, spread=0.3)[0]
    bias = logits(1, c, torch.float64, seed + 2, spread=0.3)[0]
    tensors = logits(n, c, dtype, seed), weight.to(dtype), bias.to(dtype), logits(n, c, dtype, seed + 3)
    return [tensor.to(DEVICE) for tensor in tensors]


def torchs(x, weight, bias, residual=None):
    h = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(h, h.shape[1:], weight, bias, 1e-12)


def results(op, tensors, dy):
    """y and the gradients of all of ``tensors``."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = op(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def triton(tensors, dy):
    with distilbert_fast.backend("triton"):
        return results(layer_norm, tensors, dy)


def triton_quantize(*arguments, **keywords):
    with distilbert_fast.backend("triton"):
        return layer_norm_quantize(*arguments, **keywords)


def check(tensors, dy):
    """All results follow the rule of twice torch's error, and the inputs stay as they were."""
    before = [None if tensor is None else tensor.clone() for tensor in [*tensors, dy]]
    ours = triton(tensors, dy)
    assert all(x is None or torch.equal(x, y) for x, y in zip(before, [*tensors, dy], strict=True))
    exact = results(layer_norm_reference, [t if t is None else t.double() for t in tensors], dy.double())
    for found, same, want in zip(ours, results(torchs, tensors, dy), exact, strict=True):
        assert found.dtype == same.dtype and found.is_contiguous()
        assert_twice_rule(found, same, want)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    x, weight, bias, residual = arguments(*shape, dtype)
    dy = logits(*shape, dtype, seed=9, device=DEVICE)
    check([x, weight, bias, residual], dy)
    check([x, weight, bias, None], dy)


@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_mixed_dtypes(x, residual):
    tensors = arguments(9, 31)
    tensors[0], tensors[3] = tensors[0].to(x), tensors[3].to(residual)
    ours = triton(tensors, logits(9, 31, seed=9, device=DEVICE))
    assert ours[0].dtype == torch.promote_types(x, residual)
    assert [result.dtype for result in ours[1:]] == [tensor.dtype for tensor in tensors]
    exact = layer_norm_reference(*(tensor.double() for tensor in tensors))
    torch.testing.assert_close(ours[0], exact.to(ours[0].dtype), rtol=2 * torch.finfo(ours[0].dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout, dtype):
    x, weight, bias, residual = arguments(19, 37, dtype)
    dy = logits(19, 37, dtype, seed=9, device=DEVICE)
    want = triton([x, weight, bias, residual], dy)
    wide = lay_out(torch.stack([weight, bias]), layout)
    laid = [lay_out(x, layout), wide[0], wide[1], lay_out(residual, layout)]
    for found, expected in zip(triton(laid, lay_out(dy, layout)), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_upstream_gradient_and_residual_of_stride_zero():
    x, weight, bias, residual = arguments(5, 33)
    ones = torch.ones((), device=DEVICE).expand(5, 33)
    check([x, weight, bias, residual[:1].expand(5, -1)], ones)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_variance_survives_a_large_mean(offset):
    x, weight, bias, _ = arguments(8, 768)
    check([(x.double() + offset).float(), weight, bias, None], torch.ones(8, 768, device=DEVICE))


def test_a_constant_row_gives_the_bias():
    x, weight, bias, _ = arguments(5, 67)
    x[:] = torch.tensor([0.0, 2.5, 0.1, -1e6 / 3, 1e-30], device=DEVICE)[:, None]
    y = triton([x, weight, bias, None], torch.ones_like(x))[0]
    assert torch.equal(y, bias.expand(5, 67))


def test_a_row_that_is_not_finite_leaves_the_others_exact():
    x, weight, bias, residual = arguments(6, 33)
    clean = triton_quantize(x, weight, bias, residual)
    x[1, 3], residual[3, 0], x[4, 32] = float("nan"), float("inf"), float("-inf")
    y, y_q, y_scale = triton_quantize(x, weight, bias, residual)
    bad, good = [1, 3, 4], [0, 2, 5]
    assert y[bad].isnan().all() and y_scale[bad].isnan().all() and not y_q[bad].any()
    for found, want in zip((y, y_q, y_scale), clean, strict=True):
        assert torch.equal(found[good], want[good])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_is_that_of_the_unrounded_result(shape, dtype):
    """The residual is float32, and so is y: the codes are those that the reference makes of it, bit for bit."""
    x, weight, bias, _ = arguments(*shape, dtype)
    residual = logits(*shape, seed=3, device=DEVICE)
    y, y_q, y_scale = triton_quantize(x, weight, bias, residual)
    assert y.dtype == torch.float32
    exact = layer_norm_reference(*(tensor.double() for tensor in (x, weight, bias, residual)))
    assert_twice_rule(y, torchs(x.float(), weight.float(), bias.float(), residual), exact)
    each = 0.01 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for scale, found_q, found in [
        (None, y_q, y_scale),
        *((scale, *triton_quantize(x, weight, bias, residual, out_scale=scale)[1:]) for scale in (0.03125, each)),
    ]:
        with distilbert_fast.backend("torch"):
            want_q, want = quantize(y.cpu(), scale.cpu() if isinstance(scale, torch.Tensor) else scale)
        assert torch.equal(found_q.cpu(), want_q) and torch.equal(found.cpu(), want)


def test_codes_are_made_before_a_bfloat16_result_is_rounded():
    x, weight, bias, residual = arguments(40, 768, torch.bfloat16)
    y, y_q, y_scale = triton_quantize(x, weight, bias, residual)
    exact = layer_norm_reference(*(tensor.double() for tensor in (x, weight, bias, residual)))
    assert y.dtype == torch.bfloat16
    assert (y_q * y_scale.double()[:, None] - exact).abs().max() <= 0.5001 * y_scale.max()


def test_nothing_but_what_is_wanted_has_a_gradient():
    tensors = arguments(5, 33)
    everything = triton(tensors, torch.ones(5, 33, device=DEVICE))[1:]
    for wanted in range(4):
        leaves = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
        with distilbert_fast.backend("triton"):
            layer_norm(*leaves).sum().backward()
        assert torch.equal(leaves[wanted].grad, everything[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_run(dtype):
    n = 21 if DEVICE == "cpu" else 30_001
    tensors, dy = arguments(n, 129, dtype), logits(n, 129, dtype, seed=9, device=DEVICE)
    runs = [[*triton(tensors, dy), *triton_quantize(*tensors)] for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def candidates(c):
    """Every configuration that a launcher may choose for this many columns."""
    seen = []
    with tuning.choosing(lambda kernel, key, candidates: (seen.extend(candidates), candidates[0])[1]):
        triton(arguments(2, c), torch.ones(2, c, device=DEVICE))
    return seen


@pytest.mark.parametrize("c", [1, 24, 129, 768])
def test_every_configuration(c):
    tensors, dy = arguments(13, c), logits(13, c, seed=9, device=DEVICE)
    want, codes = triton(tensors, dy), triton_quantize(*tensors)
    configs = candidates(c)
    assert len(configs) > 6
    for config in configs:
        with tuning.choosing(lambda kernel, key, candidates, config=config: config):
            for found, expected in zip(triton(tensors, dy), want, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            y, y_q, y_scale = triton_quantize(*tensors)
            torch.testing.assert_close((y, y_scale), (codes[0], codes[2]), rtol=1e-5, atol=1e-5)
            assert (y_q.int() - codes[1].int()).abs().max() <= 1


@pytest.mark.parametrize("c", [5, 64, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_outputs_is_written(dtype, c):
    n = 3
    x, weight, bias, residual = arguments(n, c, dtype)
    dy = logits(n, c, dtype, seed=9, device=DEVICE)
    want, codes = triton([x, weight, bias, residual], dy), triton_quantize(x, weight, bias, residual)

    def framed(kind, *shape):
        frame = torch.full((torch.Size(shape).numel() + 32,), 77, dtype=kind, device=DEVICE)
        return frame, frame[16:-16].view(shape)

    frames = [framed(kind, n, c) for kind in (dtype, torch.int8, dtype)] + [framed(torch.float32, n) for _ in range(3)]
    frames += [framed(torch.float32, c) for _ in range(2)]
    y, y_q, dh, mean, rstd, found, dweight, dbias = (inner for _, inner in frames)
    terms, ids = [x, residual], [None, None]
    kernels.normalize_fwd(terms, ids, weight, bias, 1e-12, y, mean, rstd, y_q, None, found)
    kernels.normalize_bwd(dy, terms, ids, weight, mean, rstd, dh, dweight, dbias)
    outputs = y, y_q, found, dh, dweight.to(dtype), dbias.to(dtype)
    for ours, expected in zip(outputs, [*codes, want[1], want[2], want[3]], strict=True):
        assert torch.equal(ours, expected)
    for frame, inner in frames:
        inner.fill_(77)
        assert (frame == 77).all()


def far_rows(path, rows):
    """The same rows so far apart that int32 holds their distance, not its double."""
    stride = (1 << 30) + 64
    size = 2 * stride + rows.shape[1]
    if DEVICE == "cuda":
        whole = torch.zeros(size, dtype=rows.dtype, device=DEVICE)
    else:
        whole = torch.from_file(str(path), shared=True, size=size, dtype=rows.dtype)  # sparse: takes no memory
        os.unlink(path)
    return whole.as_strided(rows.shape, (stride, 1)).copy_(rows)


@pytest.mark.parametrize("far", ["x", "residual", "dy"])
def test_offsets_past_int32(tmp_path, far):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    tensors, dy = arguments(3, 64, torch.bfloat16), logits(3, 64, torch.bfloat16, seed=9, device=DEVICE)
    want = triton(tensors, dy)
    rows = {"x": tensors[0], "residual": tensors[3], "dy": dy}
    rows[far] = far_rows(tmp_path / far, rows[far])
    found = triton([rows["x"], *tensors[1:3], rows["residual"]], rows["dy"])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_more_rows_than_a_grid_dimension_of_65535():
    tensors, dy = arguments(70_401, 768, torch.bfloat16), logits(70_401, 768, torch.bfloat16, 9, device=DEVICE)
    y, dx = triton(tensors, dy)[:2]
    last = triton([tensors[0][-2:], *tensors[1:3], tensors[3][-2:]], dy[-2:])
    assert torch.equal(y[-2:], last[0]) and torch.equal(dx[-2:], last[1])


@pytest.mark.gpu
@needs_gpu
def test_inside_a_cuda_graph():
    tensors, dy = arguments(64, 768, torch.bfloat16), logits(64, 768, torch.bfloat16, seed=9, device=DEVICE)

    def everything():
        return [*triton(tensors, dy), *triton_quantize(*tensors)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    tensors[0].copy_(logits(64, 768, torch.bfloat16, seed=99, device=DEVICE))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, everything(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    tensors, dy = arguments(13, 768), logits(13, 768, seed=9, device=DEVICE)
    want, there = triton(tensors, dy), triton([tensor.to("cuda:1") for tensor in tensors], dy.to("cuda:1"))
    for found, expected in zip(there, want, strict=True):
        assert found.device.index == 1 and torch.equal(found.to(DEVICE), expected)
