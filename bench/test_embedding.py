"""embedding, forward and forward with backward, against torch as users write it and torch.compile.

The shape is a training batch of DistilBERT: 4,096 tokens (65,536 on a GPU) of 768 out of a vocabulary of 30,522.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, forgetting, triad
from distilbert_fast.testing import logits

N, V, P, C, EPS = (4096 if DEVICE.type == "cpu" else 65_536), 30_522, 512, 768, 1e-12


def torch_embedding(ids, positions, word, position, weight, bias):
    return F.layer_norm(F.embedding(ids, word) + F.embedding(positions, position), (C,), weight, bias, EPS)


def our_embedding(*arguments):
    return distilbert_fast.embedding(*arguments, eps=EPS)


@pytest.mark.parametrize("trained", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tokens(hold_contest, dtype, trained):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    positions = torch.arange(N, device=DEVICE) % P
    tables = [logits(rows, C, dtype, rows, 1.0, DEVICE) for rows in (V, P)]
    tables += [torch.ones(C, dtype=dtype, device=DEVICE), torch.zeros(C, dtype=dtype, device=DEVICE)]
    tables = [table.requires_grad_(trained) for table in tables]
    dy = logits(N, C, dtype, 3, 1.0, DEVICE)
    torch._dynamo.reset()
    functions = {OURS: our_embedding, "torch": torch_embedding}
    functions["torch.compile"] = torch.compile(torch_embedding, dynamic=False)
    forget = forgetting(*tables)

    def step(function):
        y = function(ids, positions, *tables)
        if trained:
            y.backward(dy)
        return y

    agreed = our_embedding(ids, positions, *tables).detach()
    for function in functions.values():  # right before fast
        forget()
        tolerance = 1e-5 if dtype == torch.float32 else 6e-2
        torch.testing.assert_close(step(function).detach(), agreed, rtol=tolerance, atol=tolerance)
    matrix = dy.nbytes
    moved = 2 * matrix + (3 * matrix + tables[0].nbytes if trained else 0)  # and the gradient of the vocabulary
    contenders = {
        name: Contender(lambda function=function: step(function), forget, moved) for name, function in functions.items()
    }
    contenders[TRIAD] = triad(dy, dy)
    hold_contest(contenders, matrix)
