"""The engine served by Triton alone, in the interpreter: what its graphs pad changes no bit, and int8 of static scales.

On a CUDA device tests/gpu/test_engine_gpu.py does this with real graphs.
"""

from __future__ import annotations

import pytest
import torch
from engine.test_cuda_graphs import eager, recorded
from tiny_encoder import MASK, V, make, reference

import distilbert_fast
from distilbert_fast import backends

pytest.importorskip("triton")
if not backends.interpreted():
    pytest.skip("runs in Triton's interpreter, see test_interpreter.py", allow_module_level=True)
missing = [
    op
    for op in ("attention", "embedding", "int8_linear", "layer_norm", "quantize")
    if "triton" not in backends.KERNELS[op]
]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no Triton kernel for {', '.join(missing)}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, in the interpreter
]


@pytest.fixture(autouse=True)
def by_triton():
    with distilbert_fast.backend("triton"):
        yield


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "holes"])
def test_padding_changes_no_bit(mask, precision, ids):
    model = make()
    found, want = recorded(model, precision)(ids, mask), eager(model, precision)(ids, mask)
    assert torch.equal(found, want)
    tolerance = dict(rtol=0, atol=0.05) if precision else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, reference(model, ids, mask).detach(), **tolerance)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_first_rows(precision, ids):
    engine = recorded(make(), precision)
    first, whole = engine.encode(ids, MASK, rows="first").last, engine(ids, MASK)
    torch.testing.assert_close(first[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)


def test_static_scales(ids):
    model = make()
    static = eager(model, "int8").calibrated([{"input_ids": ids, "attention_mask": MASK}])
    found = static(ids, MASK)
    torch.testing.assert_close(found, reference(model, ids, MASK).detach(), rtol=0, atol=0.05)
