"""How one kernel call is reached: straight in eager mode, as a torch.library op under torch.compile.

A raw call costs a microsecond, the registered op twice that and a ``torch.library.custom_op`` ten times, so
eager code skips the dispatcher. Tracers need an opaque op with known output shapes, so they get it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("distilbert_fast", "DEF")
_REAL = (torch.Tensor, torch.nn.Parameter)


def is_eager(x: torch.Tensor) -> bool:
    """Whether code runs on real numbers now; a tracer is not looking."""
    return not torch.compiler.is_compiling() and type(x) in _REAL and not x.is_meta


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function on tensors as ``torch.ops.distilbert_fast.<name>``.

    Args:
        schema: torch.library schema, ``name(Tensor x, ...) -> ...``. The first argument must be a tensor.
        fake: same signature; makes empty outputs of the right shape, dtype, strides and device.

    The decorated function takes positional arguments and sees no autograd: it is called inside the forward or
    backward of a torch.autograd.Function, or where no gradient is wanted.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = name.split("::")[-1]
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"distilbert_fast::{name}", fake, lib=LIBRARY)
        opaque = getattr(torch.ops.distilbert_fast, name).default

        def call(*args: Any) -> Any:
            return kernel(*args) if is_eager(args[0]) else opaque(*args)

        call.__doc__ = kernel.__doc__
        return call

    return register
