"""int8_linear: exact accumulators, the epilogue, its edge cases, the doors it is reached through, its messages."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

from distilbert_fast import backend, backends
from distilbert_fast.ops import _packed
from distilbert_fast.ops.int8_linear import MAX_COLUMNS, accumulate, int8_linear, int8_linear_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits


def traced(n: int) -> list[torch.Tensor]:
    x_q, w_q = (torch.randint(-127, 128, (rows, 8), dtype=torch.int8) for rows in (n, 6))
    return [x_q, torch.rand(n), w_q, torch.rand(6), torch.randn(6), torch.randn(n, 6)]


TRACED = {"int8_linear": Traced(lambda x, s, w, f, b, r: int8_linear(x, s, w, f, b, "gelu", r), traced, gradient=False)}

pytestmark = pytest.mark.usefixtures("place")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FILLS = ("random", "all 127", "all -128", "alternating", "gaussian", "limits")
LIMITS = (-128, 127, -128, 127, 127, -65, -64, 63, 64, 1, 0)  # sums of two and of four of them lie about 128


def make_codes(rows: int, c: int, fill: str = "random", seed: int = 0) -> torch.Tensor:
    """int8 [rows, c] from all 256 values, one of the extremes at which saturating instructions go wrong, with few such
    pairs, as real weights are, or with sums at the very edge of saturation."""
    if fill == "gaussian":
        x = torch.randn(rows, c, generator=torch.Generator().manual_seed(seed)) * 40
        return x.round().clamp(-128, 127).to(torch.int8)
    if fill == "limits":
        return torch.tensor(LIMITS, dtype=torch.int8)[make_codes(rows, c, seed=seed).long() % len(LIMITS)]
    if fill == "random":
        return torch.randint(-128, 128, (rows, c), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    x = torch.full((rows, c), 127 if fill == "all 127" else -128, dtype=torch.int8)
    if fill == "alternating":
        x[:, ::2] = 127
    return x


def exact(x_q: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    return x_q.long() @ w_q.long().t()  # [N, F]


def arguments(n: int, c: int, f: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A linear layer quantized as the package quantizes it, with bias and residual."""
    x_q, x_scale = quantize(logits(n, c, seed=seed))
    w_q, w_scale = quantize(logits(f, c, seed=seed + 1, spread=0.02))
    bias, residual = logits(1, f, seed=seed + 2, spread=0.1)[0], logits(n, f, seed=seed + 3, spread=1.0)
    return {
        "x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale, "bias": bias, "residual": residual
    }  # fmt: skip


def in_dtype(tensors: dict, dtype: torch.dtype) -> dict:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in tensors.items()
    }


def assert_as_good_as_torch(n, c, f, names=(), seed=0, out_dtype=torch.float32, layouts=None, **keywords) -> None:
    """The 2× rule, where little is compared over several seeds: of one number, torch is at times exact by luck."""
    found = []
    for trial in range(8 if n * f < 100 else 1):
        given = arguments(n, c, f, seed + 10 * trial)
        given = {name: x for name, x in given.items() if name not in {"bias", "residual"} - set(names)}
        want = int8_linear_reference(**in_dtype(given, torch.float64), **keywords)
        torchs = int8_linear_reference(**given, **keywords).to(out_dtype)
        laid = {name: lay_out(x, (layouts or {}).get(name, "contiguous")) if x.dim() == 2 else x
                for name, x in given.items()}  # fmt: skip
        ours = int8_linear(**laid, out_dtype=out_dtype, **keywords)
        assert ours.shape == (n, f) and ours.dtype == out_dtype
        found.append((ours.flatten(), torchs.flatten(), want.flatten()))
    assert_twice_rule(*map(torch.cat, zip(*found, strict=True)))


