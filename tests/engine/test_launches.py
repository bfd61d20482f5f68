"""What a layer of an int8 encoder costs a GPU beside its products, from a log of the ops that are called: launches and
bytes. Whatever torch is told to compute counts, but views; each of our ops is one kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_encoder import C, V, make
from torch.utils._python_dispatch import TorchDispatchMode

from distilbert_fast.engine.op_encoder import OpEncoder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

pytest.importorskip("triton")

from bench.gpu import expected  # noqa: E402

N = 32  # tokens; nothing else has this size
LAYER = [
    "int8_linear",
    "attention",
    "quantize",
    "int8_linear",
    "layer_norm",
    "int8_linear",
    "int8_linear",
    "layer_norm",
]
# Bytes a token and channel, where the feed-forward is 4 C wide and attention writes codes: QKV 1 + 6, attention 6 + 1,
# out 1 + 2, LayerNorm 4 + 3, FFN in 1 + 4, FFN out 4 + 2, LayerNorm 4 + 3. With weights, launches cannot do with less.
LEAST = 42


class Log(TorchDispatchMode):
    """Kernels by name, and the bytes of the matrices [N, …] that each reads and writes."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            name = str(function).removeprefix("distilbert_fast.").removesuffix("_forward.default")
            self.kernels.append((name, sum(map(_bytes, _tensors((args, kwargs, out))))))
        return out


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    found = found.values() if isinstance(found, dict) else found
    return [x for part in found for x in _tensors(part)] if isinstance(found, (list, tuple, type({}.values()))) else []


def _bytes(x):
    return x.nbytes if x.dim() > 1 and x.shape[0] == N else 0


def kernels(layers):
    model = make(layers, None, dtype=torch.bfloat16, structure=[(range(3), 4 * C)] * layers)
    scale = torch.tensor(0.05)
    encoder = OpEncoder(model, "int8", [None] * layers, [(scale, scale)] * layers)
    ids, positions = torch.randint(0, V, (N,)), torch.arange(N) % 16
    with torch.no_grad(), Log() as log:
        encoder.run(ids, positions, None, torch.tensor([0, 16, 32], dtype=torch.int32))
    return log.kernels


def test_launches_and_bytes_of_a_layer():
    """Eight launches: with codes written by attention there would be seven, and one for each product and LayerNorm is
    what is left. Bytes: at most a quarter more than the least.
    """
    two, three = kernels(2), kernels(3)
    before, layer = len(two) - len(LAYER), three[len(two) - len(LAYER) : -len(LAYER)]
    assert two[before:] == three[-len(LAYER) :], "the last layer is not like the others"
    assert [name for name, _ in layer] == LAYER
    moved = sum(size for _, size in layer)
    assert LEAST * N * C <= moved <= 1.25 * LEAST * N * C
    modelled = sum(launch.moved_bytes for launch in expected.layer(N, 16)) - 12 * expected.C**2  # without the weights
    assert moved / (N * C) == modelled / (N * expected.C) == 46


def test_the_table_of_expected_times():
    """docs/gpu.md shows what the model says."""
    assert expected.markdown() in (ROOT / "docs" / "gpu.md").read_text()
    for row in expected.rows():
        assert row.limit_seconds < row.seconds, row.case
