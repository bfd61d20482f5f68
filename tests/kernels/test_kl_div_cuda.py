"""The logic of csrc/cuda/kl_div.cu without a GPU: compiled for the CPU by cuda_on_cpu/, behind the real bindings
and the real call in ops/kl_div.py. What a GPU does with it (speed, memory, rounding) is not seen here.
"""

from __future__ import annotations

import re

import pytest
import torch

from distilbert_fast.ops import _rows
from distilbert_fast.ops import kl_div as op
from distilbert_fast.testing import assert_twice_rule, lay_out, logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(cuda_on_cpu):
    cuda_on_cpu.emulated_set_max_blocks(3)
    return cuda_on_cpu


def run(student, teacher, temperature=1.0, mask=None, mean=True):
    """Row losses, the gradient of the forward pass, and that of the backward pass from saved statistics."""
    arguments = (student, teacher, mask, temperature, mean)
    rows, gradient = op._forward_cuda(op.Call(*arguments, "gradient"))
    rows_again, stats = op._forward_cuda(op.Call(*arguments, "stats"))
    rows_alone, _ = op._forward_cuda(op.Call(*arguments, "none"))
    assert torch.equal(rows, rows_again) or rows.isnan().any()
    assert torch.equal(rows, rows_alone) or rows.isnan().any()
    drows = torch.ones(student.shape[0]) / (_rows.count(rows, mask) if mean else 1)
    return rows, gradient, op._backward_cuda(op.Gradient(student, teacher, mask, drows, stats, temperature))


def exact(student, teacher, temperature=1.0, mask=None, mean=True):
    rows, gradient = op._forward_torch(op.Call(student.double(), teacher.double(), mask, temperature, mean, "gradient"))
    return rows, gradient


def check(student, teacher, temperature=1.0, mask=None, mean=True):
    rows, gradient, recomputed = run(student, teacher, temperature, mask, mean)
    torchs_rows, torchs_gradient = op._forward_torch(op.Call(student, teacher, mask, temperature, mean, "gradient"))
    exact_rows, exact_gradient = exact(student, teacher, temperature, mask, mean)
    assert_twice_rule(rows, torchs_rows, exact_rows, "loss")
    assert_twice_rule(gradient, torchs_gradient, exact_gradient, "gradient")
    assert_twice_rule(recomputed, torchs_gradient, exact_gradient, "recomputed gradient")


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("student_dtype", DTYPES)
def test_dtypes(student_dtype, teacher_dtype):
    check(logits(5, 1003, student_dtype), logits(5, 1003, teacher_dtype, seed=1), temperature=2.0)


# One column; around a warp; around kAtOnce · 32; around the largest block; DistilBERT's own.
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, 30522])
def test_columns(columns):
    check(logits(2, columns), logits(2, columns, seed=1), temperature=1.5)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 8.0, 1e4])
def test_temperatures(temperature):
    check(logits(3, 500), logits(3, 500, seed=1), temperature)


@pytest.mark.parametrize("mean", [True, False])
def test_more_rows_than_blocks_with_a_mask(mean):
    mask = torch.arange(11) % 3 != 0
    check(logits(11, 300), logits(11, 300, seed=1), 2.0, mask, mean)


def test_all_rows_masked_out():
    rows, gradient, recomputed = run(
        logits(4, 70), logits(4, 70, seed=1), 2.0, torch.zeros(4, dtype=torch.bool), mean=True
    )
    assert not rows.any() and not gradient.any() and not recomputed.any()


def test_zero_rows():
    rows, gradient, recomputed = run(logits(0, 70), logits(0, 70), 2.0)
    assert rows.shape == (0,) and gradient.shape == recomputed.shape == (0, 70)