@pytest.mark.parametrize("fill", FILLS)
def test_accumulators_are_exact_for_every_row_count(fill):
    for n in range(131):
        c, f = (1, 3, 37, 64, 65, 129)[n % 6], (1, 5, 7, 33, 64)[n % 5]
        x_q, w_q = make_codes(n, c, fill), make_codes(f, c, fill, seed=1)
        want = exact(x_q, w_q)
        acc = accumulate(x_q, w_q)
        assert acc.dtype == torch.int32 and torch.equal(acc.long(), want)
        assert torch.equal(int8_linear(x_q, 1.0, w_q, torch.ones(f)), want.float())


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("c", [0, 1, 1023, 1024, 1025, 3072, 4097])
def test_accumulators_are_exact_for_every_depth(c, fill):
    for n, f in ((1, 1), (1, 17), (2, 3), (13, 33)):
        x_q, w_q = make_codes(n, c, fill), make_codes(f, c, fill, seed=1)
        assert torch.equal(accumulate(x_q, w_q).long(), exact(x_q, w_q))
        assert torch.equal(int8_linear(x_q, 1.0, w_q, torch.ones(f)), exact(x_q, w_q).float())


def test_accumulators_are_exact_up_to_the_last_column_that_fits_int32():
    x_q = make_codes(2, MAX_COLUMNS, "all -128")
    assert accumulate(x_q, x_q).tolist() == [[128 * 128 * MAX_COLUMNS] * 2] * 2
    x_q[1] = 127
    assert torch.equal(accumulate(x_q, x_q).long(), exact(x_q, x_q))
    assert torch.equal(int8_linear(x_q, 1.0, x_q, torch.ones(2)), exact(x_q, x_q).float())


def test_accumulators_are_exact_inside_autocast_and_at_low_matmul_precision():
    x_q, w_q = make_codes(9, 2049), make_codes(7, 2049, seed=1)
    precision = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(accumulate(x_q, w_q).long(), exact(x_q, w_q))
                assert int8_linear(x_q, 1.0, w_q, torch.ones(7)).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (3, 7, 5), (33, 129, 65), (4, 768, 3072)]
)
def test_error_is_at_most_twice_torchs(shape, with_residual, activation, out_dtype):
    names = ("bias", "residual") if with_residual else ("bias",)
    assert_as_good_as_torch(*shape, names, out_dtype=out_dtype, activation=activation)


def test_the_epilogue_in_its_order():
    """Bias, then GELU, then the residual: hand-computed, one row and one column."""
    one = torch.tensor([[3]], dtype=torch.int8)
    y = int8_linear(
        one, 0.5, one, torch.tensor([0.25]), torch.tensor([-2.0]), "gelu", torch.tensor([[10.0]])
    )  # 3 · 3 · 0.5 · 0.25 − 2 = −0.875
    torch.testing.assert_close(y, torch.tensor([[10 - 0.875 * 0.190787]]), rtol=1e-6, atol=0)
    # acc · 2⁻⁷⁵ · 2⁻⁷⁵: the product of the two scales, taken first, would have been 0
    big = torch.full((1, 1100), 127, dtype=torch.int8)
    y = int8_linear(big, 2.0**-75, big, torch.tensor([2.0**-75]))
    assert y.item() == 1100 * 127 * 127 * 2.0**-150


@pytest.mark.parametrize("bias", FLOATS, ids=str)
@pytest.mark.parametrize("residual", FLOATS, ids=str)
def test_low_precision_bias_and_residual_are_added_in_float32(bias, residual):
    given = arguments(7, 33, 9)
    given["bias"], given["residual"] = given["bias"].to(bias), given["residual"].to(residual)
    with backend("torch") if torch.float16 in (bias, residual) else contextlib.nullcontext():
        assert torch.equal(int8_linear(**given), int8_linear(**in_dtype(given, torch.float32)))


@pytest.mark.parametrize(
    "out_scale", [0.05, torch.tensor(0.05), torch.linspace(0.01, 0.1, 9)], ids=["number", "[]", "[N]"]
)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_int8_out_is_quantize_of_the_float32_result(activation, out_scale):
    given = {**arguments(9, 65, 33), "activation": activation}
    y_q = int8_linear(**given, out_scale=out_scale)
    assert y_q.dtype == torch.int8
    assert torch.equal(y_q, quantize(int8_linear(**given), out_scale)[0])
    scale = torch.as_tensor(out_scale).double()
    ideal, _ = quantize(int8_linear_reference(**in_dtype(given, torch.float64)).float(), scale.float())
    assert (y_q.int() - ideal.int()).abs().max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_leaves_the_inputs_alone(layout):
    given = arguments(19, 37, 11)
    want = int8_linear(**given, activation="gelu")
    laid = {
        name: lay_out(x, layout) if x.dim() == 2 else lay_out(torch.stack([x, x]), layout)[0]
        for name, x in given.items()
    }
    for _ in range(3):
        found = int8_linear(**laid, activation="gelu")
        assert found.is_contiguous() and torch.equal(found, want)
    assert all(torch.equal(laid[name], given[name]) for name in given)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 20),
    c=st.integers(0, 90),
    f=st.integers(0, 20),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    activation=st.sampled_from([None, "gelu"]),
    given_names=st.sets(st.sampled_from(["bias", "residual"])),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(n, c, f, layouts, activation, given_names, seed):
    laid = dict(zip(("x_q", "w_q", "residual"), layouts, strict=True))
    assert_as_good_as_torch(n, c, f, given_names, seed, layouts=laid, activation=activation)


