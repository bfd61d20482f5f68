"""linear_topk_kl_div against its definition, the full KL, and what it must refuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from places import served
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import backends, linear_kl_div, linear_topk_kl_div
from distilbert_fast.ops import _vocabulary_losses as shared
from distilbert_fast.ops import linear_topk_kl_div as op
from distilbert_fast.ops.linear_topk_kl_div import linear_topk_kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out


def traced(n: int) -> list[torch.Tensor]:
    log_p = torch.randn(n, 4).log_softmax(1)
    chosen = torch.rand(n, 11).argsort(1)[:, :3]
    return [torch.randn(n, 8), torch.randn(11, 8), torch.randn(11), chosen, log_p[:, :3], log_p[:, 3]]


TRACED = {"linear_topk_kl_div": Traced(lambda *x: linear_topk_kl_div(*x, temperature=2.0)[0], traced)}

IGNORE = -100


def student(n, v, c=6, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, W, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, c), (v, c), (v,)))
    return [h.to(dtype), (2 / math.sqrt(c) * W).to(dtype), b.to(dtype) if bias else None]


def targets(n, v, k, temperature=1.0, seed=1, dtype=torch.float64):
    """ids, log_p, log_tail of random logits, and these logits."""
    logits = 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_p = torch.log_softmax(logits / temperature, dim=1)
    top, ids = log_p.topk(k, dim=1)
    return (ids, top.to(dtype), log_p.scatter(1, ids, -torch.inf).logsumexp(dim=1).to(dtype)), logits


def rows(n, v, seed=0):
    """Half of the rows for the KL and, independently, half of them with a label."""
    generator = torch.Generator().manual_seed(seed)
    kd_mask = torch.rand(n, generator=generator) < 0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    return kd_mask, labels.masked_fill(torch.rand(n, generator=generator) < 0.5, IGNORE)


def results(function, tensors, *arguments, weights=(3.0, 0.7), **keywords):
    """kl, ce, and the gradients for h, W and b of their weighted sum; a weight None: of the other alone."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    losses = function(*leaves, *arguments, **keywords)
    weighted = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight is not None)
    student = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(weighted, student, materialize_grads=True)
    return [*(loss.detach() for loss in losses), *gradients]


def close(found, expected, **tolerance):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), **tolerance)