@pytest.mark.parametrize("layout", ["strided_rows", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    student, teacher = logits(4, 333, dtype), logits(4, 333, dtype, seed=1)
    laid_out = run(lay_out(student, layout), lay_out(teacher, "strided_rows"), 2.0)
    for ours, contiguous in zip(laid_out, run(student, teacher, 2.0), strict=True):
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("column", [0, 299])
def test_a_non_finite_logit_spoils_its_row_only(bad, side, column):
    clean = {"student": logits(3, 300), "teacher": logits(3, 300, seed=1)}
    spoilt = {name: x.clone() for name, x in clean.items()}
    spoilt[side][1, column] = bad
    others = torch.tensor([0, 2])
    for ours, expected in zip(run(**spoilt), run(**clean), strict=True):
        assert torch.equal(ours[others], expected[others])
    assert not run(**spoilt)[0][1].isfinite()


def test_rows_of_minus_infinity_are_not_finite():
    student, teacher = logits(3, 300), logits(3, 300, seed=1)
    student[0], teacher[2] = -float("inf"), -float("inf")
    rows, _, _ = run(student, teacher)
    assert rows.isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("rising", [True, False])
def test_far_apart_logits(rising):
    """Maxima that grow by thousands from step to step, each side its own way, and a common offset."""
    x = torch.linspace(-3000, 3000, 9001).sort(descending=not rising).values
    noise = logits(1, 9001, spread=1.0)[0]
    check(torch.stack([x, noise + 1e4, x]), torch.stack([noise, noise.flip(0) + 1e4, x.flip(0)]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_vocabularies_masked_with_the_lowest_float(temperature):
    student, teacher = logits(3, 1003), logits(3, 1003, seed=1)
    teacher[:, :334] = student[:, 167:250] = torch.finfo(torch.float32).min
    check(student, teacher, temperature)


def test_equal_logits_have_no_loss():
    x = logits(3, 30522)
    rows, gradient, _ = run(x, x.clone())
    assert not rows.any()
    assert gradient.abs().max() < 1e-7


def test_device_and_stream(cuda_module, emulated):
    x, rows = logits(2, 40), torch.empty(2)
    call = (x.data_ptr(), x.data_ptr(), 40, 40, 0, 0, 0, 2, 40, 1.0, 0, rows.data_ptr(), 0, 0)
    cuda_module.kl_div_forward(*call, 1, 0x1234)
    assert emulated.emulated_launch_device() == 1
    assert emulated.emulated_launch_stream() == 0x1234
    assert emulated.emulated_device() == 0
    with pytest.raises(RuntimeError, match=r"^kl_div: cudaSetDevice: invalid device ordinal$"):
        cuda_module.kl_div_forward(*call, 7, 0)
    assert emulated.emulated_device() == 0


LOGITS = dict(student=64, teacher=64, student_stride=8, teacher_stride=8, student_dtype=0, teacher_dtype=0)
LOGITS |= dict(mask=0, rows=2, columns=8, temperature=1.0)
FORWARD = LOGITS | dict(scale=64, loss=64, stats=64, gradient=64, device=0, stream=0)
BACKWARD = LOGITS | dict(dloss=64, stats=64, gradient=64, device=0, stream=0)
BOTH = [
    ("rows", -1, "rows must be 0 or more, got -1"),
    ("columns", 0, "columns must be 1 or more, got 0"),
    ("student_stride", -8, "student_stride must be 0 or more, got -8"),
    ("teacher_stride", -8, "teacher_stride must be 0 or more, got -8"),
    ("student_dtype", 3, "student_dtype must be 0, 1 or 2, got 3"),
    ("teacher_dtype", -1, "teacher_dtype must be 0, 1 or 2, got -1"),
    ("temperature", 0.0, "temperature must be finite and above 0, got 0.000000"),
    ("temperature", -2.0, "temperature must be finite and above 0, got -2.000000"),
    ("temperature", float("inf"), "temperature must be finite and above 0, got inf"),
    ("temperature", float("nan"), "temperature must be finite and above 0, got nan"),
    ("student", 0, "student must point to logits, got null"),
    ("teacher", 0, "teacher must point to logits, got null"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [*BOTH, ("loss", 0, "loss must point to memory, got null"),
     ("scale", 0, "scale must point to a number where a gradient is wanted, got null")],
)  # fmt: skip
def test_forward_refuses(cuda_module, name, value, message):
    with pytest.raises(ValueError, match=f"^kl_div: {re.escape(message)}$"):
        cuda_module.kl_div_forward(*(FORWARD | {name: value}).values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *BOTH,
        *((name, 0, f"{name} must point to memory, got null") for name in ("dloss", "stats", "gradient")),
    ],
)
def test_backward_refuses(cuda_module, name, value, message):
    with pytest.raises(ValueError, match=f"^kl_div: {re.escape(message)}$"):
        cuda_module.kl_div_backward(*(BACKWARD | {name: value}).values())
