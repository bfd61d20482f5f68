"""How an op is reached: its kernels straight in eager mode, through torch's dispatcher under anything that traces.

A kernel gets addresses, so it must only ever see plain tensors: numbers that lie in memory as their strides say.
``is_eager`` tells them from all else. All else goes to the dispatcher, which knows what to do: it hands a tracer, mode
or tensor subclass the registered op, makes the numbers of lazy tensors (negated views, zeros), and maps over batches.

There are two rows of registered ops, ``torch.ops.distilbert_fast.*``. Those of ``operator`` are kernels without
autograd. Those of ``function`` are whole public functions, for tracers that cannot follow Python (``torch.jit.trace``,
``torch.fx.symbolic_trace``): what they record runs all checks again and takes the shapes of its own inputs.

A raw call costs a microsecond, the registered op twice that and a ``torch.library.custom_op`` ten times.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from distilbert_fast.ops import _check
from distilbert_fast.ops._autocast import enabled
from distilbert_fast.ops._rows import as_scale

LIBRARY = torch.library.Library("distilbert_fast", "DEF")
_REAL = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (bool, int, float, torch.dtype)

P = ParamSpec("P")
R = TypeVar("R")


def is_eager(arguments: Sequence[Any], default_device: bool = False) -> bool:
    """Whether nobody looks on, and all tensors among the arguments (None and lists of them too) lie in memory.

    ``default_device``: whether the caller says of every new tensor where it lies, so that it does not matter what
    ``torch.set_default_device`` says.
    """
    if (
        torch.compiler.is_dynamo_compiling()  # first: it answers for all below, which torch.compile could not follow
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and not (default_device and _only_places_tensors()))
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    try:
        for x in arguments:
            if x is None:
                continue
            kind = type(x)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                if x.is_neg() or (not x.data_ptr() and (x.numel() or x.is_meta)):
                    return False
            elif not (is_eager(x) if kind is list else kind in _NUMBERS):
                return False
    except RuntimeError:  # a tensor has no address: sparse, or a wrapper that torch.func left
        return False
    return True


def _only_places_tensors() -> bool:
    """Whether the modes that are on only say where new tensors lie."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


@functools.cache
def triton_kernels(module: str) -> Any:
    """kernels/<module>.py, imported where it is needed: it imports triton."""
    return importlib.import_module(f"distilbert_fast.kernels.{module}")


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function on tensors as ``torch.ops.distilbert_fast.<name>``, with the schema of its annotations.

    Args:
        name: of the registered op.
        fake: same signature; makes empty outputs of the right shape, dtype, strides and device.

    The decorated function takes positional arguments. Its first may be an op's call record, a NamedTuple, whose fields
    are then the first arguments of the registered op; the very first of these is a tensor. It sees no autograd: it is
    called inside the forward or backward of a torch.autograd.Function, or where no gradient is wanted. What it is
    called with lies in memory.

    Raises, when called:
        TypeError, ValueError: a tensor that no dispatcher can lay out in memory: sparse, quantized, or freed.
        NotImplementedError: a tensor with a forward-mode derivative.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        record: Any = next(iter(get_type_hints(kernel).values()))
        fields = len(record._fields) if hasattr(record, "_fields") else 0
        LIBRARY.define(_schema(name, kernel), tags=(torch.Tag.pt2_compliant_tag,))

        def given(args: Sequence[Any]) -> Sequence[Any]:
            return (record(*args[:fields]), *args[fields:]) if fields else args

        def served(*args: Any) -> Any:
            require_memory(name, zip(names, args, strict=False))
            return kernel(*given(args))

        LIBRARY.impl(name, served, "CompositeExplicitAutograd")
        torch.library.register_fake(f"distilbert_fast::{name}", lambda *args: fake(*given(args)), lib=LIBRARY)
        opaque = getattr(torch.ops.distilbert_fast, name).default
        names = [argument.name for argument in opaque._schema.arguments]
        types = [str(argument.type) for argument in opaque._schema.arguments]
        tensors = 1 + max(i for i, kind in enumerate(types) if "Tensor" in kind)

        def call(first: Any, *others: Any) -> Any:
            flat = (*first, *others) if fields else (first, *others)
            if is_eager(flat[:tensors]):
                return kernel(first, *others)
            if not torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0:
                _refuse_tangents(name, flat)
            return opaque(*flat)

        call.__doc__ = kernel.__doc__
        return call

    return register


_TYPES = {torch.Tensor: "Tensor", torch.dtype: "ScalarType", int: "int", float: "float", bool: "bool", str: "str"}


