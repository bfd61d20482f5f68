"""How each backend computes ops/layer_norm.py: torch by its own LayerNorm, kernels by their launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _rows
from distilbert_fast.ops._operator import operator, triton_kernels
from distilbert_fast.ops._rows import Outputs
from distilbert_fast.ops.quantize import quantize_torch

OP = "layer_norm"


class Call(NamedTuple):
    """All arguments of forward."""

    x: torch.Tensor  # [N, C]
    weight: torch.Tensor  # [C]
    bias: torch.Tensor  # [C]
    residual: torch.Tensor | None  # [N, C]
    out_scale: torch.Tensor | None  # of the codes: float32 [] or [N], or each row's own
    eps: float
    keep: str  # beside y: "nothing", "statistics" for backward, or "codes"


class Gradient(NamedTuple):
    """All arguments of backward."""

    dy: torch.Tensor  # [N, C]
    x: torch.Tensor  # [N, C]
    weight: torch.Tensor  # [C]
    residual: torch.Tensor | None  # [N, C]
    mean: torch.Tensor  # [N]
    rstd: torch.Tensor  # [N]


def _dtypes(call: Call | Gradient) -> tuple[torch.dtype, ...]:
    x, residual = call.x.dtype, call.residual
    return (x, call.weight.dtype) if residual is None else (x, call.weight.dtype, residual.dtype)


def _sum_dtype(call: Call | Gradient) -> torch.dtype:
    """That of y."""
    x, residual = call.x.dtype, call.residual
    return x if residual is None else torch.promote_types(x, residual.dtype)


def forward_like(call: Call) -> Outputs:
    """Memory for y and for what is kept."""
    return _rows.normalized_like(_rows.empty_like(call.x, _sum_dtype(call)), call)


@operator("layer_norm_forward", forward_like)
def forward(call: Call) -> Outputs:
    """y [N, C], and what ``keep`` names: μ [N] and rstd [N]; or codes int8 [N, C] and the scales found [N], none, [0],
    where one was given; or [0] and [0]."""
    return FORWARD[backends.select(OP, call.x.device, *_dtypes(call))](call)


def backward_like(call: Gradient) -> Outputs:
    """Memory for dh, dw and db."""
    return _rows.empty_like(call.x, _sum_dtype(call)), *_rows.parameter_gradients_like(call)


@operator("layer_norm_backward", backward_like)
def backward(call: Gradient) -> Outputs:
    """dh [N, C] in the dtype of y; dw [C] and db [C] in that of the statistics."""
    return BACKWARD[backends.select_backward(OP, call.x.device, *_dtypes(call))](call)


# torch ------------------------------------------------------------------------------------------------------


def _add(call: Call | Gradient) -> tuple[torch.Tensor, torch.dtype]:
    """x + residual in the dtype of the arithmetic, and the dtype of y."""
    dtype = _sum_dtype(call)
    h = call.x.to(_rows.accumulation_dtype(dtype))
    return (h if call.residual is None else h + call.residual), dtype


def normalize(h: torch.Tensor, dtype: torch.dtype, call: Any) -> Outputs:
    """What ``forward`` gives for h [N, C], the sum; y in a dtype: torch's fused kernel, Welford's variance."""
    y, mean, rstd = torch.native_layer_norm(h, h.shape[1:], call.weight.to(h.dtype), call.bias.to(h.dtype), call.eps)
    rounded = y.to(dtype)
    if call.keep == "codes":
        return rounded, *quantize_torch(y, call.out_scale)
    if call.keep == "statistics":
        return rounded, mean.view(-1), rstd.view(-1)
    return _rows.normalized_like(rounded, call)


def normalize_backward(h: torch.Tensor, call: Any) -> Outputs:
    """dh [N, C], dw [C] and db [C] of ``normalize``, in the dtype of h."""
    weight, mean, rstd = call.weight.to(h.dtype), call.mean[:, None], call.rstd[:, None]
    return torch.ops.aten.native_layer_norm_backward(
        call.dy.to(h.dtype), h, h.shape[1:], mean, rstd, weight, weight, [True, True, True]
    )  # it asks for the bias, but only for its dtype


def _forward_torch(call: Call) -> Outputs:
    return normalize(*_add(call), call)


def _backward_torch(call: Gradient) -> Outputs:
    h, dtype = _add(call)
    dh, dweight, dbias = normalize_backward(h, call)
    return dh.to(dtype), dweight, dbias


# cpu --------------------------------------------------------------------------------------------------------


def _sum_arguments(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, ...]:
    dtype_codes = backends.CPU_DTYPE
    return *_rows.matrix_arguments(x, dtype_codes), *_rows.matrix_arguments(residual, dtype_codes), x.shape[0]


def _forward_cpu(call: Call) -> Outputs:
    outputs = forward_like(call)
    x, residual = _rows.whole_rows(call.x), _rows.whole_rows(call.residual)
    weight, bias = _rows.parameter(call.weight), _rows.parameter(call.bias)
    out = _rows.normalized_arguments(weight, bias, call, outputs)
    backends.cpu().layer_norm_forward(*_sum_arguments(x, residual), out, torch.get_num_threads())
    return outputs


def _backward_cpu(call: Gradient) -> Outputs:
    dh, dweight, dbias = backward_like(call)
    x, residual = _rows.whole_rows(call.x), _rows.whole_rows(call.residual)
    dy, weight = _rows.whole_rows(call.dy.to(dh.dtype)), _rows.parameter(call.weight)
    gradient = _rows.gradient_arguments(dy, weight, call.mean, call.rstd, dh)
    pointers = dweight.data_ptr(), dbias.data_ptr()
    backends.cpu().layer_norm_backward(*_sum_arguments(x, residual), gradient, *pointers, torch.get_num_threads())
    return dh, dweight, dbias


# triton -----------------------------------------------------------------------------------------------------

_NO_IDS = (None, None)


def normalize_triton(terms: Any, ids: Any, call: Any, outputs: Outputs) -> Outputs:
    """Fill the outputs with what ``forward`` gives for the sum of terms, gathered by ids where these are given."""
    y, first, second = outputs
    kept: dict[str, Any] = {}
    if call.keep == "statistics":
        kept = dict(mean=first, rstd=second)
    elif call.keep == "codes":
        kept = dict(y_q=first, scale=call.out_scale, found=second)
    triton_kernels("layer_norm").normalize_fwd(
        terms, ids, call.weight.contiguous(), call.bias.contiguous(), call.eps, y, **kept
    )
    return outputs


def _terms(call: Call | Gradient) -> list[torch.Tensor | None]:
    return [_rows.whole_rows(call.x), _rows.whole_rows(call.residual)]


def _forward_triton(call: Call) -> Outputs:
    return normalize_triton(_terms(call), _NO_IDS, call, forward_like(call))


def _backward_triton(call: Gradient) -> Outputs:
    outputs = backward_like(call)
    kept = call.weight.contiguous(), call.mean, call.rstd
    triton_kernels("layer_norm").normalize_bwd(_rows.whole_rows(call.dy), _terms(call), _NO_IDS, *kept, *outputs)
    return outputs


# cuda: forward only -----------------------------------------------------------------------------------------


def _forward_cuda(call: Call) -> Outputs:
    outputs = y, first, second = forward_like(call)
    x = _rows.whole_rows(call.x.to(y.dtype))
    residual = None if call.residual is None else _rows.whole_rows(call.residual.to(y.dtype))
    weight, bias, scale = call.weight, call.bias, call.out_scale
    if weight.dtype == bias.dtype == y.dtype:
        weight, bias = weight.contiguous(), bias.contiguous()
    else:
        weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    statistics, codes = (first.data_ptr(), second.data_ptr()), (0, 0, 0, 0)
    if call.keep == "codes":  # their address, that of scales to write, those to read and their stride
        scale = None if scale is None else scale.contiguous()
        found = second.data_ptr() if scale is None else 0
        statistics, codes = (0, 0), (first.data_ptr(), found, *_rows.scale_arguments(scale))
    backends.cuda().layer_norm(
        *_rows.matrix_arguments(x, backends.CUDA_DTYPE)[:2],
        *_rows.matrix_arguments(residual, backends.CUDA_DTYPE)[:2],
        backends.CUDA_DTYPE[y.dtype],
        *(weight.data_ptr(), bias.data_ptr(), backends.CUDA_DTYPE[weight.dtype]),
        *x.shape,
        call.eps,
        y.data_ptr(),
        *statistics,
        *codes,
        *backends.device_and_stream(x.device),
    )
    return outputs


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