def test_one_scale_for_all_rows():
    given = arguments(5, 33, 9)
    given["x_scale"] = torch.full((5,), 0.02)
    want = int8_linear(**given)
    for scale in (0.02, torch.tensor(0.02)):
        assert torch.equal(int8_linear(**{**given, "x_scale": scale}), want)


def test_a_non_finite_row_leaves_the_others_exact():
    x = logits(4, 33)
    given = arguments(4, 33, 9)
    given["x_q"], given["x_scale"] = quantize(x)
    clean = int8_linear(**given)
    x[2, 5] = float("inf")
    given["x_q"], given["x_scale"] = quantize(x)
    y = int8_linear(**given)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_real_linear_layer_stays_close(bert):
    layer = bert.encoder.layer[0].intermediate.dense
    x = bert.embeddings(torch.tensor([[101, 7592, 2088, 102]]))[0]  # [N, C]
    w_q, w_scale = quantize(layer.weight)
    y = int8_linear(*quantize(x), w_q, w_scale, layer.bias, "gelu")
    want = torch.nn.functional.gelu(layer(x))
    assert not y.requires_grad
    assert torch.nn.functional.cosine_similarity(y, want).min() > 0.999


@on_any_tier
def test_registered_op():
    op = torch.ops.distilbert_fast.int8_linear_forward.default
    given = arguments(5, 7, 3)
    bias, residual = given.pop("bias").half(), given.pop("residual")
    given["x_q"] = lay_out(given["x_q"], "transposed")
    torch.library.opcheck(op, (*given.values(), None, False, None, None, torch.float32))
    laid = lay_out(residual, "strided_columns")
    torch.library.opcheck(op, (*given.values(), bias, True, laid, None, torch.bfloat16))
    torch.library.opcheck(op, (*given.values(), bias, True, laid, torch.tensor(0.1), torch.float32))


@on_any_tier
def test_compiles_whole_and_once_for_all_lengths():
    def layer(x, w_q, w_scale, bias):
        x_q, x_scale = quantize(x)
        y_q = int8_linear(x_q, x_scale, w_q, w_scale, bias, "gelu", out_scale=0.02)
        return int8_linear(y_q, 0.02, w_q, w_scale, bias, residual=x, out_dtype=torch.bfloat16)

    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    given = arguments(1, 33, 33)
    weights = given["w_q"], given["w_scale"], given["bias"].requires_grad_()
    for n in range(2, 12):
        x = logits(n, 33)
        assert torch.equal(compiled(x, *weights), layer(x, *weights))
    assert counter.frame_count == 1
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x, *weights), layer(x, *weights))


