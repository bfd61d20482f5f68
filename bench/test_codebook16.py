"""Weights of 16 values, 4 bits each, as the CPU kernels read them, beside int8 ones.

pytest bench/test_codebook16.py -k memory     24 layers of [3072, 768] in turn: from memory, or from a large last cache
pytest bench/test_codebook16.py -k cache      one layer of [768, 768] again and again: from the second cache
pytest bench/test_codebook16.py -k encoder    a DistilBERT-base of random codes, 1 × 8 and 1 × 16 tokens
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.harness.contest import OURS, TRIAD, Contender, triad
from distilbert_fast import backends, pack_encoder, quantize_model
from distilbert_fast.engine.blobs import pack_linear
from distilbert_fast.engine.native_encoder import WEIGHTS
from distilbert_fast.layers import CodebookLinear
from distilbert_fast.ops.quantize import quantize

INT8 = "int8_linear"
TOKENS = (1, 2, 4, 8, 12, 16, 128)


class Product:
    """One linear layer [F, K] as a blob of a kind; each call is one of the native entry."""

    def __init__(self, kind: str, f: int, k: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (f, k), dtype=torch.uint8, generator=g)
        tables = torch.randint(-127, 128, (f // 4, 16), dtype=torch.int8, generator=g).repeat_interleave(4, 0)
        weight = codes if kind == "codebook16" else tables.gather(1, codes.long())
        self.scale, self.kind, self.size = torch.full((f,), 1e-4), WEIGHTS[kind], (f, k)
        self.blob = pack_linear(kind, weight, self.scale, None, None, tables if kind == "codebook16" else None)
        self.matches = backends.cpu().LayerMatches(self.kind, self.blob.data_ptr(), self.blob.numel(), f, k)

    def __call__(self, x_q: torch.Tensor, x_scale: torch.Tensor, y: torch.Tensor) -> None:
        n, (f, k) = x_q.shape[0], self.size
        backends.cpu().int8_linear(
            *(x_q.data_ptr(), k, 1, x_scale.data_ptr(), 1),
            *(self.kind, self.blob.data_ptr(), self.blob.numel(), self.scale.data_ptr(), 0, n, f, k),
            *(False, 0, 0, False, y.data_ptr(), 0, 0, 0, self.matches, torch.get_num_threads()),
        )


def contenders(n: int, layers: int, f: int, k: int, times: int = 1) -> dict[str, Contender]:
    x_q, x_scale = quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    found = {}
    for name, kind in ((OURS, "codebook16"), (INT8, "int8")):
        products, y = [Product(kind, f, k, i) for i in range(layers)], torch.empty(n, f)

        def call(products=products, y=y):
            for _ in range(times):
                for product in products:
                    product(x_q, x_scale, y)
            return y

        found[name] = Contender(call, lambda: None, sum(product.blob.numel() for product in products))
    assert torch.equal(found[OURS].call(), found[INT8].call())  # right before fast
    a = torch.empty(4 << 20)
    return found | {TRIAD: triad(a, a)}


@pytest.mark.parametrize("n", TOKENS)
def test_from_memory(hold_contest, n):
    hold_contest(contenders(n, 24, 3072, 768), 3072 * 768)


@pytest.mark.parametrize("n", TOKENS)
def test_from_cache(hold_contest, n):
    hold_contest(contenders(n, 1, 768, 768, 200), 768 * 768)


@pytest.fixture(scope="module")
def encoders():
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig()).eval()
    for block in model.transformer.layer:
        for home in (block.attention, block.ffn):
            for name, linear in list(home.named_children()):
                if isinstance(linear, nn.Linear):
                    made = CodebookLinear(linear.in_features, linear.out_features, 16, 16)
                    nn.init.normal_(made.values, std=0.04), nn.init.zeros_(made.bias)
                    made.weight.random_(0, 256)
                    setattr(home, name, made)
    int8 = quantize_model(DistilBertModel(DistilBertConfig()).eval())
    return {OURS: pack_encoder(model), "int8": pack_encoder(int8)}


@pytest.mark.parametrize("n", [8, 16, 128])
def test_encoder(hold_contest, n, encoders):
    ids = torch.randint(0, 30000, (1, n))
    calls = {
        name: Contender(lambda engine=engine: engine(ids), lambda: None, 42_467_328 // (2 if name == OURS else 1))
        for name, engine in encoders.items()
    }
    a = torch.empty(4 << 20)
    hold_contest(calls | {TRIAD: triad(a, a)}, 42_467_328)
