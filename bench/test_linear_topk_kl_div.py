"""linear_topk_kl_div, both losses and the student's gradients, against torch with stored logits.

A student of 384 hidden units on 256 tokens (8,192 on a GPU), 15% of them with a label, vocabulary 30,522; 64 tokens a
row of the teacher.
"""

from __future__ import annotations

import pytest
import torch

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from bench.vocabulary_losses import some_labels, steps
from distilbert_fast.ops.linear_topk_kl_div import linear_topk_kl_div_reference

N, V, C, K = (256 if DEVICE.type == "cpu" else 8192), 30_522, 384, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype):
    g = torch.Generator().manual_seed(0)
    student = [torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) / C**0.5, torch.randn(V, generator=g)]
    student = [x.to(DEVICE, dtype).requires_grad_() for x in student]
    log_p = torch.randn(N, V, generator=g).mul(3).log_softmax(dim=-1)
    log_p, ids = log_p.topk(K, dim=-1)
    log_tail = (1 - log_p.exp().sum(dim=-1)).clamp_min(1e-9).log()
    teacher = [x.to(DEVICE) for x in (ids, log_p, log_tail)]
    labels = some_labels(N, V, g)
    forget = forgetting(*student)

    losses = {OURS: distilbert_fast.linear_topk_kl_div, "torch": linear_topk_kl_div_reference}
    calls = steps(losses, [*student, *teacher], labels, dtype)
    forget()
    moved = sum(2 * x.nbytes for x in student) + sum(x.nbytes for x in teacher)
    unit = "fp32" if dtype == torch.float32 else "bf16"
    contenders = {name: Contender(call, forget, moved, 6 * N * C * V, unit) for name, call in calls.items()}
    contenders[TRIAD] = triad(student[1].detach(), student[1].detach())
    hold_contest(contenders, N * V * student[0].element_size())
