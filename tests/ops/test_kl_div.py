"""kl_div through the public door: every backend and instruction set of this machine, in every layout and state."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from cases import many
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import PLACES, forced, names, serves
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import backends, kl_div
from distilbert_fast.ops.kl_div import kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

TRACED = {
    "kl_div": Traced(
        lambda s, t, m: kl_div(s, t, 2.0, m), lambda n: [*torch.randn(2, n, 11), torch.arange(n) % 2 == 0]
    ),
    "kl_div recomputed": Traced(lambda s, t: kl_div(s, t, 2.0, recompute=True), lambda n: [*torch.randn(2, n, 11)]),
}

V = 30522  # of BERT
SHAPES = [
    *[(0, 5), (0, V), (1, 1), (1, 2), (2, 1), (3, 7), (5, 15), (5, 16), (4, 17), (3, 31), (3, 32), (4, 33)],
    *[(7, 64), (2, 127), (2, 1000), (2, V), (1, V + 1)],
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


ON_GPU = [name for name in ("torch", "triton", "cuda") if torch.cuda.is_available() and backends.availability(name).ok]
EVERYWHERE = [*((place, "cpu") for place in PLACES), *((name, "cuda") for name in ON_GPU)]
SERVED = [
    pytest.param(where, dtypes, id="-".join([*where, *names(dtypes)]))
    for where, dtypes in itertools.product(EVERYWHERE, DTYPES)
    if serves("kl_div", where[0], dtypes)
]


@pytest.fixture(params=EVERYWHERE, ids="-".join)
def device(request):
    """The device on which the backend in force serves."""
    place, device = request.param
    with forced(place):
        yield device


def pair(n, v, dtypes=(torch.float32, torch.float32), seed=0, spread=4.0, device="cpu"):
    """Logits of a student and of a teacher that half agrees with it."""
    student, teacher = logits(n, v, torch.float64, seed, spread), logits(n, v, torch.float64, seed + 1, spread)
    return student.to(device, dtypes[0]), ((student + teacher) / 2).to(device, dtypes[1])


def results(function, student, teacher, *arguments, dloss=None, **keywords):
    """Loss and gradient."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *arguments, **keywords)
    upstream = torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def assert_as_good_as_torch(
    n, v, dtypes, *arguments, device, spread=4.0, dloss=None, recompute=False, **keywords
) -> None:
    """The 2× rule for loss and gradient, over several seeds: of one number, torch is at times exact by luck."""
    found = []
    for seed in range(8 if n * v < 20_000 else 2):
        student, teacher = pair(n, v, dtypes, 10 * seed, spread, device)
        ours = results(kl_div, student, teacher, *arguments, dloss=dloss, recompute=recompute, **keywords)
        torchs = results(kl_div_reference, student, teacher, *arguments, dloss=dloss, **keywords)
        double = student.double(), teacher.double()
        found.append((ours, torchs, results(kl_div_reference, *double, *arguments, dloss=dloss, **keywords)))
    three = (
        [torch.cat([y.flatten() for y in x]) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True)
    )
    for what, *compared in zip(("loss", "gradient"), *three, strict=True):
        assert_twice_rule(*compared, what)


# Accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.covering(together=2)
@pytest.mark.parametrize(("device", "dtypes"), SERVED, indirect=["device"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_loss_and_gradient(shape, dtypes, device):
    student, teacher = pair(*shape, dtypes, device=device)
    for temperature, recompute in ((1.0, False), (2.0, False), (2.0, True)):
        assert_as_good_as_torch(*shape, dtypes, temperature, device=device, recompute=recompute)
    loss, gradient = results(kl_div, student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.dtype == dtypes[0] and gradient.is_contiguous()
    without = kl_div(student, teacher, 2.0)
    assert torch.equal(without, results(kl_div, student, teacher, 2.0)[0]), "the loss without gradient differs"


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1, 1.5, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures(temperature, dtype, device):
    assert_as_good_as_torch(4, 501, (dtype, dtype), temperature, device=device, reduction="none")


def test_is_torchs_own_kl_div():
    student, teacher = pair(6, 50, (torch.float64, torch.float64))
    for temperature in (1.0, 2.0, 4.0):
        log_s, log_t = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
        expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
        torch.testing.assert_close(kl_div(student, teacher, temperature), expected)
        torch.testing.assert_close(kl_div_reference(student, teacher, temperature), expected)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(size, device):
    float32 = (torch.float32, torch.float32)
    assert_as_good_as_torch(5, 301, float32, 1.0, device=device, spread=size, reduction="none")
    student, teacher = pair(5, 301, spread=size, device=device)
    loss, gradient = results(kl_div, student, teacher + 1e4, 0.5)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("v", [1, 3, 16, 19, 67])
def test_certain_of_different_columns(v, device):
    """A teacher sure of each column in turn, a student that holds it for 5000 below its maximum."""
    teacher = torch.full((v, v), -5000.0, device=device).fill_diagonal_(0.0)
    student = -5000 - teacher
    ours = results(kl_div, student, teacher, 1.0, reduction="none")
    for x, y in zip(ours, results(kl_div_reference, student, teacher, 1.0, reduction="none"), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_vocabularies_masked_with_the_lowest_float(dtype, temperature, device):
    """Differences of 3e38 times a probability of exactly 0 stay 0, not NaN."""
    student, teacher = pair(3, 1003, (dtype, dtype), device=device)
    teacher[:, :334] = torch.finfo(dtype).min
    student[:, 167:250] = torch.finfo(dtype).min
    ours = results(kl_div, student, teacher, temperature, reduction="none")
    torchs = results(kl_div_reference, student, teacher, temperature, reduction="none")
    exact = results(kl_div_reference, student.double(), teacher.double(), temperature, reduction="none")
    for what, *compared in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert all(x.isfinite().all() for x in compared)
        assert_twice_rule(*compared, what)


def test_equal_logits_and_constants(device):
    student, _ = pair(3, 1001, device=device)
    for x in (student, torch.zeros_like(student), torch.full_like(student, -3e38)):
        loss, gradient = results(kl_div, x, x.clone(), 2.0, reduction="none")
        assert (loss.abs() < 1e-5).all() and (gradient.abs() < 1e-7).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(reduction, masked, recompute):
    student, teacher = pair(4, 5, (torch.float64, torch.float64))
    mask = torch.tensor([True, False, True, True]) if masked else None
    function = lambda s: kl_div(s, teacher, 1.7, mask, reduction, recompute)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


# Masks and reductions ----------------------------------------------------------------------------------------


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", ["random", "one", "zero", "stride 0"])
def test_every_reduction_and_upstream_gradient(reduction, upstream, recompute, device):
    mask = torch.arange(9, device=device) % 3 != 1
    shape = (9,) if reduction == "none" else ()
    dloss = {
        "random": logits(9, 1, device=device)[: math.prod(shape), 0].view(shape),
        "one": torch.ones(shape, device=device),
        "zero": torch.zeros(shape, device=device),
        "stride 0": torch.tensor(3.0, device=device).expand(shape),
    }[upstream]
    float32 = (torch.float32, torch.float32)
    for m in (None, mask):
        assert_as_good_as_torch(9, 33, float32, 2.0, m, reduction, device=device, dloss=dloss, recompute=recompute)


def test_sum_of_rows_gives_a_gradient_of_stride_zero(device):
    student, teacher = pair(6, 20, device=device)
    for recompute in (False, True):
        leaf = student.clone().requires_grad_()
        kl_div(leaf, teacher, 2.0, None, "none", recompute).sum().backward()
        torch.testing.assert_close(leaf.grad, results(kl_div, student, teacher, 2.0, reduction="sum")[1])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), max_size=9), st.sampled_from(["mean", "sum", "none"]), st.booleans())
def test_random_masks(device, rows, reduction, recompute):
    """Against the same loss of the counted rows alone. What the others hold, NaN here, reaches nothing."""
    student, teacher = pair(len(rows), 19, device=device)
    mask = torch.tensor(rows, dtype=torch.bool, device=device)
    student[~mask], teacher[~mask] = math.nan, math.inf
    loss, gradient = results(kl_div, student, teacher, 2.0, mask, reduction, recompute=recompute)
    if not mask.any():
        assert (loss == 0).all() and (gradient == 0).all()
        return
    expected, dexpected = results(kl_div_reference, student[mask], teacher[mask], 2.0, reduction=reduction)
    torch.testing.assert_close(loss[mask] if reduction == "none" else loss, expected)
    torch.testing.assert_close(gradient[mask], dexpected)
    assert (gradient[~mask] == 0).all()
    if reduction == "none":
        assert (loss[~mask] == 0).all()


def test_a_strided_mask(device):
    student, teacher = pair(6, 20, device=device)
    mask = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1], device=device, dtype=torch.bool)
    for m in (mask[::2], mask.view(6, 2)[:, 1], mask[:1].expand(6)):
        for recompute in (False, True):
            x = results(kl_div, student, teacher, 2.0, m, recompute=recompute)
            y = results(kl_div, student, teacher, 2.0, m.contiguous(), recompute=recompute)
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("column", [0, 40, 66])
def test_a_non_finite_row_leaves_the_others_exact(bad, side, column, device):
    for recompute in (False, True):
        student, teacher = pair(5, 67, device=device)
        clean = results(kl_div, student, teacher, 2.0, reduction="none", recompute=recompute)
        (student if side == "student" else teacher)[2, column] = bad
        loss, gradient = results(kl_div, student, teacher, 2.0, reduction="none", recompute=recompute)
        others = [0, 1, 3, 4]
        assert not loss[2].isfinite()
        assert torch.equal(loss[others], clean[0][others])
        assert torch.equal(gradient[others], clean[1][others])