@pytest.fixture(params=[1, 4, 10_000], ids=lambda size: f"chunks of {size}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: request.param)
    return request.param


# Accuracy ----------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("kl", "ce", "dh", "dW", "db")


def assert_as_good_as_torch(n, v, k, dtype, temperature, bias=True):
    found = []
    for seed in range(8 if n * v < 20_000 else 2):  # pooled: of a few numbers, torch is at times exact by luck
        tensors, counted = student(n, v, 24, dtype, bias, seed), rows(n, v, seed)
        masses = torch.float64 if dtype == torch.float64 else torch.float32
        arguments = (*targets(n, v, k, temperature, seed + 1, masses)[0], temperature, *counted)
        ours = results(linear_topk_kl_div, tensors, *arguments)
        assert [x.dtype for x in ours] == [masses] * 2 + [dtype] * (len(ours) - 2)
        same_dtype = results(linear_topk_kl_div_reference, tensors, *arguments)
        exact = [None if x is None else x.double() for x in tensors]
        found.append((ours, same_dtype, results(linear_topk_kl_div_reference, exact, *arguments)))
    for i, what in enumerate(NAMES[: len(found[0][0])]):
        assert_twice_rule(*(torch.cat([three[place][i].flatten() for three in found]) for place in range(3)), what)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize(("forced", "dtype"), served("linear_topk_kl_div", DTYPES), indirect=["forced"])
@pytest.mark.parametrize(
    ("n", "v", "k"), [(0, 5, 2), (1, 1, 1), (13, 2, 1), (13, 2, 2), (13, 31, 1), (7, 33, 33), (29, 64, 5)]
)
def test_losses_and_gradients(n, v, k, dtype, chunk, forced):
    assert_as_good_as_torch(n, v, k, dtype, 2.5)
    assert_as_good_as_torch(n, v, k, dtype, 1.0, bias=False)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize(("forced", "dtype"), served("linear_topk_kl_div", DTYPES[:2]), indirect=["forced"])
@pytest.mark.parametrize(("n", "v", "k"), [(40, 3001, 64), (5, 30522, 64), (3, 30522, 30522)])
def test_many_columns(n, v, k, dtype, monkeypatch, forced):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 32)
    assert_as_good_as_torch(n, v, k, dtype, 2.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_known_give_the_full_kl_and_fewer_a_bound_that_grows(temperature):
    n, v = 12, 50
    tensors, (_, labels) = student(n, v), rows(n, v)
    identity = torch.eye(v, dtype=torch.float64)
    mask = torch.arange(n) % 4 != 0
    bounds = []
    for k in (1, 2, 5, 20, 40, v):
        of_teacher, logits = targets(n, v, k, temperature)
        bounds.append(results(linear_topk_kl_div, tensors, *of_teacher, temperature, mask, labels))
    full = results(linear_kl_div, tensors, logits, identity, None, temperature, mask, labels)
    close(bounds[-1], full, rtol=1e-12, atol=1e-13)
    kls = [float(of_k[0]) for of_k in bounds]
    assert kls == sorted(kls) and kls[0] > 0
    assert all(torch.equal(of_k[1], full[1]) for of_k in bounds)


@pytest.mark.parametrize("weights", [(1.0, None), (None, 1.0), (0.25, -3.0), (0.0, 1.0)])
def test_any_weights_of_the_losses(weights, chunk):
    """Weights that the op learns in backward only; None = the loss is not used at all."""
    arguments = (*targets(11, 17, 4, 2.0)[0], 2.0, *rows(11, 17))
    found, expected = (
        results(function, student(11, 17), *arguments, weights=weights)
        for function in (linear_topk_kl_div, linear_topk_kl_div_reference)
    )
    close(found, expected)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("k", [3, 11])
def test_gradcheck(k, labelled, chunk):
    (kd_mask, labels), of_teacher = rows(5, 11, seed=1), targets(5, 11, k, 2.0)[0]
    arguments = *of_teacher, 2.0, kd_mask, labels if labelled else None
    leaves = [x.requires_grad_() for x in student(5, 11)]
    assert torch.autograd.gradcheck(lambda *x: linear_topk_kl_div(*x, *arguments), leaves, fast_mode=chunk != 4)


# Rows --------------------------------------------------------------------------------------------------------


def test_rows_that_count_for_nothing_reach_nothing(forced, chunk):
    n, v = 9, 33
    tensors, (kd_mask, labels) = student(n, v, dtype=torch.float32), rows(n, v)
    ids, log_p, log_tail = targets(n, v, 5, 2.0, dtype=torch.float32)[0]
    expected = results(linear_topk_kl_div, tensors, ids, log_p, log_tail, 2.0, kd_mask, labels)
    tensors[0][~kd_mask & (labels == IGNORE)] = math.nan
    ids, log_p, log_tail = ids.clone(), log_p.clone(), log_tail.clone()
    ids[~kd_mask], log_p[~kd_mask], log_tail[~kd_mask] = v + 7, math.nan, math.nan
    close(results(linear_topk_kl_div, tensors, ids, log_p, log_tail, 2.0, kd_mask, labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("labels", [None, torch.full((5,), IGNORE)], ids=["no labels", "all ignored"])
def test_nothing_counted(n, labels, forced):
    tensors = student(n, 7, dtype=torch.float32)
    tensors[0].fill_(math.nan)
    labels = None if labels is None else labels[:n]
    found = results(linear_topk_kl_div, tensors, *targets(n, 7, 2)[0], 2.0, torch.zeros(n, dtype=torch.bool), labels)
    assert all((x == 0).all() for x in found)
    assert [x.shape for x in found] == [(), (), (n, 6), (7, 6), (7,)]


def test_without_labels_the_cross_entropy_is_zero(forced):
    tensors, of_teacher = student(5, 7, dtype=torch.float32), targets(5, 7, 2, 2.0)[0]
    found = results(linear_topk_kl_div, tensors, *of_teacher, 2.0)
    assert found[1] == 0 and found[1].shape == ()
    close(found, results(linear_topk_kl_div_reference, tensors, *of_teacher, 2.0))


def test_each_row_is_projected_once(monkeypatch, forced):
    projected = []
    if forced == "torch":
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda h, *a: projected.append(len(h)) or linear(h, *a))
    else:
        into = op.product_into
        monkeypatch.setattr(op, "product_into", lambda y, h, *a: projected.append(len(h)) or into(y, h, *a))
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 4)
    kd_mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    labels = torch.tensor([IGNORE, 1, 2, IGNORE, 4, IGNORE, 3, 0, IGNORE, IGNORE])
    linear_topk_kl_div(*student(10, 7, dtype=torch.float32), *targets(10, 7, 2)[0], 2.0, kd_mask, labels)
    assert projected == [4, 4], "5 rows of the KL, two of them with labels, and 3 more with labels"


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for(frozen, chunk):
    tensors, (kd_mask, labels), of_teacher = student(9, 7), rows(9, 7), targets(9, 7, 3, 2.0)[0]
    expected = results(linear_topk_kl_div_reference, tensors, *of_teacher, 2.0, kd_mask, labels, weights=(1, 1))[2:]
    leaves = [x.detach().requires_grad_(not stays) for x, stays in zip(tensors, frozen, strict=True)]
    masses = [x.requires_grad_() for x in of_teacher[1:]]
    kl, ce = linear_topk_kl_div(*leaves, of_teacher[0], *masses, 2.0, kd_mask, labels)
    assert kl.requires_grad == ce.requires_grad == (not all(frozen))
    if not all(frozen):
        (kl + ce).backward()
    for leaf, gradient, stays in zip(leaves, expected, frozen, strict=True):
        if stays:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, gradient)
    assert all(x.grad is None for x in masses)
    with torch.no_grad():
        assert not linear_topk_kl_div(*leaves, *of_teacher, 2.0, kd_mask, labels)[0].requires_grad


