"""int8_linear with bias and GELU, against oneDNN's int8 product with the same epilogue, torch._int_mm and bf16.

The feed-forward's first layer of DistilBERT: 768 to 3,072, for one token, a sentence and a batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, triad

C, WIDE = 768, 3072


@pytest.mark.parametrize("n", [16, 128, 1024])
def test_gelu(hold_contest, n):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, C, generator=g).to(DEVICE), torch.randn(WIDE, C, generator=g).to(DEVICE) / C**0.5
    bias = torch.randn(WIDE, generator=g).to(DEVICE)
    x_q, x_scale = distilbert_fast.quantize(x)
    w_q, w_scale = distilbert_fast.quantize(weight)

    def by_int_mm():
        y = torch._int_mm(x_q, w_q.t()).float() * x_scale[:, None] * w_scale + bias
        return F.gelu(y)

    functions = {
        OURS: lambda: distilbert_fast.int8_linear(x_q, x_scale, w_q, w_scale, bias, "gelu"),
        "torch._int_mm": by_int_mm,
    }
    codes = [code.double() * scale[:, None].double() for code, scale in ((x_q, x_scale), (w_q, w_scale))]
    expected = F.gelu(F.linear(*codes, bias.double()))
    for name, function in functions.items():  # right before fast
        torch.testing.assert_close(function().double(), expected, rtol=1e-4, atol=1e-3, msg=name)
    x_16, w_16, bias_16 = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    functions["torch, bf16"] = lambda: F.gelu(F.linear(x_16, w_16, bias_16))
    moved, work = n * C + WIDE * C + 4 * n * WIDE, 2 * n * C * WIDE
    contenders = {
        name: Contender(function, lambda: None, moved, work, "bf16" if "bf16" in name else "int8")
        for name, function in functions.items()
    }
    contenders[TRIAD] = triad(weight, weight)
    hold_contest(contenders, w_q.nbytes)
