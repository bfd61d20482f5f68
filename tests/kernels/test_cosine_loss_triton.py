"""kernels/cosine_loss.py through the public function, on a CUDA device or in Triton's interpreter.

The interpreter checks the logic; its bfloat16 stores truncate where a GPU rounds, which the bound on errors still
covers.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from distilbert_fast import backends, cosine_loss
from distilbert_fast.ops.cosine_loss import EPSILON, cosine_loss_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import cosine_loss as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import tuning  # noqa: E402
from distilbert_fast.kernels.common import row_configs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: ∞ · 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Many rows where they are short: of a few numbers, torch is at times exact by luck.
SHAPES = [(0, 5), (1030, 1), (301, 2), (99, 7), (1, 33), (67, 33), (5, 768), (2, 3001)]


def pair(n, c, dtype=torch.float32, teacher_dtype=None, seed=0):
    """Hidden states of a student and of a teacher that half agrees with it."""
    student, teacher = logits(n, c, torch.float64, seed, 1.0), logits(n, c, torch.float64, seed + 1, 1.0)
    return student.to(DEVICE, dtype), (student + teacher).to(DEVICE, teacher_dtype or dtype)


def torchs(student, teacher, mask=None, reduction="mean"):
    """torch.nn.CosineEmbeddingLoss with target 1."""
    return F.cosine_embedding_loss(student, teacher, torch.ones_like(student[:, 0]), reduction=reduction)


def results(function, student, teacher, *arguments, dloss=None, **keywords):
    """Loss and gradient."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *arguments, **keywords)
    upstream = torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def triton(*arguments, **keywords):
    with distilbert_fast.backend("triton"):
        return results(cosine_loss, *arguments, **keywords)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape, dtype, teacher_dtype):
    student, teacher = pair(*shape, dtype, teacher_dtype)
    before = student.clone(), teacher.clone()
    ours = triton(student, teacher, reduction="none")
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, dtype) and ours[1].is_contiguous()
    same_dtype = results(torchs, student, teacher.to(dtype), reduction="none")
    exact = results(torchs, student.double(), teacher.double(), reduction="none")
    cosines = [1 - loss for loss, _ in (ours, same_dtype, exact)]  # which are rounded, not what 1 leaves of them
    assert_twice_rule(*cosines, "cosine")
    assert_twice_rule(*(gradient for _, gradient in (ours, same_dtype, exact)), "gradient")


def test_rows_without_columns():
    loss, gradient = triton(*pair(5, 0), reduction="none")
    assert (loss == 1).all() and gradient.shape == (5, 0)


@pytest.mark.parametrize("teacher_layout", ["contiguous", "strided_rows", "misaligned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, teacher_layout):
    student, teacher = pair(5, 37)
    want = triton(student, teacher)
    found = triton(lay_out(student, layout), lay_out(teacher, teacher_layout))
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_one_teacher_row_for_all():
    student, teacher = pair(3, 100)
    one = teacher[:1].expand(3, -1)
    for x, y in zip(triton(student, one), triton(student, one.clone()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_and_upstream_gradients(reduction):
    """What does not count, NaN here, reaches nothing, even where its upstream gradient is infinite."""
    student, teacher = pair(9, 33)
    wide = torch.arange(18, device=DEVICE) % 3 != 1
    for mask in (wide[:9], wide[::2], wide[:1].expand(9)):
        student[~mask], teacher[~mask] = math.nan, math.inf
        dloss = logits(9, 1, seed=7, device=DEVICE)[:, 0]
        dloss[~mask] = math.inf
        dloss = dloss if reduction == "none" else torch.tensor(3.0, device=DEVICE)
        loss, gradient = triton(student, teacher, mask, reduction, dloss=dloss)
        counted = student[mask].double(), teacher[mask].double(), None, reduction
        want, dwant = results(cosine_loss_reference, *counted, dloss=dloss[mask] if reduction == "none" else dloss)
        torch.testing.assert_close(loss[mask] if reduction == "none" else loss, want.float())
        torch.testing.assert_close(gradient[mask], dwant.float(), rtol=1e-5, atol=1e-6)
        assert (gradient[~mask] == 0).all() and (reduction != "none" or (loss[~mask] == 0).all())
        student, teacher = pair(9, 33)
    nothing = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    loss, gradient = triton(student, teacher, nothing, reduction)
    assert (loss == 0).all() and (gradient == 0).all()


def test_zero_rows_and_rows_so_short_that_epsilon_decides():
    student, teacher = pair(8, 5)
    student[1], teacher[2], student[3], teacher[3] = 0, 0, 0, 0
    student[4] *= 1e-7
    teacher[5] *= 1e-8
    student[6], teacher[7] = teacher[6], -student[7]
    loss, gradient = triton(student, teacher, reduction="none")
    want, dwant = results(cosine_loss_reference, student.double(), teacher.double(), reduction="none")
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=3e-7)
    torch.testing.assert_close(gradient, dwant.float(), rtol=1e-5, atol=1e-6)
    assert loss[1:4].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_that_is_not_finite_leaves_the_others_exact(bad, side):
    student, teacher = pair(5, 67)
    clean = triton(student, teacher, reduction="none")
    (student if side == "student" else teacher)[2, 66] = bad
    loss, gradient = triton(student, teacher, reduction="none")
    good = [0, 1, 3, 4]
    assert not loss[2].isfinite()
    assert torch.equal(loss[good], clean[0][good]) and torch.equal(gradient[good], clean[1][good])


@pytest.mark.parametrize("c", [1, 24, 129, 768])
def test_every_configuration(c):
    student, teacher = pair(7, c)
    want = triton(student, teacher, reduction="none")
    for config in row_configs(c):
        with tuning.choosing(lambda kernel, key, candidates, config=config: config):
            runs = [triton(student, teacher, reduction="none") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        for found, expected in zip(runs[0], want, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("c", [5, 64, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_outside_the_outputs_is_written(masked, dtype, c):
    student, teacher = pair(3, c, dtype)
    mask = torch.arange(3, device=DEVICE) != 1 if masked else None
    want = triton(student, teacher, mask, "none")

    def framed(kind, *shape):
        frame = torch.full((torch.Size(shape).numel() + 32,), 77, dtype=kind, device=DEVICE)
        return frame, frame[16:-16].view(shape)

    frames = framed(torch.float32, 3), framed(torch.float32, 3, 3), framed(dtype, 3, c)
    loss, stats, dstudent = (inner for _, inner in frames)
    kernels.cosine_loss_fwd(student, teacher, mask, EPSILON, loss, stats)
    kernels.cosine_loss_bwd(student, teacher, mask, torch.ones(3, device=DEVICE), stats, dstudent)
    assert torch.equal(loss, want[0]) and torch.equal(dstudent, want[1])
    for frame, inner in frames:
        inner.fill_(77)
        assert (frame == 77).all()
