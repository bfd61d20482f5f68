"""codebook_linear, forward, against torch that looks the weights up first, and against whole weights.

The feed-forward's first layer of DistilBERT, 768 to 3,072, with codes of 8 and of 4 bits, a codebook for all or for
each 16 rows; 16 and 128 tokens. What the engine does with 4 bits is in test_codebook16.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, triad
from distilbert_fast.ops.codebook_linear import codebook_linear_reference, pack_codes

C, WIDE = 768, 3072


@pytest.mark.parametrize("n", [16, 128])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 16)], ids=["8_bits", "4_bits_a_group"])
def test_forward(hold_contest, bits, group_size, n):
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(n, C, generator=g).to(DEVICE), torch.randn(WIDE, generator=g).to(DEVICE)
    codes = torch.randint(0, 2**bits, (WIDE, C), dtype=torch.uint8, generator=g)
    codebook = torch.randn(*([] if group_size is None else [WIDE // group_size]), 2**bits, generator=g).to(DEVICE)
    packed = pack_codes(codes, bits).to(DEVICE)
    arguments = x, packed, codebook, bias, bits, group_size
    eye = torch.eye(C, device=DEVICE)
    weight = codebook_linear_reference(eye, packed, codebook, None, bits, group_size).t().contiguous()
    functions = {
        OURS: lambda: distilbert_fast.codebook_linear(*arguments),
        "torch, looked up": lambda: codebook_linear_reference(*arguments),
        "torch, whole weights": lambda: F.linear(x, weight, bias),
    }
    with torch.inference_mode():
        expected = F.linear(x.double(), weight.double(), bias.double())
        for name, function in functions.items():  # right before fast
            torch.testing.assert_close(function().double(), expected, rtol=1e-4, atol=1e-3, msg=name)
    moved, work = packed.nbytes + codebook.nbytes + x.nbytes + 4 * n * WIDE, 2 * n * C * WIDE
    contenders = {
        name: Contender(function, lambda: None, weight.nbytes if "whole" in name else moved, work)
        for name, function in functions.items()
    }
    contenders[TRIAD] = triad(weight, weight)
    hold_contest(contenders, weight.nbytes)