# Extremes ----------------------------------------------------------------------------------------------------


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    tensors = student(9, 40)
    log_q = torch.log_softmax(F.linear(*tensors) / 2, dim=1)
    top, ids = log_q.topk(4, dim=1)
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    for x in results(linear_topk_kl_div, tensors, ids, top, tail, 2.0):
        assert float(x.abs().max()) < 1e-14


def test_no_tail_and_nothing_but_tail(forced):
    """The teacher's mass all at ids, or all elsewhere; a student's likewise, as far as its logits reach."""
    h = torch.tensor([[1.0], [1.0], [60.0], [-60.0]])
    W = torch.tensor([[1.0], [0.5], [-1.0], [-0.7], [0.0]])
    ids = torch.tensor([[0, 1]] * 4)
    log_p = torch.tensor([[0.3, 0.7], [0.0, 0.0], [0.3, 0.7], [0.5, 0.25]]).log()
    log_tail = torch.tensor([0.0, 1.0, 0.0, 0.25]).log()
    of_teacher = ids, log_p, log_tail
    found = results(linear_topk_kl_div, [h, W, None], *of_teacher, 2.0)
    assert all(x.isfinite().all() for x in found)
    with distilbert_fast.backend("torch"):
        exact = results(linear_topk_kl_div, [h.double(), W.double(), None], *of_teacher, 2.0)
    close(found, exact, rtol=1e-5, atol=1e-5)


