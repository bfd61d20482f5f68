"""kl_div and linear_kl_div of a distillation batch of DistilBERT: 16,384 tokens, vocabulary 30,522, bf16."""

from __future__ import annotations

import torch

import distilbert_fast
from bench.gpu.measure import Case, Work, compiled, run
from bench.gpu.records import Records, Where
from bench.harness.contest import forgetting
from bench.test_kl_div import liger_loss, maskable_loss, torch_loss
from distilbert_fast.ops.linear_kl_div import linear_kl_div_reference

TEMPERATURE = 2.0
DTYPE = torch.bfloat16


def kl_div(where: Where, records: Records) -> None:
    """Loss and gradient: each of three [N, V] matrices crosses memory once."""
    n, v = where.size((16_384, 30_522), (8, 67))
    torch.manual_seed(0)
    student = torch.empty(n, v, dtype=DTYPE, device=where.device)
    teacher = torch.empty_like(student)
    for x in (student, teacher):
        x.normal_(0, 4)
    student.requires_grad_()

    forget = forgetting(student)

    def step(loss):
        def call():
            value = loss(student, teacher, None)
            value.backward()
            return value, student.grad

        return call

    work = Work(moved_bytes=3 * teacher.nbytes)
    case = Case("kl_div", f"loss and gradient, {n} x {v}, bf16", work, "torch", 0.05, forget)
    for suffix, recompute in (("", False), (", recompute", True)):

        def loss(s, t, m, recompute=recompute):
            return distilbert_fast.kl_div(s, t, TEMPERATURE, m, recompute=recompute)

        case.ours(where, (DTYPE, DTYPE), lambda loss=loss: step(loss), suffix)
    case.calls["torch"] = step(torch_loss)
    with compiled() as compile:
        case.rival(where, "Liger", lambda: step(liger_loss), "liger_kernel")
        case.rival(where, "torch.compile", lambda: step(compile(maskable_loss)), compiled=True)
        run(case, where, records)


def linear_kl_div(where: Where, records: Records) -> None:
    """Both losses and the student's gradients: one product of each side and two for the gradients, [N, C] by [C, V]."""
    n, v, c = where.size((16_384, 30_522, 768), (20, 67, 12))
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=where.device)

    student = [random(n, c).requires_grad_(), (random(v, c) / c**0.5).requires_grad_(), random(v).requires_grad_()]
    teacher = [random(n, c), random(v, c) / c**0.5, random(v)]
    masked = torch.rand(n, device=where.device) < 0.15
    labels = torch.randint(0, v, (n,), device=where.device).masked_fill(~masked, -100)

    forget = forgetting(*student)

    def step(loss, mask):
        def call():
            kl, ce = loss(*student, *teacher, TEMPERATURE, mask, labels)
            (5 * kl + 2 * ce).backward()
            return kl, ce, *(x.grad for x in student)

        return call

    for rows, mask in (("all rows", None), ("15% of the rows", masked)):
        counted = n if mask is None else int(mask.sum())
        work = Work(operations=4 * 2 * counted * c * v)
        case = Case("linear_kl_div", f"{rows} of {n} x {c}, V={v}, bf16", work, "torch", 0.05, forget)
        case.ours(where, (DTYPE, DTYPE), lambda mask=mask: step(distilbert_fast.linear_kl_div, mask))
        case.calls["torch"] = step(linear_kl_div_reference, mask)
        with compiled() as compile:
            case.rival(
                where, "torch.compile", lambda mask=mask: step(compile(linear_kl_div_reference), mask), compiled=True
            )
            run(case, where, records)
    _without_bias(where, records, student, teacher, forget)


def _without_bias(where, records, student, teacher, forget) -> None:
    """Liger's fused loss knows neither bias nor τ² nor a cross-entropy on other rows: the KL alone, beside ours."""
    (h_s, w_s, _), (h_t, w_t, _) = student, teacher
    n, v, c = *h_s.shape[:1], *w_s.shape

    def step(loss):
        def call():
            kl = loss()
            kl.backward()
            return kl, h_s.grad, w_s.grad

        return call

    def ours():
        return distilbert_fast.linear_kl_div(h_s, w_s, None, h_t, w_t, None, TEMPERATURE)[0]

    def eager():
        return linear_kl_div_reference(h_s, w_s, None, h_t, w_t, None, TEMPERATURE)[0]

    def liger():
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
        return step(lambda: TEMPERATURE**2 * loss(h_s, w_s, h_t, w_t))

    work = Work(operations=4 * 2 * n * c * v)
    case = Case("linear_kl_div", f"KL alone, no bias, {n} x {c}, V={v}, bf16", work, "torch", 0.05, forget)
    case.ours(where, (DTYPE, DTYPE), lambda: step(ours))
    case.calls["torch"] = step(eager)
    case.rival(where, "Liger fused_linear_jsd", liger, "liger_kernel")
    run(case, where, records)
