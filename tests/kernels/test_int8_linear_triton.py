"""kernels/int8_linear.py through the public function, on a CUDA device or in Triton's interpreter.

Without a device this module is skipped here and run by test_interpreter.py.
"""

from __future__ import annotations

import os

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.int8_linear import MAX_COLUMNS, int8_linear_reference
from distilbert_fast.ops.quantize import quantize_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import int8_linear as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: ∞ · 0
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def codes(rows, c, seed=0):
    """int8 [rows, c] of all 256 values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, c), generator=generator, dtype=torch.int8).to(DEVICE)


def exact(x_q, w_q):
    return (x_q.cpu().long() @ w_q.cpu().long().t()).float().to(DEVICE)  # [N, F]


def arguments(n, c, f, names=("bias", "residual")):
    """A linear layer as the package quantizes it."""
    x_q, x_scale = quantize_reference(logits(n, c, device=DEVICE))
    w_q, w_scale = quantize_reference(logits(f, c, seed=1, spread=0.02, device=DEVICE))
    bias, residual = logits(1, f, seed=2, spread=0.1, device=DEVICE)[0], logits(n, f, seed=3, spread=1.0, device=DEVICE)
    given = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale, "bias": bias, "residual": residual}
    return {name: x for name, x in given.items() if name not in {"bias", "residual"} - set(names)}


def triton(x_q, x_scale, w_q, w_scale, *args, **keywords):
    with distilbert_fast.backend("triton"):
        return distilbert_fast.int8_linear(x_q, x_scale, w_q, w_scale, *args, **keywords)


def accumulated(x_q, w_q):
    return triton(x_q, 1.0, w_q, torch.ones(w_q.shape[0], device=DEVICE))


def double(given):
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


# Accumulators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, c, f",
    [(1, 1, 1), (3, 7, 5), (64, 16, 64), (65, 129, 63), (130, 300, 70), (2, 768, 130), (5, 1041, 3), (300, 48, 257)],
)
def test_accumulators_are_exact(n, c, f):
    x_q, w_q = codes(n, c), codes(f, c, seed=1)
    assert torch.equal(accumulated(x_q, w_q), exact(x_q, w_q))


def test_accumulators_are_exact_up_to_the_last_column_that_fits_int32():
    x_q = torch.tensor([[-128], [127]], dtype=torch.int8, device=DEVICE).expand(2, MAX_COLUMNS)
    assert torch.equal(accumulated(x_q, x_q), exact(x_q, x_q))


def test_every_configuration_has_the_same_sums():
    for n in (3, 257):
        x_q, w_q = codes(n, 1100), codes(40, 1100, seed=1)
        candidates = kernels.configurations(n, 227 << 10)
        for i in range(len(candidates)):
            with tuning.choosing(lambda kernel, key, candidates, i=i: candidates[i]):
                assert torch.equal(accumulated(x_q, w_q), exact(x_q, w_q))


def test_deep_products_of_few_rows_are_split(monkeypatch):
    """And whether they are changes no bit of the epilogue."""
    given = arguments(3, 3072, 40)
    launched = []
    original = kernels._int8_linear_sums_kernel
    monkeypatch.setattr(kernels, "_int8_linear_sums_kernel", Launches(original, launched))
    split = triton(**given, activation="gelu")
    assert len(launched) == 1
    monkeypatch.setattr(kernels, "_device", lambda device: kernels.Device(1, 227 << 10, 90))
    torch.testing.assert_close(triton(**given, activation="gelu"), split, rtol=1e-6, atol=1e-6)
    assert len(launched) == 1


class Launches:
    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        self.seen.append(grid)
        return self.kernel[grid]


def test_more_tiles_than_places(monkeypatch):
    """They are computed in an order that reaches every tile."""
    monkeypatch.setattr(kernels, "_device", lambda device: kernels.Device(1, 200 << 10, 80))
    x_q, w_q = codes(1300, 32), codes(300, 32, seed=1)
    assert torch.equal(accumulated(x_q, w_q), exact(x_q, w_q))


# The epilogue --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("names", [(), ("bias",), ("bias", "residual")], ids=["plain", "bias", "bias_and_residual"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (33, 129, 65), (16, 768, 64)])
def test_error_is_at_most_twice_torchs(shape, names, activation, out_dtype):
    given = arguments(*shape, names)
    ours = triton(**given, activation=activation, out_dtype=out_dtype)
    assert ours.dtype == out_dtype
    torchs = int8_linear_reference(**given, activation=activation).to(out_dtype)
    assert_twice_rule(ours, torchs, int8_linear_reference(**double(given), activation=activation))


def test_gelu_over_its_whole_range():
    """One column of ones: x_scale is GELU's argument, from where it is 0 to where it is the identity."""
    n = 501
    x_scale = torch.linspace(-8, 8, n, device=DEVICE)
    one = torch.ones((n, 1), dtype=torch.int8, device=DEVICE)
    given = {"x_q": one, "x_scale": x_scale, "w_q": one[:1], "w_scale": torch.ones(1, device=DEVICE)}
    ours = triton(**given, activation="gelu")
    torchs = int8_linear_reference(**given, activation="gelu")
    assert_twice_rule(ours, torchs, int8_linear_reference(**double(given), activation="gelu"))


@pytest.mark.parametrize("c", [1100, 3072], ids=["whole", "split"])
def test_the_scales_one_after_the_other(c):
    """acc · 2⁻⁷⁵ · 2⁻⁷⁵: the product of the two scales, taken first, would have been 0."""
    big = torch.full((1, c), 127, dtype=torch.int8, device=DEVICE)
    y = triton(big, 2.0**-75, big, torch.tensor([2.0**-75], device=DEVICE))
    assert y.item() == c * 127 * 127 * 2.0**-150


