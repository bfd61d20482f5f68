"""kernels/kl_div.py through the public function, on a CUDA device or in Triton's interpreter.

Without a device this module is skipped here and run by test_interpreter.py. The interpreter checks the logic; its
bfloat16 stores truncate where a GPU rounds, which the bound on errors still covers.
"""

from __future__ import annotations

import os

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.kl_div import kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import kl_div as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: −inf − −inf
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
both_modes = pytest.mark.parametrize("recompute", [False, True], ids=["gradient_kept", "recomputed"])
V = 30522


def pair(n, v, dtype=torch.float32, teacher_dtype=None, device=DEVICE):
    return logits(n, v, dtype, seed=1, device=device), logits(n, v, teacher_dtype or dtype, seed=2, device=device)


def gradient(function, student, *args, upstream=None, **kwargs):
    """Loss and gradient of the student, whose memory layout is kept."""
    student = student.detach().requires_grad_()
    loss = function(student, *args, **kwargs)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), student.grad


def triton(student, teacher, *args, **kwargs):
    with distilbert_fast.backend("triton"):
        return gradient(distilbert_fast.kl_div, student, teacher, *args, **kwargs)


def check(student, teacher, *args, recompute=False, **kwargs):
    """Loss and gradient follow the rule of twice torch's error, and the inputs stay as they were."""
    before = [x.clone() for x in (student, teacher)]
    ours = triton(student, teacher, *args, recompute=recompute, **kwargs)
    assert all(torch.equal(x, y) for x, y in zip(before, (student, teacher), strict=True))
    torchs = gradient(kl_div_reference, student, teacher, *args, **kwargs)
    exact = gradient(kl_div_reference, student.double(), teacher.double(), *args, **kwargs)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == student.dtype
    assert_twice_rule(ours[0], torchs[0], exact[0], "loss")
    assert_twice_rule(ours[1], torchs[1], exact[1], "gradient")
    return ours


@both_modes
@pytest.mark.parametrize("n, v", [(1, 1), (3, 7), (4, 8), (5, 515), (2, 4103), (5, V)])
def test_shapes(n, v, recompute):
    check(*pair(n, v), 2.0, reduction="none", recompute=recompute)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_modes
def test_dtypes(dtype, teacher_dtype, recompute):
    check(*pair(3, 1003, dtype, teacher_dtype), 2.0, recompute=recompute)


def test_every_configuration():
    student, teacher = pair(1, V, torch.bfloat16)
    candidates = kernels.configurations(student, teacher, student)
    assert sorted({config["num_warps"] for config in candidates}) == [8, 16, 32]
    for config in candidates:
        with tuning.choosing(lambda kernel, key, candidates, config=config: config):
            check(student, teacher, 2.0)
            check(student, teacher, 2.0, recompute=True)


def test_every_width_at_every_alignment():
    """Rows shorter than, as long as and longer than an aligned group of 8, starting at each of its 8 places."""
    for v in (1, 3, 5, 7, 9, 11, 15, 17, 23):
        check(*pair(8, v, torch.bfloat16), reduction="none")


@pytest.mark.parametrize("teacher_layout", ["contiguous", "strided_rows", "misaligned"])
@pytest.mark.parametrize("student_layout", LAYOUTS)
def test_layouts(student_layout, teacher_layout):
    student, teacher = pair(2, 517)
    loss, dstudent = triton(student, teacher, 2.0)
    for recompute in (False, True):
        student, teacher = lay_out(student, student_layout), lay_out(teacher, teacher_layout)
        ours = triton(student, teacher, 2.0, recompute=recompute)
        torch.testing.assert_close(ours[0], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[1], dstudent, rtol=1e-5, atol=1e-8)


def test_one_teacher_row_for_all():
    student, teacher = pair(3, 100)
    check(student, teacher[:1].expand(3, -1))