def test_extremes_stay_finite_and_one_bad_row_is_its_own(forced):
    h = torch.tensor([[200.0], [-200.0], [0.0]])
    W, b = torch.tensor([[1.0], [-1.0], [0.0]]), None
    ids = torch.tensor([[0], [0], [1]])
    log_p, log_tail = torch.tensor([[0.0], [-1e-6], [-200.0]]), torch.tensor([-torch.inf, -13.8, 0.0])
    kl, _, dh, dW = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail)
    assert all(x.isfinite().all() for x in (kl, dh, dW))
    h[1] = torch.nan
    mask = torch.tensor([True, False, True])
    kl, _, dh, _ = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail, 1.0, mask)
    assert kl.isfinite() and (dh[1] == 0).all()
    kl, _, dh, _ = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail)
    assert kl.isnan() and dh[1].isnan().all() and dh[[0, 2]].isfinite().all()


@pytest.mark.parametrize("at", ["ids", "tail"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_logit_is_not_lost(at, bad, forced):
    h, W, b = student(3, 33, dtype=torch.float32)
    ids, log_p, log_tail = targets(3, 33, 5, dtype=torch.float32)[0]
    b[ids[1, 2] if at == "ids" else next(v for v in range(33) if v not in ids)] = bad
    kl, _, dh, _, _ = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail)
    assert not kl.isfinite() and not dh[1].isfinite().any()


# Layouts, bits, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_untouched_inputs(layout, dtype, forced):
    of_teacher, (kd_mask, labels) = targets(9, 33, 5, 2.0, dtype=torch.float32)[0], rows(9, 33)
    tensors = student(9, 33, 16, dtype)
    expected = results(linear_topk_kl_div, tensors, *of_teacher, 2.0, kd_mask, labels)
    given = [*tensors, *of_teacher]
    laid = [lay_out(x, layout) if x.dim() == 2 else lay_out(x[:, None], layout)[:, 0] for x in given]
    wide = torch.stack([kd_mask, ~kd_mask], dim=1)[:, 0], torch.stack([labels, labels], dim=1)[:, 1]
    before = [x.clone() for x in laid]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    close(results(linear_topk_kl_div, laid[:3], *laid[3:], 2.0, *wide), expected, **tolerance)
    assert all(torch.equal(x, old) for x, old in zip(laid, before, strict=True))


def test_same_bits_every_run_and_without_gradients(monkeypatch, forced):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 16)
    arguments = (*targets(70, 501, 20, 2.0)[0], 2.0, *rows(70, 501))
    tensors = student(70, 501, 32, torch.float32)
    first = results(linear_topk_kl_div, tensors, *arguments)
    for _ in range(3):
        assert all(map(torch.equal, results(linear_topk_kl_div, tensors, *arguments), first))
    assert all(map(torch.equal, linear_topk_kl_div(*tensors, *arguments), first[:2]))


def test_backward_twice_changes_nothing(forced):
    leaves = [x.requires_grad_() for x in student(9, 33, dtype=torch.float32)]
    kl, ce = linear_topk_kl_div(*leaves, *targets(9, 33, 5, 2.0)[0], 2.0, *rows(9, 33))
    once = torch.autograd.grad(kl + 2 * ce, leaves, retain_graph=True)
    copies = [x.clone() for x in once]
    for x in once:
        x.mul_(7)
    assert all(map(torch.equal, torch.autograd.grad(kl + 2 * ce, leaves), copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "k"), [(5003, 64), (19, 3), (1, 1)])
