"""linear_topk_kl_div against its definition, the full KL, and what it must refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from distilbert_fast import linear_kl_div, linear_topk_kl_div
from distilbert_fast.ops import linear_topk_kl_div as op
from distilbert_fast.ops.linear_topk_kl_div import linear_topk_kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out


def student(n, v, c=6, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, W, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, c), (v, c), (v,)))
    return [h.to(dtype), (2 / math.sqrt(c) * W).to(dtype), b.to(dtype) if bias else None]


def targets(n, v, k, temperature=1.0, seed=1):
    """ids, log_p, log_tail of random logits, and these logits."""
    logits = 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_p = torch.log_softmax(logits / temperature, dim=1)
    top, ids = log_p.topk(k, dim=1)
    return (ids, top, log_p.scatter(1, ids, -torch.inf).logsumexp(dim=1)), logits


def results(function, tensors, *arguments):
    """The loss and the gradients for h, W and b of three times it."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    kl = function(*leaves, *arguments)
    return [kl.detach(), *torch.autograd.grad(3 * kl, [x for x in leaves if x is not None])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "v", "k"), [(0, 5, 2), (1, 1, 1), (3, 2, 1), (7, 33, 5), (7, 33, 33), (40, 700, 64)])
def test_it_is_its_definition(dtype, n, v, k, monkeypatch):
    monkeypatch.setattr(op, "chunk_rows", lambda v, device: 16)
    for temperature, masked, bias in ((1.0, False, True), (2.5, True, False)):
        mask = torch.arange(n) % 3 != 1 if masked else None
        (ids, *masses), _ = targets(n, v, k, temperature)
        of_teacher = ids, *(x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in masses)
        tensors = student(n, v, dtype=dtype, bias=bias)
        exact = [None if x is None else x.double() for x in tensors]
        ours = results(linear_topk_kl_div, tensors, *of_teacher, temperature, mask)
        torchs = results(linear_topk_kl_div_reference, tensors, *of_teacher, temperature, mask)
        oracle = results(linear_topk_kl_div_reference, exact, *of_teacher, temperature, mask)
        for what, *three in zip(("kl", "dh", "dW", "db"), ours, torchs, oracle, strict=False):
            assert_twice_rule(*three, what)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_known_give_the_full_kl_and_fewer_a_bound_that_grows(temperature):
    n, v = 12, 50
    tensors = student(n, v)
    identity = torch.eye(v, dtype=torch.float64)
    mask = torch.arange(n) % 4 != 0
    bounds = []
    for k in (1, 2, 5, 20, 40, v):
        of_teacher, logits = targets(n, v, k, temperature)
        bounds.append(results(linear_topk_kl_div, tensors, *of_teacher, temperature, mask))
    full = results(lambda *x: linear_kl_div(*x, logits, identity, None, temperature, mask)[0], tensors)
    for ours, whole in zip(bounds[-1], full, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-13)
    kls = [float(of_k[0]) for of_k in bounds]
    assert kls == sorted(kls) and kls[0] > 0


def test_without_gradients_it_is_the_same_and_some_gradients_are_not_made():
    of_teacher, _ = targets(7, 33, 5)
    h, W, b = student(7, 33)
    alone = linear_topk_kl_div(h, W, b, *of_teacher)
    kl, _, dW, _ = results(linear_topk_kl_div, [h, W, b], *of_teacher)
    assert torch.equal(alone, kl) and not alone.requires_grad
    leaf = W.clone().requires_grad_()
    (3 * linear_topk_kl_div(h, leaf, b, *of_teacher)).backward()
    assert torch.equal(leaf.grad, dW)


def test_gradcheck():
    for k in (3, 11):
        of_teacher, _ = targets(5, 11, k, 2.0)
        leaves = [x.requires_grad_() for x in student(5, 11)]
        assert torch.autograd.gradcheck(lambda *x, t=of_teacher: linear_topk_kl_div(*x, *t, 2.0), leaves)


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    tensors = student(9, 40)
    log_q = torch.log_softmax(F.linear(*tensors) / 2, dim=1)
    top, ids = log_q.topk(4, dim=1)
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    for x in results(linear_topk_kl_div, tensors, ids, top, tail, 2.0):
        assert float(x.abs().max()) < 1e-14


