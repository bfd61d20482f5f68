"""kl_div, loss and gradient of the student, against torch as users write it, torch.compile and Liger.

The shape is a distillation batch of DistilBERT: 512 tokens (16,384 on a GPU) by a vocabulary of 30,522.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from distilbert_fast import backends
from distilbert_fast.testing import logits

N, V, TEMPERATURE = (512 if DEVICE.type == "cpu" else 16_384), 30_522, 2.0

RECOMPUTE = f"{OURS}, recompute"


def torch_loss(student, teacher, mask):
    """What users write."""
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    log_s = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_t = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * TEMPERATURE**2


def maskable_loss(student, teacher, mask):
    """The same without a shape that depends on data, so that torch.compile fuses all of it."""
    if mask is None:
        return torch_loss(student, teacher, None)
    log_s = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_t = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(dim=-1)
    return torch.where(mask, rows, 0.0).sum() / mask.sum() * TEMPERATURE**2


def liger_loss(student, teacher, mask):
    from liger_kernel.transformers import LigerKLDIVLoss

    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    log_s = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_t = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_s, log_t) * TEMPERATURE**2


def our_loss(backend=None, recompute=False):
    """The public function, served by the backend of its own choice or by a given one."""

    def loss(student, teacher, mask):
        if backend is None:
            return distilbert_fast.kl_div(student, teacher, TEMPERATURE, mask, recompute=recompute)
        with distilbert_fast.backend(backend):
            return distilbert_fast.kl_div(student, teacher, TEMPERATURE, mask, recompute=recompute)

    return loss


def other_backends(dtype):
    """Backends that can serve here, besides the one that does so unasked; an interpreter is not timed."""
    chosen = backends.select("kl_div", DEVICE, dtype, dtype)
    for name in backends.BACKENDS:
        if name == chosen or (name == "triton" and backends.interpreted()):
            continue
        with distilbert_fast.backend(name):
            try:
                backends.select("kl_div", DEVICE, dtype, dtype)
            except distilbert_fast.BackendError:
                continue
        yield name


@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "three_rows_of_four"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype, masked):
    student = logits(N, V, dtype, seed=1, device=DEVICE).requires_grad_()
    teacher = logits(N, V, dtype, seed=2, device=DEVICE)
    mask = torch.arange(N, device=DEVICE) % 4 > 0 if masked else None
    torch._dynamo.reset()

    losses = {OURS: our_loss(), RECOMPUTE: our_loss(recompute=True)}
    losses |= {f"{OURS}, {name}": our_loss(name) for name in other_backends(dtype)}
    losses |= {"torch": torch_loss, "torch.compile": torch.compile(maskable_loss, dynamic=False)}
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        losses["Liger"] = liger_loss

    forget = forgetting(student)

    def step(loss):
        return lambda: loss(student, teacher, mask).backward()

    agreed = None
    for name, loss in losses.items():  # right before fast
        forget()
        value = loss(student, teacher, mask)
        value.backward()
        found = value.item(), student.grad.float().norm().item()
        agreed = agreed or found
        assert found == pytest.approx(agreed, rel=1e-3 if dtype == torch.float32 else 5e-2), name

    matrix = teacher.nbytes
    read = 2 * (matrix if mask is None else int(mask.sum()) * (matrix // N))
    moved = {name: (2 if name == RECOMPUTE else 1) * read + matrix for name in losses}
    contenders = {name: Contender(step(loss), forget, moved[name]) for name, loss in losses.items()}
    contenders[TRIAD] = triad(student.detach(), teacher)
    hold_contest(contenders, matrix)