def test_the_native_rows_have_the_same_bits_on_any_number_of_threads(v, k, dtype, tier):
    """And nothing is written beside them. The products around them are torch's."""
    n, n_kl = 23, 17
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(n, v, generator=generator).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator).masked_fill(torch.arange(n) % 3 == 0, -1)
    ids, log_p, log_tail = targets(n_kl, v, k, 2.0, dtype=torch.float32)[0]
    kept = labels >= 0

    def everything(threads, gradient=True):
        sizes = (n_kl, n, int(kept.sum()) * v if gradient else 0)
        out = [torch.full((size + 3,), 7.0) for size in sizes]
        out[2] = out[2].to(dtype)
        logits = torch.cat([s.flatten(), s.new_full((3,), 7.0)])
        backends.cpu().linear_topk_kl_div(
            *(logits.data_ptr(), 0 if dtype == torch.float32 else 1, n, n_kl, v, 2.0),
            *(ids.data_ptr(), log_p.data_ptr(), log_tail.data_ptr(), k, labels.data_ptr(), gradient),
            *(x.data_ptr() for x in out),
            threads,
        )
        for x in (logits, *out):
            assert (x[-3:] == 7).all()
        return [logits[:-3].view(n, v), *(x[:-3] for x in out)]

    first = everything(1)
    for threads in (2, 3, 1, 5):
        assert all(map(torch.equal, everything(threads), first))
    assert all(map(torch.equal, everything(2, gradient=False)[1:3], first[1:3]))
    assert torch.equal(first[0][n_kl:], s[n_kl:]), "rows without a teacher stay logits"
    torch.testing.assert_close(first[2][kept], F.cross_entropy(s[kept].float(), labels[kept], reduction="none"))
    assert (first[2][~kept] == 0).all()


def test_memory_is_that_of_a_chunk(monkeypatch):
    """The gradient of the KL stands where the logits were."""
    made = []
    empty = shared.backends.empty_cpu
    monkeypatch.setattr(shared.backends, "empty_cpu", lambda like: made.append(tuple(like.shape)) or empty(like))
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 8)
    with distilbert_fast.backend("cpu"):
        results(linear_topk_kl_div, student(40, 33, dtype=torch.float32), *targets(40, 33, 5)[0], 1.0)
    assert [shape for shape in made if 33 in shape] == [(1, 33, 6), (8, 33)]


@pytest.mark.parametrize("counted", ["some", "none"])
def test_sums(chunk, counted):
    """Losses and gradients that are not divided by the counts of rows, whatever the chunks."""
    tensors, of_teacher, (kd_mask, labels) = student(9, 7), targets(9, 7, 3, 2.0)[0], rows(9, 7)
    if counted == "none":
        kd_mask, labels = torch.zeros_like(kd_mask), torch.full_like(labels, IGNORE)
    call = *of_teacher, 2.0, kd_mask, labels
    found = results(linear_topk_kl_div, tensors, *call, reduction="sum")
    close(found, results(linear_topk_kl_div_reference, tensors, *call, reduction="sum"))
    means = linear_topk_kl_div(*tensors, *call)
    counts = int(kd_mask.sum()), int((labels != IGNORE).sum())
    close(found[:2], [mean * count for mean, count in zip(means, counts, strict=True)])
    close(linear_topk_kl_div(*tensors, *call, reduction="sum"), found[:2])


# torch's own machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(labelled):
    (kd_mask, labels), of_teacher = rows(5, 7), targets(5, 7, 2, dtype=torch.float32)[0]
    forward = torch.ops.distilbert_fast.linear_topk_kl_div_forward.default
    call = (*student(5, 7, dtype=torch.float32), *of_teacher, kd_mask, labels if labelled else None, 2.0, IGNORE)
    for gradients in ((True, True, True), (False, True, False), (False, False, False)):
        torch.library.opcheck(forward, (*call, *gradients))


def test_compile():
    arguments = (*targets(6, 33, 4, 2.0, dtype=torch.float32)[0], 2.0, *rows(6, 33))
    tensors = student(6, 33, dtype=torch.float32)
    compiled = torch.compile(linear_topk_kl_div, backend="aot_eager", fullgraph=True)
    expected = results(linear_topk_kl_div, tensors, *arguments)
    close(results(compiled, tensors, *arguments), expected)
    close(compiled(*tensors, *arguments), expected[:2])


