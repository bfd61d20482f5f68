"""int8_linear: a linear layer on int8 codes with exact int32 accumulation and a fused epilogue.

    acc_nf = Σ_c x_q_nc · w_q_fc        y = gelu?(acc · x_scale_n · w_scale_f + bias_f) + residual
    gelu(t) = t/2 · (1 + erf(t/√2))     y_q = clamp(round(y / out_scale), −127, 127)

Wu, Judd, Zhang, Isaev, Micikevicius: Integer Quantization for Deep Learning Inference, arXiv:2004.09602, §3.
Hendrycks, Gimpel: Gaussian Error Linear Units, arXiv:1606.08415.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._autocast import without_autocast
from distilbert_fast.ops._operator import function, operator, triton_kernels
from distilbert_fast.ops._packed import INT8_LAYOUT, packed_int8
from distilbert_fast.ops._rows import as_scale
from distilbert_fast.ops.quantize import quantize_reference

OP = "int8_linear"
MAX_COLUMNS = 2**31 // 128**2 - 1  # 131071 products of −128 by −128 still fit in int32
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@function()
@torch.no_grad()
def int8_linear(
    x_q: torch.Tensor,
    x_scale: float | torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out_scale: float | torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x · Wᵀ + b of quantized x ≈ x_q · x_scale and W ≈ w_q · w_scale.

    Args:
        x_q: codes int8 [N, C], C ≤ 131071, any of the 256 values.
        x_scale: a number above 0, or a float32 tensor [N] or [], as ``quantize`` returns it.
        w_q: codes int8 [F, C], same device.
        w_scale: float32 [F], one scale for each output column.
        bias: [F], float32, bfloat16 or float16; None adds nothing.
        activation: None or "gelu", the exact one of erf.
        residual: [N, F], float32, bfloat16 or float16, added after the activation; None adds nothing.
        out_scale: None returns floats. Else y is quantized with it: a number above 0, or a float32 [] or [N].
        out_dtype: of the floats that are returned: float32, bfloat16 or float16.

    Returns:
        y [N, F] in out_dtype, or its int8 codes, as ``quantize(y, out_scale)`` gives them for the float32 y.

    The int32 accumulators are exact, so equal on every backend. The epilogue is float32, in this order:
    float(acc) · x_scale, · w_scale, + bias, activation, + residual; then one rounding, to out_dtype or int8.
    A backend may fuse a product with the addition after it: so floats may differ by a rounding, codes by one.

    Inference only: what it returns carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "x_q", x_q, ("N", "C"), (torch.int8,))
    n, c = x_q.shape
    if c > MAX_COLUMNS:
        _check.refuse(OP, "x_q", f"of at most {MAX_COLUMNS} columns, for int32 to hold their sum", list(x_q.shape))
    x_scale = as_scale(OP, "x_scale", x_scale, x_q)
    _check.tensor(OP, "w_q", w_q, ("F", c), (torch.int8,), x_q.device)
    f = w_q.shape[0]
    _check.tensor(OP, "w_scale", w_scale, (f,), (torch.float32,), x_q.device)
    if bias is not None:
        _check.tensor(OP, "bias", bias, (f,), _OUT_DTYPES, x_q.device)
    _check.choice(OP, "activation", activation, (None, "gelu"))
    if residual is not None:
        _check.tensor(OP, "residual", residual, (n, f), _OUT_DTYPES, x_q.device)
    if out_scale is not None:
        out_scale = as_scale(OP, "out_scale", out_scale, x_q)
    _check.choice(OP, "out_dtype", out_dtype, _OUT_DTYPES)
    return _forward(Call(x_q, x_scale, w_q, w_scale, bias, activation == "gelu", residual, out_scale, out_dtype))


def int8_linear_reference(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of ``int8_linear`` in differentiable torch, in the dtype of w_scale: dequantized."""
    x = x_q.to(w_scale.dtype) * (x_scale[:, None] if x_scale.dim() else x_scale)  # [N, C]
    w = w_q.to(w_scale.dtype) * w_scale[:, None]  # [F, C]
    y = torch.nn.functional.linear(x, w, bias)
    if activation == "gelu":
        y = torch.nn.functional.gelu(y)
    return y if residual is None else y + residual


class Call(NamedTuple):
    """All arguments of forward."""

    x_q: torch.Tensor  # int8 [N, C]
    x_scale: torch.Tensor  # float32 [N] or []
    w_q: torch.Tensor  # int8 [F, C]
    w_scale: torch.Tensor  # float32 [F]
    bias: torch.Tensor | None  # [F]
    gelu: bool
    residual: torch.Tensor | None  # [N, F]
    out_scale: torch.Tensor | None  # float32 [N] or []
    out_dtype: torch.dtype


