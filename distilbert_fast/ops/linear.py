"""linear: a dense layer for training, where the machine has a faster product than torch's.

    y = x Wᵀ + b        dx = dy W        dW = dyᵀ x        db = Σ dy

torch leaves float32 products on a CPU to MKL, which does not use the whole width of AMD's vector units. Under autocast
to bfloat16 it writes a copy of each weight before its products, and a copy of each weight's gradient after them. Here
weights are packed again at every call, into the cache of the thread that multiplies with them, and rounded on the way;
gradients are written as they are summed, in float32.

Where a processor has no instructions for bfloat16 and no AVX-512, torch multiplies it number by number, several times
as slowly as float32: there the operands are widened, and torch multiplies float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check
from distilbert_fast.ops._autocast import autocast, enabled, without_autocast
from distilbert_fast.ops._operator import is_eager, operator, require_memory
from distilbert_fast.ops._rows import address, parameter

OP = "linear"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x Wᵀ + b, as ``torch.nn.functional.linear``, which serves wherever it is no slower and under torch.compile.

    Args:
        x: [..., C]; float32 or bfloat16 on a CPU for a kernel of ours, anything that torch takes otherwise.
        weight: [F, C], of the dtype of x; under torch.autocast of any.
        bias: [F] or None, likewise.

    Returns:
        [..., F] in the dtype of x; under torch.autocast in its dtype, which is then that of the products. Gradients
        have the dtypes of the arguments; those of float32 ones are not rounded to bfloat16 on the way.

    Raises:
        TypeError, ValueError: dtypes and shapes that do not fit, by name.
    """
    if not is_eager((x, weight, bias)):
        require_memory(OP, (("x", x), ("weight", weight), ("bias", bias)))
        return F.linear(x, weight, bias)
    cast = enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    dtypes = _check.FLOATS if cast else (x.dtype,)
    _check.tensor(OP, "weight", weight, ("F", x.shape[-1]), dtypes, x.device)
    if bias is not None:
        _check.tensor(OP, "bias", bias, (weight.shape[0],), dtypes, x.device)
    if not (_is_ours(dtype, x, weight, bias) or _is_widened(dtype, x, weight, bias)):
        return F.linear(x, weight, bias)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [N, C]
    return _Linear.apply(flat, weight, bias, dtype).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            product(dy, weight.t(), None, x.dtype) if ctx.needs_input_grad[0] else None,
            product(dy.t(), x.t(), None, weight.dtype) if ctx.needs_input_grad[1] else None,
            _column_sums(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
        )


def _column_sums(dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dy.dtype == dtype:
        return dy.sum(dim=0)
    # torch's sum would first write all of dy in that dtype.
    return product(dy.new_ones(1, dy.shape[0]), dy.t(), None, dtype)[0]


def _product_like(a: torch.Tensor, b: torch.Tensor, bias: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@operator("linear_product", _product_like)
def product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[M, F] = a [M, K] bᵀ + bias, b [F, K]; either may be a transposed view. The result has the dtype of a, or this.

    Where one of a, b and the result is bfloat16, bfloat16 numbers are multiplied and their products summed in float32;
    or, where they are widened, float32 ones as they are.
    """
    dtype = dtype or a.dtype
    if _is_ours(dtype, a, b, bias):
        return _native(a, b, bias, backends.empty_cpu(_product_like(a, b, bias, dtype)), add=False)
    if dtype != a.dtype and a.is_cuda and bias is None:  # there it leaves the tensor cores as it was summed
        return torch.mm(a, b.t(), out_dtype=dtype)
    if _is_widened(dtype, a, b, bias):
        with without_autocast(a.device):
            return F.linear(a.float(), b.float(), None if bias is None else bias.float()).to(dtype)
    work = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype, dtype) else a.dtype
    return F.linear(a.to(work), b.to(work), None if bias is None else bias.to(work)).to(dtype)


def product_into(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, add: bool = False
) -> torch.Tensor:
    """out [M, F] = a [M, K] bᵀ + bias, or += with ``add``; contiguous; in the dtypes of ``product``. For other ops."""
    if _is_ours(out.dtype, a, b, bias):
        return _native(a, b, bias, out, add)
    if out.dtype != a.dtype == b.dtype and a.is_cuda and bias is None:  # as in ``product``, and without a copy
        if add:
            return torch.addmm(out, a, b.t(), out_dtype=out.dtype, out=out)
        return torch.mm(a, b.t(), out_dtype=out.dtype, out=out)
    if not out.dtype == a.dtype == b.dtype or _is_widened(out.dtype, a, b, bias):
        y = product(a, b, bias, out.dtype)
        return out.add_(y) if add else out.copy_(y)
    if bias is not None and not add:
        return torch.addmm(bias, a, b.t(), out=out)
    torch.addmm(out, a, b.t(), beta=int(add), out=out)
    return out if bias is None else out.add_(bias)


def operands(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As torch.autocast hands them to a product; weight and bias as they are where ``product`` rounds them itself."""
    (low,) = autocast(h.device, h)
    call = low.dtype, low, weight, bias
    if is_eager(call) and (_is_ours(*call) or _is_widened(*call)):
        return low, weight, bias
    return low, *autocast(h.device, weight, bias)


def _are_floats(dtypes: set[torch.dtype], tensors: list[torch.Tensor]) -> bool:
    """Whether the CPU kernel takes these."""
    return dtypes.issubset(backends.CPU_FLOATS) and all(x.device.type == "cpu" for x in tensors)


def _is_ours(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether a product of these, of such a result, is for the kernel: where that is faster than torch, or forced."""
    if backends.forced() not in (None, "cpu") or not backends.availability("cpu").ok:
        return False
    given = [x for x in tensors if x is not None]
    dtypes = {dtype, *(x.dtype for x in given)}
    if not _are_floats(dtypes, given) or (torch.bfloat16 in dtypes and not backends.cpu().multiplies_bfloat16()):
        return False
    return backends.forced() == "cpu" or backends.cpu().prefers_own_gemm()


def _is_widened(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether a product of these, of such a result, is one of float32 since torch has no fast one of bfloat16."""
    given = [x for x in tensors if x is not None]
    dtypes = {dtype, *(x.dtype for x in given)}
    if torch.bfloat16 not in dtypes or not _are_floats(dtypes, given):
        return False
    return backends.forced() in (None, "cpu") and not _torch_multiplies_bfloat16()


@functools.cache
def _torch_multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _touching(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows or its columns are whole, wherever they lie; else a contiguous copy."""
    return x if 1 in x.stride() else x.contiguous()


def _native(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool) -> torch.Tensor:
    a, b, bias = _touching(a), _touching(b), parameter(bias)
    backends.cpu().linear_product(
        *(a.data_ptr(), backends.CPU_DTYPE[a.dtype], *a.stride()),
        *(b.data_ptr(), backends.CPU_DTYPE[b.dtype], *b.stride()),
        *(address(bias), a.shape[0], b.shape[0], a.shape[1]),
        *(out.data_ptr(), backends.CPU_DTYPE[out.dtype], add),
        torch.get_num_threads(),
    )
    return out