@both_modes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_with_mask_and_upstream_gradient(reduction, recompute):
    student, teacher = pair(6, 261)
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    student[~mask], teacher[~mask] = 7.0, float("nan")  # what does not count may be anything
    upstream = torch.randn(6 if reduction == "none" else (), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ours = triton(student, teacher, 3.0, mask, reduction, recompute, upstream=upstream)
    teacher[~mask] = 0.0
    torchs = gradient(kl_div_reference, student, teacher, 3.0, mask, reduction, upstream=upstream)
    exact = gradient(kl_div_reference, student.double(), teacher.double(), 3.0, mask, reduction, upstream=upstream)
    assert_twice_rule(ours[0], torchs[0], exact[0], "loss")
    assert_twice_rule(ours[1], torchs[1], exact[1], "gradient")
    assert (ours[1][~mask] == 0).all()


@both_modes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_masked(reduction, recompute):
    student, teacher = pair(3, 50)
    mask = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    loss, dstudent = triton(student, teacher, 2.0, mask, reduction, recompute)
    assert (loss == 0).all() and (dstudent == 0).all()


@both_modes
def test_strided_mask(recompute):
    student, teacher = pair(4, 50)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool, device=DEVICE)[::2]
    strided = triton(student, teacher, 2.0, mask, recompute=recompute)
    plain = triton(student, teacher, 2.0, mask.clone(), recompute=recompute)
    assert torch.equal(strided[0], plain[0]) and torch.equal(strided[1], plain[1])


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_rows_with_a_non_finite_logit(value, side):
    student, teacher = pair(5, 1003)
    clean = triton(student, teacher, 2.0, reduction="none")
    for row, column in [(1, 0), (2, 700), (3, 1002)]:  # in the head, the body and the tail of a row
        (student if side == "student" else teacher)[row, column] = value
    for recompute in (False, True):
        loss, dstudent = triton(student, teacher, 2.0, reduction="none", recompute=recompute)
        assert loss.isfinite().tolist() == [True, False, False, False, True]
        assert torch.equal(loss[::4], clean[0][::4]) and torch.equal(dstudent[::4], clean[1][::4])


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_masked_by_the_lowest_number(dtype, recompute):
    student, teacher = pair(3, 1003, dtype)
    teacher[:, 300:] = torch.finfo(dtype).min
    student[:, 600:] = torch.finfo(dtype).min
    check(student, teacher, reduction="none", recompute=recompute)


@both_modes
def test_common_offsets_cost_no_accuracy(recompute):
    student, teacher = pair(3, 1003)
    check(student + 1000, teacher - 500, 2.0, reduction="none", recompute=recompute)


def test_a_student_close_to_its_teacher():
    student, teacher = pair(16, 1003)
    check(student, student + teacher / 1000, 2.0)


def test_a_student_equal_to_its_teacher():
    student, _ = pair(3, 1003)
    loss, dstudent = triton(student, student.clone(), 2.0, reduction="none")
    assert (loss == 0).all() and (dstudent == 0).all()


@pytest.mark.parametrize("temperature", [0.1, 1, 20.0])
def test_temperatures(temperature):
    check(*pair(3, 517), temperature)


def test_no_rows():
    student, teacher = pair(0, 7)
    mask = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    for recompute in (False, True):
        loss, dstudent = triton(student, teacher, mask=mask, recompute=recompute)
        assert loss == 0 and dstudent.shape == (0, 7)


@both_modes
def test_same_bits_every_run(recompute):
    student, teacher = pair(2, 5000, torch.bfloat16)
    runs = [triton(student, teacher, 2.0, recompute=recompute) for _ in range(3)]
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)


def test_both_modes_give_the_same_gradient():
    student, teacher = pair(2, 5000)
    kept, recomputed = (triton(student, teacher, 2.0, reduction="sum", recompute=mode) for mode in (False, True))
    assert torch.equal(kept[1], recomputed[1])


@both_modes
def test_backward_twice(recompute):
    student, teacher = pair(2, 100)
    once = triton(student, teacher, recompute=recompute)[1]
    student.requires_grad_()
    with distilbert_fast.backend("triton"):
        loss = distilbert_fast.kl_div(student, teacher, recompute=recompute)
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(student.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [(3.0, 1.0), (1.0, 0.25), (0.0,), (float("nan"), 2.0)], ids=str)
def test_other_upstream_gradients(factors, dtype):
    """The kept gradient is multiplied where it is; what a backward gave stays as it was when another follows."""
    student, teacher = pair(3, 515, dtype)
    student.requires_grad_()
    one = triton(student, teacher, 2.0)[1].double()
    with distilbert_fast.backend("triton"):
        loss = distilbert_fast.kl_div(student, teacher, 2.0)
    found = []
    for factor in factors:
        upstream = torch.tensor(factor, device=DEVICE)
        with distilbert_fast.backend("triton"):
            found.append(torch.autograd.grad(loss, student, upstream, retain_graph=True)[0])
    for factor, x in zip(factors, found, strict=True):
        want = factor * one if all(factor == factor for factor in factors) else torch.full_like(one, float("nan"))
        torch.testing.assert_close(x.double(), want, rtol=torch.finfo(dtype).eps * 2, atol=1e-12, equal_nan=True)


@both_modes
def test_upstream_gradient_of_stride_zero(recompute):
    student, teacher = pair(3, 100)
    student.requires_grad_()
    with distilbert_fast.backend("triton"):
        distilbert_fast.kl_div(student, teacher, reduction="none", recompute=recompute).sum().backward()
    assert torch.equal(student.grad, triton(student, teacher, reduction="sum", recompute=recompute)[1])