# Layouts and bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, device):
    """The layout changes no bit, inputs keep theirs, and nothing is read or written beside them."""
    student, teacher = pair(5, 131, (dtype, dtype), device=device)
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool, device=device)
    for recompute in (False, True):
        expected = results(kl_div, student, teacher, 2.0, mask, recompute=recompute)
        for s, t in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
            s, t = lay_out(student, s), lay_out(teacher, t)
            found = results(kl_div, s, t, 2.0, mask, recompute=recompute)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            assert torch.equal(s, student) and torch.equal(t, teacher)
            if s._base is not None:
                assert int(s._base.isnan().sum()) == s._base.numel() - s.numel()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 6),
    v=st.integers(1, 150),
    gap=st.integers(0, 9),
    offset=st.integers(0, 17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.floats(0.5, 10),
    data=st.data(),
)
def test_any_shape_stride_and_offset(device, n, v, gap, offset, dtype, temperature, data):
    student, teacher = pair(n, v, (dtype, dtype), seed=v, device=device)
    room = torch.full((offset + n * (v + gap) + 8,), math.nan, dtype=dtype, device=device)
    placed = room.as_strided((n, v), (v + gap, 1), offset).copy_(student)
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    found = results(kl_div, placed, teacher, temperature, reduction=reduction)
    expected = results(kl_div, student, teacher, temperature, reduction=reduction)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    double = results(kl_div_reference, student.double(), teacher.double(), temperature, reduction=reduction)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for x, y in zip(found, double, strict=True):
        torch.testing.assert_close(x.double(), y, **tolerance)


