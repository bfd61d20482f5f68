"""The encoder of DistilBERT-base, random weights, on our engine in every precision, beside transformers' own forward.

Shapes: batch × tokens. `python -m bench.peers` has the other engines.
"""

from __future__ import annotations

import copy

import pytest
import torch

import distilbert_fast
from bench.harness.contest import DEVICE, OURS, TRIAD, Contender, triad

PRECISIONS = ("fp32", "bf16", "int8")
LAYERS, C, WIDE = 6, 768, 3072


@pytest.fixture(scope="module")
def model():
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    return DistilBertModel(DistilBertConfig()).eval().to(DEVICE)


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (1, 128), (8, 128)], ids=["1x16", "1x128", "8x128"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoder(hold_contest, model, precision, batch, length):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30522, (batch, length), generator=g).to(DEVICE)
    ours = distilbert_fast.optimize(copy.deepcopy(model), precision)
    theirs = copy.deepcopy(model).bfloat16() if precision == "bf16" else model

    def call(encoder):
        @torch.inference_mode()
        def run():
            return encoder(ids).last_hidden_state

        return run

    cosine = torch.cosine_similarity(call(ours)().flatten(), call(model)().flatten(), dim=0)
    assert cosine > 0.99  # right before fast
    weights = LAYERS * (4 * C * C + 2 * C * WIDE)
    size = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    work = 2 * batch * length * weights + LAYERS * 4 * batch * length * length * C
    name = "transformers, bf16" if precision == "bf16" else "transformers, fp32"
    contenders = {
        OURS: Contender(call(ours), lambda: None, weights * size, work, precision),
        name: Contender(call(theirs), lambda: None, weights * (2 if precision == "bf16" else 4), work, name[-4:]),
    }
    a = torch.empty(4 << 20, device=DEVICE)
    hold_contest(contenders | {TRIAD: triad(a, a)}, weights * size)