def test_fake_tensors():
    for dtype in DTYPES:
        with FakeTensorMode():
            h, W, b = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in ((4, 6), (9, 6), (9,)))
            of_teacher = torch.empty(4, 3, dtype=torch.int64), torch.empty(4, 3), torch.empty(4)
            counted = torch.empty(4, dtype=torch.bool), torch.empty(4, dtype=torch.int64)
            kl, ce = linear_topk_kl_div(h, W, b, *of_teacher, 2.0, *counted)
            gradients = torch.autograd.grad(kl + ce, (h, W, b))
            assert [(x.shape, x.dtype) for x in gradients] == [((4, 6), dtype), ((9, 6), dtype), ((9,), dtype)]


def test_autocast_is_that_of_a_product():
    of_teacher, (kd_mask, labels) = targets(7, 33, 5)[0], rows(7, 33)
    tensors = student(7, 33, dtype=torch.float32)
    with distilbert_fast.backend("torch"):
        with torch.autocast("cpu", torch.bfloat16):
            found = results(linear_topk_kl_div, tensors, *of_teacher, 1.0, kd_mask, labels)
        assert all(x.dtype == torch.float32 for x in found)
        low = [x.bfloat16() for x in tensors]
        close(found, results(linear_topk_kl_div, low, *of_teacher, 1.0, kd_mask, labels), rtol=0, atol=0)


# Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"W": torch.ones(5, 7)}, ValueError, r"W must be of shape [V, 6], got [5, 7]"),
        ({"b": torch.ones(5).double()}, TypeError, r"b must be float32, got float64"),
        ({"ids": torch.zeros(4, 2)}, TypeError, r"ids must be int64, got float32"),
        ({"ids": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"ids must be 1 to V = 5 a row, got 0"),
        ({"ids": torch.tensor([[0, 5]] * 4)}, ValueError, r"ids must be in [0, V = 5), got 5"),
        ({"ids": torch.tensor([[0, 1]] * 3 + [[-1, 0]])}, ValueError, r"ids must be in [0, V = 5), got -1"),
        ({"log_p": torch.zeros(4, 3)}, ValueError, r"log_p must be of shape [4, 2], got [4, 3]"),
        ({"log_tail": torch.zeros(4, 1)}, ValueError, r"log_tail must be of shape [4], got [4, 1]"),
        ({"temperature": 0}, ValueError, r"temperature must be finite and above 0, got 0"),
        ({"kd_mask": torch.ones(4)}, TypeError, r"kd_mask must be bool, got float32"),
        ({"kd_mask": torch.ones(5) > 0}, ValueError, r"kd_mask must be of shape [4], got [5]"),
        ({"labels": torch.ones(4)}, TypeError, r"labels must be int64, got float32"),
        (
            {"labels": torch.tensor([0, 5, 1, IGNORE])},
            ValueError,
            r"labels must be in [0, V = 5) or ignore_index = -100, got 5",
        ),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an integer, got float"),
        ({"reduction": "none"}, ValueError, r"reduction must be one of 'mean', 'sum', got 'none'"),
    ],
)
def test_bad_input(changed, error, message, forced):
    h, W, b = student(4, 5, dtype=torch.float32)
    (ids, log_p, log_tail), _ = targets(4, 5, 2)
    call = {"h": h, "W": W, "b": b, "ids": ids, "log_p": log_p, "log_tail": log_tail} | changed
    with pytest.raises(error) as caught:
        linear_topk_kl_div(**call)
    assert str(caught.value) == f"linear_topk_kl_div: {message}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    ids, *masses = targets(40, 700, 64, 2.0, dtype=torch.float32)[0]
    of_teacher = [x.cuda() for x in (ids, *masses)]
    tensors = [x.cuda() for x in student(40, 700, dtype=dtype)]
    counted = [x.cuda() for x in rows(40, 700)]
    ours = results(linear_topk_kl_div, tensors, *of_teacher, 2.0, *counted)
    torchs = results(linear_topk_kl_div_reference, tensors, *of_teacher, 2.0, *counted)
    oracle = results(linear_topk_kl_div_reference, [x.double() for x in tensors], *of_teacher, 2.0, *counted)
    for what, *three in zip(NAMES, ours, torchs, oracle, strict=True):
        assert_twice_rule(*three, what)