def test_forced_by_environment(monkeypatch):
    calls = []
    launch = kernels.kl_div_fwd
    monkeypatch.setattr(kernels, "kl_div_fwd", lambda *args: (calls.append(1), launch(*args)))
    monkeypatch.setenv("DISTILBERT_FAST_BACKEND", "triton")
    student, teacher = pair(2, 9)
    distilbert_fast.kl_div(student, teacher)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_outside_the_outputs_is_written(dtype, masked):
    """Outputs lie inside buffers of a sentinel: rows, statistics and gradients with gaps between their rows."""
    n, v, sentinel = 5, 1003, 77.0
    student, teacher = pair(n, v, dtype)
    mask = torch.arange(n, device=DEVICE) % 2 == 0 if masked else None
    scale = torch.ones((), device=DEVICE)

    def room(rows, columns, kind, left, right):
        whole = torch.full((rows + 2, left + columns + right), sentinel, dtype=kind, device=DEVICE)
        return whole, whole[1:-1, left : left + columns]

    all_rows, rows = room(1, n, torch.float32, 3, 3)
    all_stats, stats = room(n, 4, torch.float32, 0, 0)
    for left, right in [(0, 0), (8, 5), (3, 2)]:
        all_gradient, dstudent = room(n, v, dtype, left, right)
        all_again, again = room(n, v, dtype, left, right)
        kernels.kl_div_fwd(student, teacher, mask, scale, 2.0, rows[0], stats, dstudent)
        kernels.kl_div_bwd(student, teacher, mask, torch.ones(n, device=DEVICE), stats, 2.0, again)
        assert torch.equal(dstudent, again)
        assert (dstudent[1] == 0).all() == masked and not (dstudent[0] == 0).any()
        for whole, inside in [(all_gradient, dstudent), (all_again, again), (all_stats, stats), (all_rows, rows)]:
            assert not (inside == sentinel).any()
            inside.fill_(sentinel)
            assert (whole == sentinel).all()


def far_rows(path):
    """Three rows of V bfloat16, places 0, 35,200 and 70,400 of a matrix: int32 holds their distance, not its double."""
    stride = 35_200 * V
    if DEVICE == "cuda":
        whole = torch.zeros(2 * stride + V, dtype=torch.bfloat16, device=DEVICE)
    else:
        whole = torch.from_file(str(path), shared=True, size=2 * stride + V, dtype=torch.bfloat16)  # sparse: no memory
        os.unlink(path)
    return whole.as_strided((3, V), (stride, 1))


@pytest.mark.parametrize("far", ["student", "teacher", "gradient"])
def test_offsets_past_int32(tmp_path, far):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    student, teacher = pair(3, V, torch.bfloat16)
    expected = triton(student, teacher, 2.0, reduction="none")
    tensors = {"student": student, "teacher": teacher, "gradient": torch.empty_like(student)}
    tensors[far] = far_rows(tmp_path / far).copy_(tensors[far])
    student, teacher, dstudent = tensors.values()
    rows, stats, ones = (torch.ones(shape, device=DEVICE) for shape in [(3,), (3, 4), (3,)])
    kernels.kl_div_fwd(student, teacher, None, torch.ones((), device=DEVICE), 2.0, rows, stats, dstudent)
    torch.testing.assert_close((rows, dstudent), expected)
    dstudent.fill_(float("nan"))
    kernels.kl_div_bwd(student, teacher, None, ones, stats, 2.0, dstudent)
    torch.testing.assert_close(dstudent, expected[1])


@pytest.mark.gpu
@needs_gpu
def test_more_rows_than_a_grid_dimension_of_65535():
    student, teacher = pair(70_401, 3)
    loss, dstudent = triton(student, teacher, 2.0, reduction="none")
    last = triton(student[-2:], teacher[-2:], 2.0, reduction="none")
    assert torch.equal(loss[-2:], last[0]) and torch.equal(dstudent[-2:], last[1])


@pytest.mark.gpu
@needs_gpu
@both_modes
def test_on_a_side_stream(recompute):
    student, teacher = pair(64, V)
    expected = triton(student, teacher, 2.0, recompute=recompute)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream does not wait for this
        late = student + 0
        ours = triton(late, teacher, 2.0, recompute=recompute)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.gpu
@needs_gpu
@both_modes
def test_inside_a_cuda_graph(recompute):
    static, teacher = pair(64, V, torch.bfloat16)
    mask = torch.arange(64, device=DEVICE) % 3 > 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton(static, teacher, 2.0, mask, recompute=recompute)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton(static, teacher, 2.0, mask, recompute=recompute)
    other = logits(64, V, torch.bfloat16, seed=9, device=DEVICE)
    static.copy_(other)
    graph.replay()
    expected = triton(other, teacher, 2.0, mask, recompute=recompute)
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    expected = triton(*pair(3, 1003), 2.0)
    ours = triton(*pair(3, 1003, device="cuda:1"), 2.0)
    assert ours[1].device.index == 1
    assert torch.equal(ours[0].to(DEVICE), expected[0]) and torch.equal(ours[1].to(DEVICE), expected[1])