def test_fake_and_meta():
    with FakeTensorMode():
        x_q, w_q = torch.empty(3, 4, dtype=torch.int8), torch.empty(5, 4, dtype=torch.int8)
        y = int8_linear(x_q, torch.empty(3), w_q, torch.empty(5), out_dtype=torch.float16)
        assert y.shape == (3, 5) and y.dtype == torch.float16
        assert int8_linear(x_q, 0.5, w_q, torch.empty(5), out_scale=0.5).dtype == torch.int8
    x_q = torch.empty(3, 4, dtype=torch.int8, device="meta")
    assert int8_linear(x_q, 0.5, x_q, torch.empty(3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("n", [37, 700])  # the threads share the columns; the rows
def test_same_bits_in_every_run_and_on_any_number_of_threads(n):
    given, before = {**arguments(n, 193, 161), "activation": "gelu"}, torch.get_num_threads()
    try:
        want = int8_linear(**given)
        for run in range(50):
            torch.set_num_threads(1 + run % 3)
            assert torch.equal(int8_linear(**given), want)
    finally:
        torch.set_num_threads(before)


def test_scales_of_rows_may_have_any_stride():
    given = arguments(9, 33, 17)
    spread = torch.full((9, 3), float("nan"))
    spread[:, 1] = given["x_scale"]
    want = int8_linear(**given, out_scale=given["x_scale"])
    given["x_scale"] = spread[:, 1]
    assert torch.equal(int8_linear(**given, out_scale=spread[:, 1]), want)
    given["x_scale"], given["w_scale"] = torch.tensor(0.5).expand(9), torch.tensor(0.5).expand(17)
    assert torch.equal(int8_linear(**given), int8_linear(**{**given, "x_scale": 0.5}))


# The native entry ---------------------------------------------------------------------------------------------


def native_arguments(tensors, result, **changed):
    """Arguments of the native entry for the tensors of ``arguments``; the result goes to ``result``."""
    (n, c), f = tensors["x_q"].shape, tensors["w_q"].shape[0]
    blob, matches = _packed.packed_int8(tensors["w_q"])
    values = {
        "x": tensors["x_q"].data_ptr(), "x_row_stride": c, "x_column_stride": 1,
        "x_scale": tensors["x_scale"].data_ptr(), "x_scale_stride": 1,
        "kind": _packed.INT8_LAYOUT, "blob": blob.data_ptr(), "blob_bytes": blob.numel(),
        "scale": tensors["w_scale"].data_ptr(), "bias": tensors["bias"].data_ptr(),
        "rows": n, "columns": f, "k": c, "gelu": False,
        "residual": tensors["residual"].data_ptr(), "residual_stride": f, "residual_is_bfloat16": False,
        "out": result.data_ptr(), "output": {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}[result.dtype],
        "out_scale": tensors["x_scale"].data_ptr(), "out_scale_stride": 1, "matches": matches, "threads": 2,
    }  # fmt: skip
    assert set(changed) <= set(values)
    return list({**values, **changed}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("f", [1, 31, 32, 33, 70])
def test_nothing_beside_the_result_is_touched(native_tier, f, dtype):
    for n in (1, 13, 33, 48):
        given = arguments(n, 67, f)
        memory = torch.full((n * f + 2 * 37,), 99, dtype=dtype)  # 37: aligned to nothing
        out = memory[37:-37]
        backends.cpu().int8_linear(*native_arguments(given, out))
        keywords = {"out_scale": given["x_scale"]} if dtype == torch.int8 else {"out_dtype": dtype}
        assert torch.equal(out.view(n, f), int8_linear(**given, **keywords))
        assert (memory[:37] == 99).all() and (memory[-37:] == 99).all()


def test_the_result_may_take_the_residuals_place(native_tier):
    given = arguments(13, 67, 33)
    want, out = int8_linear(**given), given["residual"]
    backends.cpu().int8_linear(*native_arguments(given, out))
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "int8_linear: rows must be 0 or more, got -1"),
        (
            {"rows": 2**60},
            "int8_linear: rows · columns and rows · k must fit in 60 bits,"
            " got 1152921504606846976 rows, 33 columns, k 67",
        ),
        ({"columns": -1}, "pack: columns and k must be 0 or more, got -1 and 67"),
        ({"k": 2**31}, "pack: columns and k must fit in 31 bits, got 33 and 2147483648"),
        ({"kind": 1}, "int8_linear: weights must be 0 (int8) or 3 (codebook16), got 1"),
        ({"kind": 3}, "pack: columns must be a multiple of 4 and k one of 64 for codebook16, got 33 and 67"),
        ({"k": 129}, "int8_linear: packed weights must be of 13056 bytes, got 8960"),
        ({"blob_bytes": 7}, "int8_linear: packed weights must be of 8960 bytes, got 7"),
        ({"output": 3}, "int8_linear: output must be 0 (float32), 1 (bfloat16) or 2 (codes), got 3"),
        *(({name: -1}, f"int8_linear: {name} must be 0 or more, got -1")
          for name in ("x_row_stride", "x_column_stride", "x_scale_stride", "residual_stride", "out_scale_stride")),
        *(({name: 0}, f"int8_linear: {name} must point to memory, got null")
          for name in ("x", "x_scale", "scale", "out")),
        ({"blob": 0}, "int8_linear: packed weights must point to memory, got null"),
        ({"out_scale": 0, "output": 2}, "int8_linear: out_scale must point to memory, got null"),
    ],
)  # fmt: skip
def test_the_native_entry_refuses_before_touching_memory(native_tier, changed, message):
    out = torch.full((3, 33), 99.0)
    with pytest.raises(ValueError) as raised:
        backends.cpu().int8_linear(*native_arguments(arguments(3, 67, 33), out, **changed))
    assert str(raised.value) == message
    assert (out == 99).all()


