"""Every op under what is not a plain call: tracers, transforms, modes, subclasses, lazy and freed tensors.

The oracle is the plain call. What cannot be right must raise, never give another number.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from traced import Traced

import distilbert_fast as df
from distilbert_fast.ops.linear import linear

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*has not implemented the batching rule", "ignore:`torch.jit"
)


MODULES = [path.stem for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
OPS: dict[str, Traced] = {}
for module in MODULES:
    OPS |= getattr(importlib.import_module(f"ops.{module}"), "TRACED", {})
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


@pytest.fixture(params=["kernels", "torch"])
def op(request, name) -> Iterator[Traced]:
    """Each op, served by a kernel of the CPU where there is one, and by torch."""
    torch.manual_seed(0)
    with contextlib.nullcontext() if request.param == "kernels" else df.backend("torch"):
        yield OPS[name]


def test_every_public_op_is_among_them():
    public = {name for name, home in df._HOME.items() if home.startswith("ops.")}
    assert public <= set(OPS)


@pytest.fixture(params=OPS)
def name(request) -> str:
    return request.param


def tuple_of(x: Any) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def assert_same(found: Any, expected: Any) -> None:
    found, expected = tuple_of(found), tuple_of(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_torch_jit_trace_is_right_for_other_sizes_and_from_a_file(op):
    traced = torch.jit.trace(op.call, tuple(op.tensors(4)), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for run in (traced, torch.jit.load(file)):
        for n in (4, 7, 1):
            tensors = op.tensors(n)
            assert_same(run(*tensors), op.call(*tensors))


def test_a_traced_op_has_its_gradient(op):
    if not op.gradient:
        pytest.skip("inference only")
    traced = torch.jit.trace(op.call, tuple(x.requires_grad_(x.is_floating_point()) for x in op.tensors(4)))
    tensors, gradients = op.tensors(6), []
    for run in (traced, op.call):
        first = tensors[2 if tensors[0].dtype == torch.int64 else 0].detach().requires_grad_()
        run(
            *(first if x.shape == first.shape and x.data_ptr() == first.data_ptr() else x for x in tensors)
        ).sum().backward()
        gradients.append(first.grad)
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(op, mode):
    tensors = op.tensors(4)
    graph = make_fx(op.call, tracing_mode=mode)(*tensors)
    assert_same(graph(*tensors), op.call(*tensors))
    others = [x for x in op.tensors(4)]
    assert_same(graph(*others), op.call(*others))


def test_torch_fx_symbolic_trace(op):
    class Module(torch.nn.Module):
        def forward(self, a, b=None, c=None, d=None, e=None, f=None):
            given = [a, b, c, d, e, f][: len(op.tensors(2))]
            return op.call(*given)

    module = Module()
    try:
        graph = torch.fx.symbolic_trace(module)
    except REFUSALS:
        return
    tensors = op.tensors(5)
    assert_same(graph(*tensors), op.call(*tensors))


def test_vmap_is_right_or_refused(op):
    many = [torch.stack(x) for x in zip(*(op.tensors(4) for _ in range(3)), strict=True)]
    expected = [tuple_of(op.call(*(x[i] for x in many))) for i in range(3)]
    try:
        found = tuple_of(torch.vmap(op.call)(*many))
    except REFUSALS:
        return
    for i, one in enumerate(expected):
        assert_same(tuple(x[i] for x in found), one)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp", "jacfwd"])
def test_derivatives_of_torch_func_are_right_or_refused(op, transform):
    tensors = op.tensors(4)
    place = next(i for i, x in enumerate(tensors) if x.is_floating_point())
    if not op.gradient:
        pytest.skip("inference only: no derivative")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return op.call(*tensors[:place], x, *tensors[place + 1 :]).sum()

    x = tensors[place]
    try:
        if transform == "jvp":
            found = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        else:
            found = getattr(torch.func, transform)(loss)(x)
    except REFUSALS:
        return
    leaf = x.detach().requires_grad_()
    loss(leaf).backward()
    assert_same(found, leaf.grad.sum() if transform == "jvp" else leaf.grad)


def test_forward_mode_is_right_or_refused(op):
    if not op.gradient:
        pytest.skip("inference only: no derivative")
    tensors = op.tensors(4)
    place = next(i for i, x in enumerate(tensors) if x.is_floating_point())
    leaf = tensors[place].detach().requires_grad_()
    op.call(*tensors[:place], leaf, *tensors[place + 1 :]).sum().backward()
    with forward_ad.dual_level():
        tensors[place] = forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place]))
        try:
            found = forward_ad.unpack_dual(op.call(*tensors).sum()).tangent
        except REFUSALS:
            return
    assert_same(found, leaf.grad.sum())


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("mode", [Seen, Called, lambda: torch.device("meta")], ids=["dispatch", "function", "device"])
def test_modes(op, mode):
    tensors = op.tensors(4)
    expected = op.call(*tensors)
    with mode():
        found = op.call(*tensors)
    assert_same(found, expected)


def test_a_subclass_of_tensor(op):
    tensors = op.tensors(4)
    found = tuple_of(op.call(*(x.as_subclass(Sub) for x in tensors)))
    assert_same(tuple(x.as_subclass(torch.Tensor) for x in found), op.call(*tensors))


def test_meta_tensors_give_shapes(op):
    tensors = op.tensors(4)
    found = tuple_of(op.call(*(x.to("meta") for x in tensors)))
    for a, b in zip(found, tuple_of(op.call(*tensors)), strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype


def test_negated_views(op):
    """As of ``torch.complex(a, b).conj().imag``: what lies in memory has the other sign."""
    tensors = op.tensors(4)
    for i, x in enumerate(tensors):
        if x.is_floating_point():
            lazy = torch._neg_view(-x)
            assert lazy.is_neg()
            assert_same(op.call(*tensors[:i], lazy, *tensors[i + 1 :]), op.call(*tensors))


def test_a_negated_upstream_gradient(op):
    if not op.gradient:
        pytest.skip("inference only")
    gradients = []
    for negated in (False, True):
        torch.manual_seed(1)
        tensors = [x.requires_grad_(x.is_floating_point() and x.dim() < 3) if x.is_leaf else x for x in op.tensors(4)]
        if not any(x.requires_grad for x in tensors):
            tensors[0] = tensors[0].detach().requires_grad_()
        y = op.call(*tensors)
        dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
        y.backward(torch._neg_view(-dy) if negated else dy)
        gradients.append(tuple(x.grad for x in tensors if x.is_leaf and x.grad is not None))
    assert_same(*gradients)


def test_lazy_zeros(op):
    tensors = op.tensors(4)
    for i, x in enumerate(tensors):
        if x.is_floating_point():
            lazy = torch._efficientzerotensor(x.shape)
            with_zeros = op.call(*tensors[:i], torch.zeros_like(x), *tensors[i + 1 :])
            assert_same(op.call(*tensors[:i], lazy, *tensors[i + 1 :]), with_zeros)


def test_freed_storage_is_refused(op):
    for i in range(len(op.tensors(4))):
        tensors = [x.clone() for x in op.tensors(4)]
        tensors[i].untyped_storage().resize_(0)
        with pytest.raises((ValueError, RuntimeError), match=r"whose storage was freed|for storage of size 0"):
            op.call(*tensors)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "quantized", "nested"])
def test_other_layouts_are_refused(op, layout):
    tensors = op.tensors(4)
    for i, x in enumerate(tensors):
        if x.dtype != torch.float32:
            continue
        other = {
            "sparse": lambda x=x: x.to_sparse(),
            "mkldnn": lambda x=x: x.to_mkldnn(),
            "quantized": lambda x=x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "nested": lambda x=x: torch.nested.nested_tensor([x, x]),
        }[layout]()
        with pytest.raises(REFUSALS):
            op.call(*tensors[:i], other, *tensors[i + 1 :])


def test_expanded_inputs(op):
    tensors = op.tensors(4)
    for i, x in enumerate(tensors):
        if x.is_floating_point() and x.dim():
            wide = x[:1].expand(x.shape)
            changed = [*tensors[:i], wide, *tensors[i + 1 :]]
            assert_same(op.call(*changed), op.call(*(y.contiguous() for y in changed)))


def test_vmap_and_grad_of_linear_are_torchs():
    x, w = torch.randn(3, 4, 8), torch.randn(6, 8)
    torch.testing.assert_close(torch.vmap(linear, (0, None))(x, w), x @ w.T)
    torch.testing.assert_close(torch.func.grad(lambda w: linear(x[0], w).sum())(w), x[0].sum(0).expand(6, 8))


@pytest.mark.parametrize("function", [df.kl_div, df.attention, df.layer_norm, df.quantize, df.int8_linear, linear])
def test_torch_jit_script_refuses(function):
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(function)
