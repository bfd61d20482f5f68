"""quantize, a scale for each row, against torch as users write it and torch.compile.

The shape is the widest that is quantized in DistilBERT: 1,024 tokens (65,536 on a GPU) of 3,072.
"""

from __future__ import annotations

import pytest
import torch

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, triad
from distilbert_fast.testing import logits

N, C = (1024 if DEVICE.type == "cpu" else 65_536), 3072


def torch_quantize(x):
    scale = x.abs().amax(dim=1) / 127
    return (x / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows(hold_contest, dtype):
    x = logits(N, C, dtype, 1, 1.0, DEVICE)
    torch._dynamo.reset()
    functions = {OURS: distilbert_fast.quantize, "torch": torch_quantize}
    functions["torch.compile"] = torch.compile(torch_quantize, dynamic=False)
    agreed = distilbert_fast.quantize(x)[0].int()
    for function in functions.values():  # right before fast
        assert (function(x)[0] - agreed).abs().max() <= 1
    contenders = {
        name: Contender(lambda function=function: function(x), lambda: None, x.nbytes + x.numel())
        for name, function in functions.items()
    }
    contenders[TRIAD] = triad(x, x)
    hold_contest(contenders, x.nbytes)