def _forward_fake(call: Call) -> torch.Tensor:
    dtype = call.out_dtype if call.out_scale is None else torch.int8
    return call.x_q.new_empty((call.x_q.shape[0], call.w_q.shape[0]), dtype=dtype)


@operator("int8_linear_forward", _forward_fake)
def _forward(call: Call) -> torch.Tensor:
    """y [N, F] in out_dtype, or its codes if there is an out_scale."""
    floats = (tensor.dtype for tensor in (call.bias, call.residual) if tensor is not None)
    return _FORWARD[backends.select(OP, call.x_q.device, call.out_dtype, *floats)](call)


# torch ------------------------------------------------------------------------------------------------------


def accumulate(x_q: torch.Tensor, w_q: torch.Tensor) -> torch.Tensor:
    """x_q · w_qᵀ, exact, int32 [N, F], by float32 products of 1024 columns at a time.

    1024 products of at most 2¹⁴ stay within 2²⁴, where float32 counts by ones: every partial sum is exact,
    in any order. (torch._int_mm is wrong on the CPU for a single column, and without VNNI it saturates.)
    """
    acc = torch.zeros((x_q.shape[0], w_q.shape[0]), dtype=torch.int32, device=x_q.device)
    with without_autocast(x_q.device):
        for start in range(0, x_q.shape[1], 1024):
            columns = slice(start, start + 1024)
            acc += (x_q[:, columns].to(torch.float32) @ w_q[:, columns].to(torch.float32).t()).to(torch.int32)
    return acc


def _forward_torch(call: Call) -> torch.Tensor:
    x_q, x_scale, w_q, w_scale, bias, gelu, residual, out_scale, out_dtype = call
    y = accumulate(x_q, w_q).to(torch.float32)  # [N, F]
    y *= x_scale[:, None] if x_scale.dim() else x_scale
    y *= w_scale
    if bias is not None:
        y += bias
    if gelu:
        y = torch.nn.functional.gelu(y)
    if residual is not None:
        y += residual
    return y.to(out_dtype) if out_scale is None else quantize_reference(y, out_scale)[0]


# cpu --------------------------------------------------------------------------------------------------------


def _forward_cpu(call: Call) -> torch.Tensor:
    x_q, x_scale, w_q, w_scale, bias, gelu, residual, out_scale, _ = call
    y = _forward_fake(call)
    blob, matches = packed_int8(w_q)
    w_scale, bias, residual = w_scale.contiguous(), _rows.parameter(bias), _rows.whole_rows(residual)
    backends.cpu().int8_linear(
        *(x_q.data_ptr(), *x_q.stride()),
        *_rows.scale_arguments(x_scale),
        *(INT8_LAYOUT, blob.data_ptr(), blob.numel(), w_scale.data_ptr(), _rows.address(bias)),
        *(x_q.shape[0], w_q.shape[0], x_q.shape[1]),
        gelu,
        *_rows.matrix_arguments(residual, backends.CPU_DTYPE)[:2],
        residual is not None and residual.dtype == torch.bfloat16,
        *(y.data_ptr(), backends.CPU_DTYPE[y.dtype]),
        *_rows.scale_arguments(out_scale),
        matches,
        torch.get_num_threads(),
    )
    return y


# triton -----------------------------------------------------------------------------------------------------


def _forward_triton(call: Call) -> torch.Tensor:
    y = _forward_fake(call)
    triton_kernels("int8_linear").int8_linear(*call[:-1], y)
    return y


# cuda -------------------------------------------------------------------------------------------------------


def _forward_cuda(call: Call) -> torch.Tensor:
    x_q, x_scale, w_q, w_scale, bias, gelu, residual, out_scale, _ = call
    y = _forward_fake(call)
    x_q, w_q, residual = _rows.whole_rows(x_q), _rows.whole_rows(w_q), _rows.whole_rows(residual)
    x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    out_scale = None if out_scale is None else out_scale.contiguous()
    backends.cuda().int8_linear(
        *(x_q.data_ptr(), x_q.stride(0)),
        *_rows.scale_arguments(x_scale),
        *(w_q.data_ptr(), w_q.stride(0)),
        *(w_scale.data_ptr(), _rows.address(bias), 0 if bias is None else backends.CUDA_DTYPE[bias.dtype]),
        *(x_q.shape[0], w_q.shape[0], x_q.shape[1]),
        gelu,
        *_rows.matrix_arguments(residual, backends.CUDA_DTYPE),
        *(y.data_ptr(), backends.CUDA_DTYPE[y.dtype]),
        *_rows.scale_arguments(out_scale),
        *backends.device_and_stream(x_q.device),
    )
    return y


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