def test_rows_more_than_two_billion_elements_apart(tmp_path):
    """A sparse file stands for the memory: only the rows themselves are ever touched."""
    stride, v = 2**31 + 5, 37
    student, teacher = pair(3, v)
    size = 2 * stride + v
    with open(tmp_path / "logits", "wb") as file:
        file.truncate(size * 4)
    room = torch.from_file(str(tmp_path / "logits"), shared=True, size=size, dtype=torch.float32)
    far = room.as_strided((3, v), (stride, 1)).copy_(student)
    for recompute in (False, True):
        for s, t in ((far, teacher), (teacher, far)):
            found = results(kl_div, s, t, 2.0, recompute=recompute)
            expected = results(kl_div, s.contiguous(), t.contiguous(), 2.0, recompute=recompute)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_changes_nothing(reduction, recompute, device):
    student, teacher = pair(6, 101, device=device)
    leaf, before = student.clone().requires_grad_(), (student.clone(), teacher.clone())
    loss = kl_div(leaf, teacher, 2.0, None, reduction, recompute)
    dloss = torch.ones_like(loss)
    loss.backward(dloss, retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(7)  # whoever owns .grad may write into it
    leaf.grad = None
    loss.backward(dloss)
    assert torch.equal(leaf.grad, first)
    assert torch.equal(leaf, before[0]) and torch.equal(teacher, before[1])
    assert torch.equal(dloss, torch.ones_like(loss))


def test_teacher_never_gets_a_gradient(device):
    student, teacher = pair(3, 11, device=device)
    student.requires_grad_(), teacher.requires_grad_()
    kl_div(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    assert not kl_div(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not kl_div(student, teacher).requires_grad


def test_second_derivatives_are_refused():
    student, teacher = pair(3, 11)
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_div(leaf, teacher) * leaf.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    student, teacher = pair(37, 1003, device=device)
    mask = torch.arange(37, device=device) % 5 != 0
    before = torch.get_num_threads()

    def everything():
        for recompute, reduction in itertools.product((False, True), ("none", "mean")):
            yield from results(kl_div, student, teacher, 2.0, mask, reduction, recompute=recompute)

    try:
        first = list(everything())
        for threads in (1, 2, 3, 1, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(everything(), first, strict=True))
    finally:
        torch.set_num_threads(before)


# torch's own machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    student, teacher = (lay_out(x, "strided_rows") for x in pair(4, 9))
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool) if masked else None
    ops = torch.ops.distilbert_fast
    for keep in ("gradient", "stats", "none"):
        torch.library.opcheck(ops.kl_div_forward.default, (student, teacher, mask, 2.0, True, keep))
    _, stats = ops.kl_div_forward(student, teacher, mask, 2.0, True, "stats")
    torch.library.opcheck(
        ops.kl_div_backward.default, (student, lay_out(teacher, "transposed"), mask, torch.ones(4), stats, 2.0)
    )


@pytest.mark.parametrize(
    "device", many([EVERYWHERE[1], *EVERYWHERE[len(PLACES) :]], EVERYWHERE), indirect=True, ids="-".join
)
@pytest.mark.parametrize("recompute", [False, True])
def test_compile(recompute, device):
    check_compiled("aot_eager", recompute, device)


def test_compile_to_code():
    check_compiled("inductor", False, "cpu")


def check_compiled(backend, recompute, device):
    student, teacher = pair(6, 33, device=device)
    mask = torch.arange(6, device=device) % 2 == 0

    def function(student, teacher, mask):
        rows = kl_div(student * 1.5, teacher, 2.0, None, "none", recompute)
        return kl_div(student, teacher, 2.0, mask, "mean", recompute) + rows.square().sum()

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    expected = results(function, student, teacher, mask)
    torch.testing.assert_close(results(compiled, student, teacher, mask), expected)
    torch.testing.assert_close(compiled(student, teacher, mask), expected[0])


def test_compiles_over_fifty_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(kl_div, backend=backend, fullgraph=True)
    for n in range(2, 52):
        student, teacher = pair(n, 17)
        found, expected = (results(function, student, teacher, 2.0) for function in (compiled, kl_div))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(graphs) <= 2


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_fake_and_meta_tensors(mode):
    for dtype, reduction, recompute in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), ("mean", "sum", "none"), (False, True)
    ):
        with FakeTensorMode() if mode == "fake" else torch.device("meta"):
            student = torch.empty(4, 9, dtype=dtype).t().requires_grad_()
            mask = torch.empty(9, dtype=torch.bool)
            loss = kl_div(student, student.detach(), 2.0, mask, reduction, recompute)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.shape == ((9,) if reduction == "none" else ())
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert (gradient.shape, gradient.dtype, gradient.is_contiguous()) == ((9, 4), dtype, True)


def test_autocast_changes_no_bit(device):
    student, teacher = pair(5, 65, device=device)
    expected = results(kl_div, student, teacher, 2.0)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = results(kl_div, student, teacher, 2.0)
        lower = kl_div(student.bfloat16(), teacher, 2.0)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert lower.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_survive_with_a_loss_scale(reduction):
    """Unscaled, most gradients of a mean over many rows and columns lie below float16's smallest number."""
    student, teacher = pair(64, 4001, (torch.float16, torch.float16))
    scale = 2.0**16
    dloss = torch.tensor(scale) if reduction == "mean" else torch.full((64,), scale / 64)
    gradient = results(kl_div, student, teacher, 2.0, reduction=reduction, dloss=dloss)[1].double() / scale
    exact = results(kl_div_reference, student.double(), teacher.double(), 2.0)[1]
    torch.testing.assert_close(gradient, exact, rtol=2e-3, atol=2.0**-24 / scale * 2)
    assert float((gradient == 0).double().mean()) < 0.05


def test_peak_memory_is_the_gradient():
    """Nothing of the size of the logits is allocated but the gradient, and nothing at all without one."""
    if not backends.availability("cpu").ok:
        pytest.skip(backends.availability("cpu").reason)
    student, teacher = pair(64, 5003)
    for leaf, most in ((student.clone().requires_grad_(), 1), (student, 0)):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = kl_div(leaf, teacher, 2.0)
            if leaf.requires_grad:
                loss.backward()
        allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
        large = [size for size in allocated if size >= student.numel()]
        assert len(large) <= most, f"allocated {large} bytes for logits of {student.nbytes}"
        assert sum(large) <= most * student.nbytes


