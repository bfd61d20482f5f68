"""layer_norm with a residual, forward and backward, and with codes, against torch as users write it and torch.compile.

The shape is a training batch of DistilBERT: 4,096 tokens (65,536 on a GPU) of 768.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from distilbert_fast.testing import logits

N, C, EPS = (4096 if DEVICE.type == "cpu" else 65_536), 768, 1e-12


def torch_norm(x, weight, bias, residual):
    return F.layer_norm(x + residual, (C,), weight, bias, EPS)


def torch_codes(x, weight, bias, residual):
    y = torch_norm(x, weight, bias, residual)
    scale = y.abs().amax(dim=1) / 127
    return y, (y / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def arguments(dtype):
    """x, weight, bias, residual."""
    x, residual = (logits(N, C, dtype, seed, 1.0, DEVICE) for seed in (1, 2))
    return [x, torch.ones(C, dtype=dtype, device=DEVICE), torch.zeros(C, dtype=dtype, device=DEVICE), residual]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype):
    tensors, dy = arguments(dtype), logits(N, C, dtype, 3, 1.0, DEVICE)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch._dynamo.reset()
    norms = {OURS: lambda *t: distilbert_fast.layer_norm(*t, EPS), "torch": torch_norm}
    norms["torch.compile"] = torch.compile(torch_norm, dynamic=False)
    forget = forgetting(*leaves)

    agreed = None
    for norm in norms.values():  # right before fast
        forget()
        norm(*leaves).backward(dy)
        found = torch.stack([leaf.grad.float().norm() for leaf in leaves])
        agreed = found if agreed is None else agreed
        torch.testing.assert_close(found, agreed, rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=0)

    matrix = tensors[0].nbytes  # x, residual, y; dy, x, residual, and a gradient for each of the two
    contenders = {
        name: Contender(lambda norm=norm: norm(*leaves).backward(dy), forget, 8 * matrix)
        for name, norm in norms.items()
    }
    hold_contest(contenders | {TRIAD: triad(tensors[0], tensors[3])}, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantize(hold_contest, dtype):
    tensors = arguments(dtype)
    torch._dynamo.reset()
    norms = {OURS: lambda *t: distilbert_fast.layer_norm_quantize(*t, EPS), "torch": torch_codes}
    norms["torch.compile"] = torch.compile(torch_codes, dynamic=False)
    agreed = distilbert_fast.layer_norm_quantize(*tensors, EPS)[1].int()
    for norm in norms.values():  # right before fast
        assert (norm(*tensors)[1] - agreed).abs().max() <= (1 if dtype == torch.float32 else 2)
    matrix = tensors[0].nbytes
    moved = 3 * matrix + agreed.numel()
    contenders = {
        name: Contender(lambda norm=norm: norm(*tensors), lambda: None, moved) for name, norm in norms.items()
    }
    hold_contest(contenders | {TRIAD: triad(tensors[0], tensors[3])}, matrix)
