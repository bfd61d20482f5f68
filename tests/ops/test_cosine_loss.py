"""cosine_loss against torch's CosineEmbeddingLoss in float64, in every layout that breaks things."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import backends, cosine_loss
from distilbert_fast.ops.cosine_loss import cosine_loss_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

TRACED = {"cosine_loss": Traced(lambda s, t: cosine_loss(s, t), lambda n: [*torch.randn(2, n, 8)])}

pytestmark = pytest.mark.usefixtures("place")

SHAPES = [(0, 5), (1, 1), (1, 2), (3, 7), (5, 15), (5, 16), (4, 17), (3, 31), (4, 33), (37, 768), (2, 3001)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def pair(n, c, dtypes=(torch.float32, torch.float32), seed=0):
    """Hidden states of a student and of a teacher that half agrees with it."""
    student, teacher = logits(n, c, torch.float64, seed, 1.0), logits(n, c, torch.float64, seed + 1, 1.0)
    return student.to(dtypes[0]), (student + teacher).to(dtypes[1])


def torchs(student, teacher, mask=None, reduction="mean"):
    """torch.nn.CosineEmbeddingLoss with target 1 over the counted rows."""
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    ones = torch.ones(len(student), dtype=student.dtype)
    return F.cosine_embedding_loss(student, teacher, ones, reduction=reduction)


def results(function, student, teacher, *arguments, dloss=None, **keywords):
    """Loss and gradient."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *arguments, **keywords)
    upstream = torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_loss_and_gradient(shape, dtypes):
    found = []
    for seed in range(8 if math.prod(shape) > 99 else 99):  # of a few numbers, torch is at times exact by luck
        student, teacher = pair(*shape, dtypes, 10 * seed)
        ours = results(cosine_loss, student, teacher, reduction="none")
        assert (ours[0].dtype, ours[1].dtype) == (torch.float32, dtypes[0]) and ours[1].is_contiguous()
        same_dtype = results(torchs, student, teacher.to(dtypes[0]), reduction="none")
        found.append((ours, same_dtype, results(torchs, student.double(), teacher.double(), reduction="none")))
    three = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *compared in zip(("loss", "gradient"), *three, strict=True):
        assert_twice_rule(*compared, what)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs_cosine_embedding_loss(reduction):
    """Zero rows on either side and on both, and rows so short that ε decides."""
    student, teacher = pair(8, 5, (torch.float64, torch.float64))
    student[1], teacher[2], student[3], teacher[3] = 0, 0, 0, 0
    student[4] *= 1e-7
    teacher[5] *= 1e-8
    student[6], teacher[7] = teacher[6], -student[7]
    expected = results(torchs, student, teacher, reduction=reduction)
    for function in (cosine_loss, cosine_loss_reference):
        for x, y in zip(results(function, student, teacher, reduction=reduction), expected, strict=True):
            torch.testing.assert_close(x, y)
    rows, gradient = results(cosine_loss, student.float(), teacher.float(), reduction="none")
    assert rows[1:4].tolist() == [1, 1, 1] and gradient.isfinite().all()
    torch.testing.assert_close(rows[6:], torch.tensor([0.0, 2.0]), rtol=0, atol=3e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(reduction, masked):
    student, teacher = pair(4, 5, (torch.float64, torch.float64))
    mask = torch.tensor([True, False, True, True]) if masked else None
    assert torch.autograd.gradcheck(lambda s: cosine_loss(s, teacher, mask, reduction), student.requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", ["random", "one", "zero", "stride 0"])
def test_every_reduction_and_upstream_gradient(reduction, upstream):
    student, teacher = pair(9, 33)
    mask = torch.arange(9) % 3 != 1
    shape = (9,) if reduction == "none" else ()
    dloss = {
        "random": logits(9, 1)[: math.prod(shape), 0].view(shape),
        "one": torch.ones(shape),
        "zero": torch.zeros(shape),
        "stride 0": torch.tensor(3.0).expand(shape),
    }[upstream]
    for m in (None, mask):
        ours = results(cosine_loss, student, teacher, m, reduction, dloss=dloss)
        double = results(cosine_loss_reference, student.double(), teacher.double(), m, reduction, dloss=dloss)
        for x, y in zip(ours, double, strict=True):
            torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-6)
    leaf = student.clone().requires_grad_()
    cosine_loss(leaf, teacher, None, "none").sum().backward()
    assert torch.equal(leaf.grad, results(cosine_loss, student, teacher, reduction="sum")[1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), max_size=9), st.sampled_from(["mean", "sum", "none"]))
