"""linear, forward and backward, against torch's: 1,024 tokens through the feed-forward's first layer of DistilBERT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad

N, C, WIDE = 1024, 768, 3072


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_backward(hold_contest, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = ((N, C), (WIDE, C), (WIDE,))
    leaves = [torch.randn(*size, generator=g).to(DEVICE, dtype).requires_grad_() for size in sizes]
    dy = torch.randn(N, WIDE, generator=g).to(DEVICE, dtype)
    forget = forgetting(*leaves)
    functions = {OURS: distilbert_fast.linear, "torch": F.linear}
    agreed = None
    for function in functions.values():  # right before fast
        forget()
        function(*leaves).backward(dy)
        found = torch.stack([leaf.grad.float().norm() for leaf in leaves])
        agreed = found if agreed is None else agreed
        torch.testing.assert_close(found, agreed, rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=0)
    forget()
    moved = sum(2 * leaf.nbytes for leaf in leaves) + 2 * dy.nbytes
    unit = "fp32" if dtype == torch.float32 else "bf16"
    contenders = {
        name: Contender(lambda function=function: function(*leaves).backward(dy), forget, moved, 6 * N * C * WIDE, unit)
        for name, function in functions.items()
    }
    contenders[TRIAD] = triad(dy, dy)
    hold_contest(contenders, leaves[1].nbytes)