@pytest.mark.parametrize("bias", FLOATS, ids=str)
@pytest.mark.parametrize("residual", FLOATS, ids=str)
def test_low_precision_bias_and_residual_are_added_in_float32(bias, residual):
    given = arguments(7, 33, 9)
    given["bias"], given["residual"] = given["bias"].to(bias), given["residual"].to(residual)
    wide = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    assert torch.equal(triton(**given), triton(**wide))


@pytest.mark.parametrize("out_scale", [0.05, "[]", "[N]"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("c", [65, 3072], ids=["whole", "split"])
def test_codes_are_those_of_quantize(c, activation, out_scale):
    given = {**arguments(9, c, 33), "activation": activation}
    if out_scale == "[]":
        out_scale = torch.tensor(0.05, device=DEVICE)
    elif out_scale == "[N]":
        out_scale = torch.linspace(0.01, 0.1, 9, device=DEVICE)
    y_q = triton(**given, out_scale=out_scale)
    assert y_q.dtype == torch.int8
    want, _ = quantize_reference(triton(**given), torch.as_tensor(out_scale, device=DEVICE))
    assert (y_q.int() - want.int()).abs().max() <= 1 and (y_q != want).sum() <= 2


def test_out_scales_that_are_none():
    """0, negative, not finite, subnormal: codes 0. Infinite sums: ±127; NaN: 0."""
    given = arguments(6, 33, 9)
    bad = torch.tensor([0.0, -1.0, float("nan"), float("inf"), 1e-40, 0.05], device=DEVICE)
    y_q = triton(**given, out_scale=bad)
    assert (y_q[:5] == 0).all() and (y_q[5] != 0).any()
    given["x_scale"] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, 1.0, 1.0], device=DEVICE)
    y, y_q = triton(**given), triton(**given, out_scale=0.05)
    assert not y[:3].isfinite().any() and y[3:].isfinite().all()
    assert torch.equal(y_q[:3], quantize_reference(y[:3], torch.tensor(0.05, device=DEVICE))[0])


# Layouts and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    given = arguments(19, 37, 11)
    want = triton(**given, activation="gelu", out_scale=given["x_scale"])
    laid = {
        name: lay_out(x, layout) if x.dim() == 2 else lay_out(torch.stack([x, x]), layout)[0]
        for name, x in given.items()
    }
    found = triton(**laid, activation="gelu", out_scale=laid["x_scale"])
    assert found.is_contiguous() and torch.equal(found, want)
    assert all(torch.equal(laid[name], given[name]) for name in given)


def test_one_scale_for_all_rows():
    given = arguments(5, 33, 9)
    given["x_scale"] = torch.full((5,), 0.02, device=DEVICE)
    want = triton(**given)
    for scale in (0.02, torch.tensor(0.02, device=DEVICE), torch.tensor(0.02, device=DEVICE).expand(5)):
        assert torch.equal(triton(**{**given, "x_scale": scale}), want)


@pytest.mark.parametrize("c", [67, 3072], ids=["whole", "split"])
@pytest.mark.parametrize("f", [1, 33, 64, 70])
def test_nothing_beside_the_result_is_written(f, c):
    given = arguments(13, c, f)
    for dtype in (torch.float32, torch.int8):
        memory = torch.full((13 * f + 2 * 37,), 99, dtype=dtype, device=DEVICE)
        out_scale = given["x_scale"] if dtype == torch.int8 else None
        kernels.int8_linear(
            *(given[name] for name in ("x_q", "x_scale", "w_q", "w_scale", "bias")),
            False,
            given["residual"],
            out_scale,
            memory[37:-37].view(13, f),
        )
        assert torch.equal(memory[37:-37].view(13, f), triton(**given, out_scale=out_scale))
        assert (memory[:37] == 99).all() and (memory[-37:] == 99).all()


@pytest.mark.parametrize("far", ["x_q", "w_q", "residual"])
def test_offsets_past_int32(tmp_path, far):
    """Three rows, places 0, 1.2 · 10⁹ and 2.4 · 10⁹ of their tensor."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    given = arguments(3, 24, 3)
    want, x, stride = triton(**given), given[far], 1_200_000_000
    size = 2 * stride + x.shape[1]
    if DEVICE == "cuda":
        whole = torch.zeros(size, dtype=x.dtype, device=DEVICE)
    else:
        whole = torch.from_file(str(tmp_path / far), shared=True, size=size, dtype=x.dtype)  # sparse: no memory
        os.unlink(tmp_path / far)
    given[far] = whole.as_strided(x.shape, (stride, 1)).copy_(x)
    assert torch.equal(triton(**given), want)


def test_same_bits_every_run():
    given = {**arguments(7, 3072, 100), "activation": "gelu"}
    first = triton(**given)
    assert all(torch.equal(triton(**given), first) for _ in range(3))


def test_inside_autocast():
    given = arguments(5, 33, 9)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert triton(**given).dtype == torch.float32


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(128, 768, 3072), (100, 3072, 768), (5000, 768, 2304), (4096, 3072, 768)], ids=str)
def test_layers_of_the_base_model(shape):
    given = arguments(*shape)
    torchs = int8_linear_reference(**given, activation="gelu")
    wide = int8_linear_reference(**double(given), activation="gelu")
    assert_twice_rule(triton(**given, activation="gelu"), torchs, wide)
    assert torch.equal(accumulated(given["x_q"], given["w_q"]), exact(given["x_q"], given["w_q"]))


@pytest.mark.gpu
@needs_gpu
def test_inside_a_cuda_graph():
    given = arguments(64, 3072, 768)
    want = triton(**given, activation="gelu")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton(**given, activation="gelu")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)
