"""Every op by every GPU backend against float64, on real shapes: values, gradients, side streams, graphs, cuda:1."""

from __future__ import annotations

import pytest
import torch
from gpu.small import REAL, SMALL, ops, quantized, results

from distilbert_fast import backends
from distilbert_fast.testing import assert_twice_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(ops(SMALL))
each_op = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@each_dtype
@each_backend
@each_op
@pytest.mark.parametrize("size", [SMALL, REAL], ids=["small", "real"])
def test_against_float64(size, name, backend, dtype, serve):
    op = ops(size)[name]
    inputs = [x.to("cuda", dtype) for x in op.inputs(size)]
    exact = results(op, op.reference, [x.double() for x in inputs])
    torchs = results(op, op.reference, inputs)
    serve(name, backend, dtype)
    before = [x.clone() for x in inputs]
    ours, again = results(op, op.ours, inputs), results(op, op.ours, inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was changed"
    for i, (x, y) in enumerate(zip(ours, again, strict=True)):
        assert torch.equal(x, y), f"result {i}: other bits the second time"
    for i, (x, y, z) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_twice_rule(x, y, z, f"result {i}")


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [SMALL, REAL], ids=["small", "real"])
def test_codes_against_torch(size, backend, dtype, serve):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_forced", "torch")
        want = quantized(size, dtype, torch.device("cuda"))
    for op in ("quantize", "layer_norm", "embedding", "int8_linear"):
        serve(op, backend, dtype)
    found = quantized(size, dtype, torch.device("cuda"))
    for i, (x, y) in enumerate(zip(found, want, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape
        if i < 2:  # quantize: its very bits
            assert torch.equal(x, y)
        elif x.dtype == torch.int8:
            assert (x.int() - y.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2)


@each_backend
@each_op
def test_side_stream(name, backend, serve):
    """What is launched follows the caller's stream: what that is busy with comes first."""
    op = ops(REAL)[name]
    inputs = [x.to("cuda", torch.bfloat16) for x in op.inputs(REAL)]
    serve(name, backend, torch.bfloat16)
    want = results(op, op.ours, inputs)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        found = results(op, op.ours, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@each_backend
@each_op
def test_graph(name, backend, serve):
    """Forward is captured once and replayed on other inputs."""
    if name == "linear_kl_div":
        pytest.skip("which rows count decides shapes, which the host waits for")
    op = ops(SMALL)[name]
    inputs = [x.to("cuda", torch.bfloat16) for x in op.inputs(SMALL)]
    others = [x.to("cuda", torch.bfloat16) for x in op.inputs(SMALL)]
    serve(name, backend, torch.bfloat16)
    with torch.no_grad():
        want = op.ours(*others)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            op.ours(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = op.ours(*inputs)
        for x, y in zip(inputs, others, strict=True):
            x.copy_(y)
        graph.replay()
    assert torch.equal(found, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_backend
@each_op
def test_second_device(name, backend, serve):
    """Tensors on cuda:1 while cuda:0 is current."""
    op = ops(SMALL)[name]
    inputs = op.inputs(SMALL)
    serve(name, backend, torch.bfloat16)
    found, want = (results(op, op.ours, [x.to(d, torch.bfloat16) for x in inputs]) for d in ("cuda:1", "cuda:0"))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 and torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, want, strict=True))
