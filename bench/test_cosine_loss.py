"""cosine_loss, loss and gradient of the student, against torch.nn.CosineEmbeddingLoss and torch.compile of it.

The shape is a distillation batch of DistilBERT: 4,096 tokens (65,536 on a GPU) of 768.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from distilbert_fast.testing import logits

N, C = (4096 if DEVICE.type == "cpu" else 65_536), 768


def torch_loss(student, teacher):
    return F.cosine_embedding_loss(student, teacher, torch.ones(1, dtype=student.dtype, device=student.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype):
    student = logits(N, C, dtype, 1, 1.0, DEVICE).requires_grad_()
    teacher = logits(N, C, dtype, 2, 1.0, DEVICE)
    torch._dynamo.reset()
    losses = {OURS: distilbert_fast.cosine_loss, "torch": torch_loss}
    losses["torch.compile"] = torch.compile(torch_loss, dynamic=False)
    forget = forgetting(student)
    agreed = None
    for loss in losses.values():  # right before fast
        forget()
        value = loss(student, teacher)
        value.backward()
        found = value.item(), student.grad.float().norm().item()
        agreed = agreed or found
        assert found == pytest.approx(agreed, rel=1e-3 if dtype == torch.float32 else 5e-2)
    matrix = teacher.nbytes
    contenders = {
        name: Contender(lambda loss=loss: loss(student, teacher).backward(), forget, 5 * matrix)
        for name, loss in losses.items()
    }
    contenders[TRIAD] = triad(student.detach(), teacher)
    hold_contest(contenders, matrix)
