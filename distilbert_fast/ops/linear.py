"""linear: a dense layer for training, where the machine has a faster product than torch's.

    y = x Wᵀ + b        dx = dy W        dW = dyᵀ x        db = Σ dy

torch leaves float32 products on a CPU to MKL, which does not use the whole width of AMD's vector units. Weights are
packed anew with every call, into the cache of the thread that multiplies with them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check
from distilbert_fast.ops._operator import operator

OP = "linear"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x Wᵀ + b, as ``torch.nn.functional.linear``, which serves wherever it is no slower.

    Args:
        x: [..., C]; float32 on a CPU for a kernel of ours, anything that torch takes otherwise. Under
            torch.autocast and torch.compile torch serves.
        weight: [F, C].
        bias: [F] or None.

    Returns:
        [..., F].

    Raises:
        ValueError: shapes that do not fit, by name.
    """
    served = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")) and _is_ours(x, weight, bias)
    if not served:
        return F.linear(x, weight, bias)
    _check.tensor(OP, "weight", weight, ("F", x.shape[-1]), (torch.float32,))
    if bias is not None:
        _check.tensor(OP, "bias", bias, (weight.shape[0],), (torch.float32,))
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [N, C]
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            product(dy, weight.t(), None) if ctx.needs_input_grad[0] else None,
            product(dy.t(), x.t(), None) if ctx.needs_input_grad[1] else None,
            dy.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def _product_fake(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


@operator("linear_product(Tensor a, Tensor b, Tensor? bias) -> Tensor", _product_fake)
def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[M, F] = a [M, K] bᵀ + bias, b [F, K]; either may be a transposed view."""
    if not _is_ours(a, b, bias):
        return F.linear(a, b, bias)
    return _native(a, b, bias, backends.empty_cpu(_product_fake(a, b, bias)), add=False)


def product_into(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, add: bool = False
) -> torch.Tensor:
    """out [M, F] = a [M, K] bᵀ + bias, or += with ``add``; contiguous, all of one dtype. For other ops."""
    if _is_ours(a, b, bias):
        return _native(a, b, bias, out, add)
    if bias is not None and not add:
        return torch.addmm(bias, a, b.t(), out=out)
    torch.addmm(out, a, b.t(), beta=int(add), out=out)
    return out if bias is None else out.add_(bias)


def _is_ours(*tensors: torch.Tensor | None) -> bool:
    """Whether these are for the kernel: float32 on a CPU, where that is faster than torch, or forced."""
    if backends.forced() not in (None, "cpu") or not backends.availability("cpu").ok:
        return False
    return all(x is None or (x.dtype is torch.float32 and x.device.type == "cpu") for x in tensors) and (
        backends.forced() == "cpu" or backends.cpu().prefers_own_gemm()
    )


def _touching(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows or its columns are whole, wherever they lie; else a contiguous copy."""
    return x if 1 in x.stride() else x.contiguous()


def _native(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool) -> torch.Tensor:
    a, b, bias = _touching(a), _touching(b), None if bias is None else bias.contiguous()
    backends.cpu().linear_product(
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
        0 if bias is None else bias.data_ptr(),
        a.shape[0],
        b.shape[0],
        a.shape[1],
        out.data_ptr(),
        add,
        torch.get_num_threads(),
    )
    return out
