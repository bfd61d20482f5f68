"""int8_linear: exact accumulators, the epilogue, its edge cases, the doors it is reached through, its messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from distilbert_fast.ops.int8_linear import MAX_COLUMNS, accumulate, int8_linear, int8_linear_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FILLS = ("random", "all 127", "all -128", "alternating")


def make_codes(rows: int, c: int, fill: str = "random", seed: int = 0) -> torch.Tensor:
    """int8 [rows, c] from all 256 values, or one of the extremes at which saturating instructions go wrong."""
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


@pytest.mark.parametrize("fill", FILLS)
def test_accumulators_are_exact_for_every_row_count(fill):
    for n in range(131):
        c, f = (1, 3, 37, 64, 65, 129)[n % 6], (1, 5, 7, 33)[n % 4]
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


def test_accumulators_are_exact_up_to_the_last_column_that_fits_int32():
    x_q = make_codes(2, MAX_COLUMNS, "all -128")
    assert accumulate(x_q, x_q).tolist() == [[128 * 128 * MAX_COLUMNS] * 2] * 2
    x_q[1] = 127
    assert torch.equal(accumulate(x_q, x_q).long(), exact(x_q, x_q))


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


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (3, 7, 5), (33, 129, 65), (4, 768, 3072)]
)
def test_error_is_at_most_twice_torchs(shape, with_residual, activation, out_dtype):
    given = {**arguments(*shape), "activation": activation}
    if not with_residual:
        del given["residual"]
    want = int8_linear_reference(**in_dtype(given, torch.float64))
    torchs = int8_linear_reference(**given).to(out_dtype)
    found = int8_linear(**given, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    assert_twice_rule(found, torchs, want)


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


@settings(max_examples=60, deadline=None)
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
    given = arguments(n, c, f, seed)
    given["x_q"], given["w_q"] = lay_out(given["x_q"], layouts[0]), lay_out(given["w_q"], layouts[1])
    given["residual"] = lay_out(given["residual"], layouts[2])
    kept = {name: x for name, x in given.items() if name not in {"bias", "residual"} - given_names}
    want = int8_linear_reference(**in_dtype(kept, torch.float64), activation=activation)
    torchs = int8_linear_reference(**kept, activation=activation)
    assert_twice_rule(int8_linear(**kept, activation=activation), torchs, want)


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


def test_registered_op():
    op = torch.ops.distilbert_fast.int8_linear_forward.default
    given = arguments(5, 7, 3)
    bias, residual = given.pop("bias").half(), given.pop("residual")
    given["x_q"] = lay_out(given["x_q"], "transposed")
    torch.library.opcheck(op, (*given.values(), None, False, None, None, torch.float32))
    laid = lay_out(residual, "strided_columns")
    torch.library.opcheck(op, (*given.values(), bias, True, laid, None, torch.bfloat16))
    torch.library.opcheck(op, (*given.values(), bias, True, laid, torch.tensor(0.1), torch.float32))


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