def _schema(name: str, python: Callable[..., Any]) -> str:
    """The torch.library schema of a function: a record's fields one by one, Tensor where a number may stand for one."""
    hints = get_type_hints(python)
    returned = hints.pop("return")
    defaults = {name: x.default for name, x in inspect.signature(python).parameters.items()}
    arguments: list[str] = []

    def add(name: str, kind: Any, default: Any) -> None:
        text = str(default)[6:] if isinstance(default, torch.dtype) else repr(default)
        arguments.append(f"{_type(kind)} {name}" + ("" if default is inspect.Parameter.empty else f"={text}"))

    for argument, kind in hints.items():
        if hasattr(kind, "_fields"):
            for field, of_field in get_type_hints(kind).items():
                add(field, of_field, kind._field_defaults.get(field, inspect.Parameter.empty))
        else:
            add(argument, kind, defaults[argument])
    return f"{name}({', '.join(arguments)}) -> {_type(returned)}"


def _type(kind: Any) -> str:
    parts = get_args(kind)
    if not parts:
        return _TYPES[kind]
    if get_origin(kind) is list:
        return f"{_type(parts[0])}[]"
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_type, parts))})"
    some = [part for part in parts if part is not type(None)]
    return _type(torch.Tensor if torch.Tensor in some else some[0]) + "?" * (type(None) in parts)


def _each_tensor(named: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in named:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, torch.Tensor):
                yield name, x


def require_memory(op: str, named: Any) -> None:
    """Refuse a tensor among (name, argument) whose numbers do not lie in memory as its strides say."""
    if torch.compiler.is_dynamo_compiling():
        return
    for name, x in _each_tensor(named):
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            kind = "nested" if x.is_nested else str(x.dtype if x.is_quantized else x.layout)[6:]
            _check.refuse(op, name, "a dense tensor of plain numbers", f"a {kind} one", TypeError)
        stored = type(x) in _REAL and not (is_functorch_wrapped_tensor(x) or x.is_meta or x._is_zerotensor())
        if stored and x.numel() and not x.data_ptr():
            _check.refuse(op, name, "in memory", f"{list(x.shape)} whose storage was freed")


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """torch.func.jvp, jacfwd, forward_ad: kernels know no tangents, and the dispatcher would drop them."""
    for _, x in _each_tensor(("", x) for x in args):
        if is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode differentiation is not implemented; use backward")


def function(casts: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a whole public function as ``torch.ops.distilbert_fast.<name>``, which tracers of Python calls record.

    Args:
        casts: whether it asks torch.autocast for a dtype, which a recorded call would ask again when it is run.

    Its schema is that of its annotations; a number where that says Tensor is a scale.

    Raises, when traced:
        RuntimeError: a function that casts, inside torch.autocast.
        TypeError: a tensor where the schema has a number: the trace would keep its value.
    """

    def register(python: Callable[P, R]) -> Callable[P, R]:
        name = python.__name__.lstrip("_")
        LIBRARY.define(_schema(name, python))

        def recorded(*args: Any) -> Any:
            made: Any = python(*args)  # type: ignore[call-arg]
            if not isinstance(made, tuple):
                return made
            return tuple(x.clone() if any(x is given for given in args) else x for x in made)  # no schema with aliases

        LIBRARY.impl(name, recorded, "CompositeImplicitAutograd")
        opaque = getattr(torch.ops.distilbert_fast, name).default
        kinds = {argument.name: str(argument.type) for argument in opaque._schema.arguments}
        signature = inspect.signature(python)

        @functools.wraps(python)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _get_tracing_state() is None and not _symbolic_trace._is_fx_tracing_flag:
                return python(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            proxies = any(isinstance(x, torch.fx.Proxy) for x in given.arguments.values())
            if proxies or _get_tracing_state() is not None:
                return opaque(*_recordable(name, kinds, given.arguments, casts))
            return python(*args, **kwargs)  # make_fx and torch.export follow Python

        return call

    return register


def _recordable(op: str, kinds: dict[str, str], arguments: dict[str, Any], casts: bool) -> Iterator[Any]:
    """The arguments as the registered function takes them, in its order."""
    first = next(iter(arguments.values()))
    if casts and isinstance(first, torch.Tensor) and enabled(first.device.type):
        raise RuntimeError(f"{op}: cannot be traced inside torch.autocast; trace outside of it, or in the lower dtype")
    for name, kind in kinds.items():
        value = arguments[name]
        if "Tensor" in kind:
            if isinstance(value, (int, float)):
                if isinstance(first, torch.fx.Proxy):
                    _check.refuse(op, name, "a tensor where torch.fx traces", "a number", TypeError)
                value = as_scale(op, name, value, first)
            yield value
        elif isinstance(value, torch.Tensor):
            _check.refuse(op, name, "a number, which a trace keeps", "a tensor", TypeError)
        else:
            yield value