# Bad input ---------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
FLOATS = "float32 or bfloat16 or float16 or float64"
BAD = [
    ((X, X, 0.0), {}, ValueError, "kl_div: temperature must be finite and above 0, got 0.0"),
    ((X, X, -1), {}, ValueError, "kl_div: temperature must be finite and above 0, got -1"),
    ((X, X, math.nan), {}, ValueError, "kl_div: temperature must be finite and above 0, got nan"),
    ((X, X, math.inf), {}, ValueError, "kl_div: temperature must be finite and above 0, got inf"),
    ((X, X, "2"), {}, TypeError, "kl_div: temperature must be a number, got str"),
    ((X, X, True), {}, TypeError, "kl_div: temperature must be a number, got bool"),
    ((X, X, None), {}, TypeError, "kl_div: temperature must be a number, got NoneType"),
    ((X.tolist(), X), {}, TypeError, "kl_div: student must be a tensor, got list"),
    ((X, None), {}, TypeError, "kl_div: teacher must be a tensor, got NoneType"),
    ((X.int(), X), {}, TypeError, f"kl_div: student must be {FLOATS}, got int32"),
    ((X, X.long()), {}, TypeError, f"kl_div: teacher must be {FLOATS}, got int64"),
    ((X[0], X), {}, ValueError, "kl_div: student must be of shape [N, V], got [4]"),
    ((X[None], X), {}, ValueError, "kl_div: student must be of shape [N, V], got [1, 3, 4]"),
    ((X, X[:2]), {}, ValueError, "kl_div: teacher must be of shape [3, 4], got [2, 4]"),
    ((X, X[:, :3]), {}, ValueError, "kl_div: teacher must be of shape [3, 4], got [3, 3]"),
    ((X, X.to("meta")), {}, ValueError, "kl_div: teacher must be on cpu, got meta"),
    ((X[:, :0], X[:, :0]), {}, ValueError, "kl_div: student must be of at least one column, got [3, 0]"),
    ((X, X), {"mask": X[0, :3]}, TypeError, "kl_div: mask must be bool, got float32"),
    ((X, X), {"mask": X[0, :3].long()}, TypeError, "kl_div: mask must be bool, got int64"),
    ((X, X), {"mask": X[0] > 0}, ValueError, "kl_div: mask must be of shape [3], got [4]"),
    ((X, X), {"mask": X[:, :1] > 0}, ValueError, "kl_div: mask must be of shape [3], got [3, 1]"),
    ((X, X), {"mask": [True] * 3}, TypeError, "kl_div: mask must be a tensor, got list"),
    (
        (X, X),
        {"reduction": "batchmean"},
        ValueError,
        "kl_div: reduction must be one of 'mean', 'sum', 'none', got 'batchmean'",
    ),
    ((X, X), {"reduction": None}, ValueError, "kl_div: reduction must be one of 'mean', 'sum', 'none', got None"),
]


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), BAD, ids=[bad[-1] for bad in BAD])
def test_bad_input(arguments, keywords, error, message):
    with pytest.raises(error) as caught:
        kl_div(*arguments, **keywords)
    assert str(caught.value) == message


def test_an_unknown_backend_is_refused():
    message = "backend must be one of cuda, triton, cpu, torch, got 'gpu'"
    with pytest.raises(distilbert_fast.BackendError) as caught, distilbert_fast.backend("gpu"):
        pass
    assert str(caught.value) == message


def test_a_backend_that_cannot_serve_is_refused_with_the_reason():
    for name in ("cuda", "triton"):
        if backends.interpreted() and name == "triton":
            continue
        with distilbert_fast.backend(name), pytest.raises(distilbert_fast.BackendError) as caught:
            kl_div(X, X)
        state = backends.availability(name)
        reason = "it does not take cpu tensors" if state.ok else state.reason
        assert str(caught.value) == f"kl_div: backend {name!r} was forced but cannot serve: {reason}"
    if backends.availability("cpu").ok:
        with distilbert_fast.backend("cpu"), pytest.raises(distilbert_fast.BackendError) as caught:
            kl_div(X.double(), X)
        reason = "its kl_div takes float32, bfloat16, not float64"
        assert str(caught.value) == f"kl_div: backend 'cpu' was forced but cannot serve: {reason}"
    assert backends.forced() == os.environ.get("DISTILBERT_FAST_BACKEND"), "the block ended, and so did its force"


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("DISTILBERT_FAST_BACKEND", "torch")
    assert kl_div(X, X) == 0
    monkeypatch.setenv("DISTILBERT_FAST_BACKEND", "gpu")
    with pytest.raises(distilbert_fast.BackendError) as caught:
        kl_div(X, X)
    assert str(caught.value) == ("DISTILBERT_FAST_BACKEND must be one of cuda, triton, cpu, torch, got 'gpu'")
