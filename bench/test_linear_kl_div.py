"""linear_kl_div, both losses and the gradients of the student, against torch with stored logits.

A student of half the teacher's width on 256 tokens (8,192 on a GPU), 15% of them with a label, vocabulary 30,522.
"""

from __future__ import annotations

import pytest
import torch

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from bench.vocabulary_losses import some_labels, steps
from distilbert_fast.ops.linear_kl_div import linear_kl_div_reference

N, V, C_S, C_T = (256 if DEVICE.type == "cpu" else 8192), 30_522, 384, 768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student = [random(N, C_S), random(V, C_S) / C_S**0.5, random(V)]
    teacher = [random(N, C_T), random(V, C_T) / C_T**0.5, random(V)]
    student = [x.to(DEVICE, dtype).requires_grad_() for x in student]
    teacher = [x.to(DEVICE, dtype) for x in teacher]
    labels = some_labels(N, V, generator)
    forget = forgetting(*student)

    def by_torch(*arguments):
        with distilbert_fast.backend("torch"):
            return distilbert_fast.linear_kl_div(*arguments)

    losses = {OURS: distilbert_fast.linear_kl_div, f"{OURS}, torch": by_torch, "torch": linear_kl_div_reference}
    calls = steps(losses, [*student, *teacher], labels, dtype)
    forget()

    matrix = N * V * teacher[0].element_size()
    moved = sum(x.nbytes for x in [*student, *student, *teacher])  # inputs and gradients; the logits need no memory
    contenders = {name: Contender(call, forget, moved) for name, call in calls.items()}
    contenders[TRIAD] = triad(teacher[1], teacher[1])
    hold_contest(contenders, matrix)