def test_random_masks(rows, reduction):
    """Against torch's loss of the counted rows alone. What the others hold, NaN here, reaches nothing."""
    student, teacher = pair(len(rows), 19)
    mask = torch.tensor(rows, dtype=torch.bool)
    student[~mask], teacher[~mask] = math.nan, math.inf
    loss, gradient = results(cosine_loss, student, teacher, mask, reduction)
    if not mask.any():
        assert (loss == 0).all() and (gradient == 0).all()
        return
    expected, dexpected = results(torchs, student[mask], teacher[mask], reduction=reduction)
    torch.testing.assert_close(loss[mask] if reduction == "none" else loss, expected)
    torch.testing.assert_close(gradient[mask], dexpected)
    assert (gradient[~mask] == 0).all()
    assert reduction != "none" or (loss[~mask] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_non_finite_row_leaves_the_others_exact(bad, side):
    student, teacher = pair(5, 67)
    clean = results(cosine_loss, student, teacher, reduction="none")
    (student if side == "student" else teacher)[2, 66] = bad
    found = results(cosine_loss, student, teacher, reduction="none")
    others = [0, 1, 3, 4]
    assert not found[0][2].isfinite()
    assert all(torch.equal(x[others], y[others]) for x, y in zip(found, clean, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    """The layout changes no bit, inputs keep theirs, and nothing is written beside them."""
    student, teacher = pair(5, 131, (dtype, dtype))
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)
    expected = results(cosine_loss, student, teacher, mask)
    for s, t in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
        s, t = lay_out(student, s), lay_out(teacher, t)
        found = results(cosine_loss, s, t, mask.repeat(2).view(2, 5).t()[:, 0])
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert torch.equal(s, student) and torch.equal(t, teacher)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_changes_nothing(reduction):
    student, teacher = pair(6, 101)
    leaf = student.clone().requires_grad_()
    loss = cosine_loss(leaf, teacher, None, reduction)
    dloss = torch.ones_like(loss)
    loss.backward(dloss, retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(7)
    leaf.grad = None
    loss.backward(dloss)
    assert torch.equal(leaf.grad, first) and torch.equal(leaf, student)
    assert torch.equal(dloss, torch.ones_like(loss))


def test_teacher_never_gets_a_gradient():
    student, teacher = (x.requires_grad_() for x in pair(3, 11))
    cosine_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    assert not cosine_loss(student.detach(), teacher).requires_grad


def test_same_bits_every_run_and_on_any_number_of_threads():
    student, teacher = pair(137, 1003)
    before = torch.get_num_threads()
    try:
        first = results(cosine_loss, student, teacher, reduction="none")
        for threads in (1, 2, 3, 1, 5):
            torch.set_num_threads(threads)
            again = results(cosine_loss, student, teacher, reduction="none")
            assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("c", [1, 5, 37, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_outputs_fill_their_memory_and_no_more(c, dtype, native_tier):
    n, edge, code = 5, 16, [torch.float32, torch.bfloat16].index(dtype)
    student, teacher = pair(n, c, (dtype, dtype))
    mask, dloss = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool), torch.ones(n)
    want = results(cosine_loss, student, teacher, mask, "none")
    sizes = (n, torch.float32), (3 * n, torch.float32), (n * c, dtype)
    frames = [torch.full((size + 2 * edge,), 77, dtype=kind) for size, kind in sizes]
    loss, stats, gradient = (frame[edge:-edge] for frame in frames)
    given = student.data_ptr(), teacher.data_ptr(), c, c, code, code, mask.data_ptr(), c
    backends.cpu().cosine_loss_forward(given, n, loss.data_ptr(), stats.data_ptr(), 1)
    backends.cpu().cosine_loss_backward(given, n, dloss.data_ptr(), stats.data_ptr(), gradient.data_ptr(), 1)
    assert torch.equal(loss, want[0]) and torch.equal(gradient.view(n, c), want[1])
    for frame in frames:
        frame[edge:-edge] = 77
        assert (frame == 77).all()


def test_native_bad_input(native_tier):
    good = dict(student=64, teacher=64, student_stride=4, teacher_stride=4, student_dtype=0, teacher_dtype=0, mask=0)
    good |= dict(columns=4, rows=2)
    for changed, outputs, message in (
        ({"rows": -1}, (64, 64, 64), "rows must be 0 or more, got -1"),
        ({"columns": -1}, (64, 64, 64), "columns must be 0 or more, got -1"),
        ({"teacher_dtype": 2}, (64, 64, 64), "dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        ({"student": 0}, (64, 64, 64), "student must point to memory, got null"),
        ({"teacher": 0}, (64, 64, 64), "teacher must point to memory, got null"),
        ({}, (0, 64, 64), "loss must point to memory, got null"),
        ({}, (64, 0, 64), "stats must point to memory, got null"),
        ({}, (64, 64, 0), "gradient must point to memory, got null"),
    ):
        *given, rows = {**good, **changed}.values()
        with pytest.raises(ValueError) as caught:
            if outputs[2]:
                backends.cpu().cosine_loss_forward(tuple(given), rows, *outputs[:2], 1)
            else:
                backends.cpu().cosine_loss_backward(tuple(given), rows, *outputs, 1)
        assert str(caught.value) == f"cosine_loss: {message}"


# torch's own machinery ---------------------------------------------------------------------------------------


@on_any_tier
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    student, teacher = (lay_out(x, "strided_rows") for x in pair(4, 9))
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool) if masked else None
    ops = torch.ops.distilbert_fast
    torch.library.opcheck(ops.cosine_loss_forward.default, (student, teacher, mask))
    _, stats = ops.cosine_loss_forward(student, teacher, mask)
    transposed = lay_out(student, "transposed")
    torch.library.opcheck(ops.cosine_loss_backward.default, (transposed, teacher, mask, torch.ones(4), stats))


@on_any_tier
def test_compile():
    student, teacher = pair(6, 33)
    mask = torch.arange(6) % 2 == 0

    def function(student, teacher, mask):
        rows = cosine_loss(student * 1.5, teacher, None, "none")
        return cosine_loss(student, teacher, mask) + rows.square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = results(function, student, teacher, mask)
    torch.testing.assert_close(results(compiled, student, teacher, mask), expected)
    torch.testing.assert_close(compiled(student, teacher, mask), expected[0])


@on_any_tier
def test_compiles_over_fifty_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(cosine_loss, backend=backend, fullgraph=True)
    for n in range(2, 52):
        student, teacher = pair(n, 17)
        found, expected = (results(function, student, teacher) for function in (compiled, cosine_loss))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(graphs) <= 2


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_fake_and_meta_tensors(mode):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for dtype, reduction in itertools.product(dtypes, ("mean", "sum", "none")):
        with FakeTensorMode() if mode == "fake" else torch.device("meta"):
            student = torch.empty(4, 9, dtype=dtype).t().requires_grad_()
            loss = cosine_loss(student, student.detach(), torch.empty(9, dtype=torch.bool), reduction)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.shape == ((9,) if reduction == "none" else ())
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert (gradient.shape, gradient.dtype, gradient.is_contiguous()) == ((9, 4), dtype, True)


def test_autocast_changes_no_bit():
    student, teacher = pair(5, 65)
    expected = results(cosine_loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(cosine_loss, student, teacher)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_float16_with_a_loss_scale_and_large_values():
    """Squares overflow float16 and unscaled gradients underflow it; neither happens in float32 inside."""
    student, teacher = (x * 1000 for x in pair(64, 768, (torch.float16, torch.float16)))
    dloss = torch.tensor(2.0**20)
    loss, gradient = results(cosine_loss, student, teacher, dloss=dloss)
    exact, dexact = results(torchs, student.double(), teacher.double(), dloss=dloss)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), dexact, rtol=2e-3, atol=float(dexact.abs().max()) * 1e-3)


def test_the_reference_serves_when_it_is_forced():
    student, teacher = pair(5, 9)
    with distilbert_fast.backend("torch"):
        torch.testing.assert_close(cosine_loss(student, teacher), cosine_loss_reference(student, teacher))


# Bad input ---------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
FLOATS = "float32 or bfloat16 or float16 or float64"
BAD = [
    ((X.tolist(), X), TypeError, "cosine_loss: student must be a tensor, got list"),
    ((X.int(), X), TypeError, f"cosine_loss: student must be {FLOATS}, got int32"),
    ((X, X.bool()), TypeError, f"cosine_loss: teacher must be {FLOATS}, got bool"),
    ((X[0], X), ValueError, "cosine_loss: student must be of shape [N, C], got [4]"),
    ((X, X[:2]), ValueError, "cosine_loss: teacher must be of shape [3, 4], got [2, 4]"),
    ((X, X.to("meta")), ValueError, "cosine_loss: teacher must be on cpu, got meta"),
    ((X, X, X[0, :3]), TypeError, "cosine_loss: mask must be bool, got float32"),
    ((X, X, X[0] > 0), ValueError, "cosine_loss: mask must be of shape [3], got [4]"),
    ((X, X, None, "max"), ValueError, "cosine_loss: reduction must be one of 'mean', 'sum', 'none', got 'max'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[bad[-1] for bad in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        cosine_loss(*arguments)
    assert str(caught.value) == message