def test_extremes_stay_finite_and_one_bad_row_is_its_own():
    h = torch.tensor([[200.0], [-200.0], [0.0]])
    W, b = torch.tensor([[1.0], [-1.0], [0.0]]), None
    ids = torch.tensor([[0], [0], [1]])
    log_p, log_tail = torch.tensor([[0.0], [-1e-6], [-200.0]]), torch.tensor([-torch.inf, -13.8, 0.0])
    kl, dh, dW = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail)
    assert all(x.isfinite().all() for x in (kl, dh, dW))
    h[1] = torch.nan
    mask = torch.tensor([True, False, True])
    kl, dh, _ = results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail, 1.0, mask)
    assert kl.isfinite() and (dh[1] == 0).all()
    assert results(linear_topk_kl_div, [h, W, b], ids, log_p, log_tail)[0].isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_untouched_inputs(layout):
    of_teacher, _ = targets(7, 33, 5)
    tensors = student(7, 33, dtype=torch.float32)
    laid = [lay_out(tensors[0], layout), lay_out(tensors[1], layout), tensors[2]]
    teacher = of_teacher[0], lay_out(of_teacher[1], layout), of_teacher[2]
    before = [x.clone() for x in (*laid, *teacher)]
    for ours, plain in zip(
        results(linear_topk_kl_div, laid, *teacher), results(linear_topk_kl_div, tensors, *of_teacher), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    assert all(torch.equal(x, old) for x, old in zip((*laid, *teacher), before, strict=True))


def test_autocast_is_that_of_a_product():
    of_teacher, _ = targets(7, 33, 5)
    tensors = student(7, 33, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_topk_kl_div(*tensors, *of_teacher)
    assert torch.equal(ours, linear_topk_kl_div(*[x.bfloat16() for x in tensors], *of_teacher))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"W": torch.ones(5, 7)}, ValueError, r"W must be of shape [V, 6], got [5, 7]"),
        ({"b": torch.ones(5).double()}, TypeError, r"b must be float32, got float64"),
        ({"ids": torch.zeros(4, 2)}, TypeError, r"ids must be int64, got float32"),
        ({"ids": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"ids must be 1 to V = 5 a row, got 0"),
        ({"ids": torch.tensor([[0, 5]] * 4)}, ValueError, r"ids must be in [0, V = 5), got 5"),
        ({"log_p": torch.zeros(4, 3)}, ValueError, r"log_p must be of shape [4, 2], got [4, 3]"),
        ({"log_tail": torch.zeros(4, 1)}, ValueError, r"log_tail must be of shape [4], got [4, 1]"),
        ({"temperature": 0}, ValueError, r"temperature must be finite and above 0, got 0"),
        ({"mask": torch.ones(4)}, TypeError, r"mask must be bool, got float32"),
    ],
)
def test_bad_input(changed, error, message):
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
    (ids, *masses), _ = targets(40, 700, 64, 2.0)
    of_teacher = [ids.cuda(), *(x.float().cuda() for x in masses)]
    tensors = [x.cuda() for x in student(40, 700, dtype=dtype)]
    mask = torch.arange(40, device="cuda") % 3 != 1
    ours = results(linear_topk_kl_div, tensors, *of_teacher, 2.0, mask)
    torchs = results(linear_topk_kl_div_reference, tensors, *of_teacher, 2.0, mask)
    oracle = results(linear_topk_kl_div_reference, [x.double() for x in tensors], *of_teacher, 2.0, mask)
    for what, *three in zip(("kl", "dh", "dW", "db"), ours, torchs, oracle, strict=True):
        assert_twice_rule(*three, what)