def test_the_native_entry_refuses_matches_of_other_weights(native_tier):
    given, out = arguments(3, 67, 33), torch.full((3, 33), 99.0)
    blob, others = _packed.packed_int8(given["w_q"].clone())
    assert blob.data_ptr() != _packed.packed_int8(given["w_q"]).blob.data_ptr()
    with pytest.raises(ValueError, match="int8_linear: matches must be of these packed weights, got others"):
        backends.cpu().int8_linear(*native_arguments(given, out, matches=others))
    assert (out == 99).all()


@pytest.mark.parametrize("fill", FILLS)
def test_accumulators_are_exact_with_and_without_matches(native_tier, fill):
    """Which AVX2 alone has; made on one tier they are read, or not, on any."""
    given = arguments(40, 200, 70)
    given["x_q"], given["w_q"] = make_codes(40, 200, fill), make_codes(70, 200, fill, seed=1)
    found = [torch.empty(40, 70) for _ in range(2)]
    backends.cpu().int8_linear(*native_arguments(given, found[0]))
    backends.cpu().int8_linear(*native_arguments(given, found[1], matches=None))
    assert torch.equal(*found)


def test_no_rows_and_no_columns_touch_nothing(native_tier):
    nothing = dict.fromkeys(("x", "x_scale", "residual", "out", "out_scale"), 0)
    given, out = arguments(3, 67, 33), torch.empty(0)
    backends.cpu().int8_linear(*native_arguments(given, out, rows=0, **nothing))
    backends.cpu().int8_linear(*native_arguments(given, out, columns=0, blob=0, blob_bytes=0, **nothing))


def test_the_packer_refuses_before_touching_memory(native_tier):
    w, blob = make_codes(33, 67), torch.full((8960,), 99, dtype=torch.uint8)
    good = [0, w.data_ptr(), False, 67, 1, 0, 0, 0, 33, 67, blob.data_ptr(), 8960]
    for place, value, message in (
        (0, 4, "weights must be 0 (int8), 1 (bfloat16), 2 (float32) or 3 (codebook16), got 4"),
        (0, 3, "columns must be a multiple of 4 and k one of 64 for codebook16, got 33 and 67"),
        (1, 0, "weights must point to memory, got null"),
        (8, -1, "columns and k must be 0 or more, got -1 and 67"),
        (10, 0, "the blob must point to memory, got null"),
        (11, 8959, "the blob must be of 8960 bytes, got 8959"),
    ):
        with pytest.raises(ValueError) as raised:
            backends.cpu().pack_linear(*good[:place], value, *good[place + 1 :])
        assert str(raised.value) == f"pack: {message}"
    assert (blob == 99).all()


# Weights of few values ----------------------------------------------------------------------------------------


def coded(f, k, seed=0):
    """Codes uint8 [F, K] and tables int8 [F / 4, 16]; the weights int8 [F, K] that they make."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (f, k), dtype=torch.uint8, generator=g)
    tables = torch.randint(-128, 128, (f // 4, 16), dtype=torch.int8, generator=g)
    return codes, tables, tables.gather(1, codes.view(f // 4, 4 * k).long()).view(f, k)


def packed_codes(codes, tables):
    (f, k), module = codes.shape, backends.cpu()
    blob = torch.full((module.packed_bytes(3, f, k),), 99, dtype=torch.uint8)
    addresses = codes.data_ptr(), False, *codes.stride(), 0, 0, tables.data_ptr()
    module.pack_linear(3, *addresses, f, k, blob.data_ptr(), blob.numel())
    return blob


@pytest.mark.parametrize(("f", "k"), [(4, 64), (36, 192), (72, 640)])
def test_codes_of_16_values_give_the_bits_of_their_int8_weights(native_tier, f, k):
    codes, tables, w_q = coded(f, k)
    for laid_out in (codes, codes.t().contiguous().t()):
        blob = packed_codes(laid_out, tables)
        matches = backends.cpu().LayerMatches(3, blob.data_ptr(), blob.numel(), f, k)
        for n in (1, 4, 5, 12, 13, 100):
            given = arguments(n, k, f) | {"w_q": w_q}
            for fill in FILLS:
                given["x_q"] = make_codes(n, k, fill)
                memory = torch.full((n * f + 2 * 37,), 99.0)
                parts = dict(kind=3, blob=blob.data_ptr(), blob_bytes=blob.numel())
                for found in (matches, None):
                    arguments_ = native_arguments(given, memory[37:-37], **parts, matches=found)
                    backends.cpu().int8_linear(*arguments_)
                    assert torch.equal(memory[37:-37].view(n, f), int8_linear(**given))
                assert (memory[:37] == 99).all() and (memory[-37:] == 99).all()


def test_a_blob_of_codes_is_half_as_large():
    f, k = 768, 768
    int8, codes = (backends.cpu().packed_bytes(kind, f, k) for kind in (0, 3))
    assert int8 - codes == f * k // 2 - f // 4 * 16


def test_the_packer_of_codes_refuses():
    codes, tables, _ = coded(36, 64)
    blob = torch.zeros(backends.cpu().packed_bytes(3, 36, 64), dtype=torch.uint8)
    good = [3, codes.data_ptr(), False, 64, 1, 0, 0, tables.data_ptr(), 36, 64, blob.data_ptr(), blob.numel()]
    for place, value, message in (
        (7, 0, "tables must point to memory, got null"),
        (8, 35, "columns must be a multiple of 4 and k one of 64 for codebook16, got 35 and 64"),
        (9, 65, "columns must be a multiple of 4 and k one of 64 for codebook16, got 36 and 65"),
        (9, 2**17, "k must be at most 131071 for int32 to hold the sums of int8, got 131072"),
    ):
        with pytest.raises(ValueError) as raised:
            backends.cpu().pack_linear(*good[:place], value, *good[place + 1 :])
        assert str(raised.value) == f"pack: {message}"
    codes[35, 63] = 16
    with pytest.raises(ValueError, match="pack: codes must be below 16, got 16"):
        backends.cpu().pack_linear(*good)


# Packed weights -----------------------------------------------------------------------------------------------


def is_served(w_q: torch.Tensor) -> torch.Tensor:
    """The blob that serves w_q, after a look into it."""
    x_q = make_codes(5, w_q.shape[1], seed=7)
    assert torch.equal(int8_linear(x_q, 1.0, w_q, torch.ones(w_q.shape[0])), exact(x_q, w_q).float())
    return _packed.packed_int8(w_q).blob


def test_weights_are_packed_once(native_tier):
    w = make_codes(33, 67)
    blob = is_served(w)
    assert is_served(w) is blob
    stack = make_codes(6, 40).view(2, 3, 40)
    blobs = [is_served(view) for view in stack]
    assert [is_served(view) for view in stack] == blobs  # tensors: by identity first
    assert is_served(stack[0].t()) is not blobs[0]


def test_a_change_of_the_weights_is_seen(native_tier):
    w = make_codes(33, 67)
    blob = is_served(w)
    w[3, 5] ^= 1
    assert is_served(w) is not blob
    stack = make_codes(6, 40).view(2, 3, 40)
    blobs = [is_served(view) for view in stack]
    stack[1].add_(1)  # a change of a view, seen through another
    assert is_served(stack[1]) is not blobs[1]
    w.detach().zero_()
    assert not int8_linear(make_codes(5, 67), 1.0, w, torch.ones(33)).any()


def test_other_memory_under_the_same_tensor_is_seen(native_tier):
    layer = torch.nn.Parameter(make_codes(33, 64), requires_grad=False)
    for seed in range(20):  # memory that was freed is soon given out again
        is_served(layer)
        layer.data = make_codes(33, 64, seed=seed)
        layer.data = make_codes(33, 64, seed=seed + 100)
    is_served(layer)


def test_packed_weights_die_with_their_tensor(native_tier):
    gc.collect()
    before = len(_packed._packs)
    w = make_codes(6, 40).view(2, 3, 40)
    is_served(w[0])
    is_served(w[1])
    assert len(_packed._packs) == before + 1
    del w
    gc.collect()
    assert len(_packed._packs) == before


def test_few_views_of_a_tensor_are_remembered(native_tier):
    w = make_codes(200, 8)
    for start in range(190):
        is_served(w[start : start + 10])
    assert len(_packed._packs[w]) == _packed._VIEWS
    w += 1
    is_served(w)
    assert len(_packed._packs[w]) == 1


def test_inference_tensors_are_packed_every_time(native_tier):
    with torch.inference_mode():
        w = make_codes(33, 67)
        is_served(w)
        w[3, 5] ^= 1
        is_served(w)
        assert w not in _packed._packs


def test_threads_share_packed_weights(native_tier):
    weights = [make_codes(33, 67, seed=seed) for seed in range(4)]
    x_q, failures = make_codes(5, 67, seed=7), []

    def work(start):
        for i in range(60):
            w = weights[(start + i) % 4]
            if i == 30 + start:
                with lock:  # a change between the calls of others
                    w.view(-1)[start] ^= 1
            with lock:
                want = exact(x_q, w).float()
                found = int8_linear(x_q, 1.0, w, torch.ones(33))
            if not torch.equal(found, want):
                failures.append((start, i))

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


X = torch.ones(2, 4, dtype=torch.int8)
W = torch.ones(3, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x_q": X.float()}, TypeError, "x_q must be int8, got float32"),
        ({"x_q": X[0]}, ValueError, "x_q must be of shape [N, C], got [4]"),
        (
            {"x_q": torch.empty(2, 131072, dtype=torch.int8)},
            ValueError,
            "x_q must be of at most 131071 columns, for int32 to hold their sum, got [2, 131072]",
        ),
        ({"x_scale": None}, TypeError, "x_scale must be a number, got NoneType"),
        ({"x_scale": 0.0}, ValueError, "x_scale must be finite and above 0, got 0.0"),
        ({"x_scale": torch.ones(3)}, ValueError, "x_scale must be of shape [] or [2], got [3]"),
        ({"w_q": torch.ones(3, 5, dtype=torch.int8)}, ValueError, "w_q must be of shape [F, 4], got [3, 5]"),
        ({"w_q": W.to(torch.uint8)}, TypeError, "w_q must be int8, got uint8"),
        ({"w_q": W.to("meta")}, ValueError, "w_q must be on cpu, got meta"),
        ({"w_scale": 0.5}, TypeError, "w_scale must be a tensor, got float"),
        ({"w_scale": torch.ones(())}, ValueError, "w_scale must be of shape [3], got []"),
        ({"w_scale": torch.ones(3).half()}, TypeError, "w_scale must be float32, got float16"),
        ({"bias": torch.ones(2)}, ValueError, "bias must be of shape [3], got [2]"),
        ({"bias": torch.ones(3).double()}, TypeError, "bias must be float32 or bfloat16 or float16, got float64"),
        ({"activation": "relu"}, ValueError, "activation must be one of None, 'gelu', got 'relu'"),
        ({"residual": torch.ones(2, 4)}, ValueError, "residual must be of shape [2, 3], got [2, 4]"),
        ({"out_scale": float("inf")}, ValueError, "out_scale must be finite and above 0, got inf"),
        ({"out_scale": torch.ones(3)}, ValueError, "out_scale must be of shape [] or [2], got [3]"),
        (
            {"out_dtype": torch.int8},
            ValueError,
            "out_dtype must be one of torch.float32, torch.bfloat16, torch.float16, got torch.int8",
        ),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error) as raised:
        int8_linear(**{"x_q": X, "x_scale": 0.5, "w_q": W, "w_scale": torch.ones(3), **changed})
    assert str(raised.value) == f"int8_linear: {message}"
