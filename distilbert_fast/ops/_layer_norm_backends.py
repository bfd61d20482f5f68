"""How each backend computes ops/layer_norm.py: torch by its own LayerNorm, kernels by their launchers."""

from __future__ import annotations

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _rows
from distilbert_fast.ops.quantize import quantize_torch


def _sum_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def forward_like(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for y, μ and rstd; a fake, so with all arguments of forward."""
    y = _rows.empty_like(x, _sum_dtype(x, residual))
    return y, *_rows.statistics_like(y, keep)


def quantize_like(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for y, its codes and their scales."""
    y = _rows.empty_like(x, _sum_dtype(x, residual))
    return y, *_rows.codes_like(y, out_scale)


def backward_like(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for dh, dw and db."""
    dh = _rows.empty_like(x, _sum_dtype(x, residual))
    return dh, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


# torch ------------------------------------------------------------------------------------------------------


def _add(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    h = x.to(_rows.accumulation_dtype(_sum_dtype(x, residual)))
    return h if residual is None else h + residual


def normalize(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of h [N, C] in its dtype, μ [N] and rstd [N]: torch's fused kernel, Welford's variance."""
    y, mean, rstd = torch.native_layer_norm(h, h.shape[1:], weight.to(h.dtype), bias.to(h.dtype), eps)
    return y, mean.view(-1), rstd.view(-1)


def normalize_backward(
    dy: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh [N, C], dw [C] and db [C] of ``normalize``, in the dtype of h."""
    weight = weight.to(h.dtype)
    return torch.ops.aten.native_layer_norm_backward(
        dy.to(h.dtype), h, h.shape[1:], mean[:, None], rstd[:, None], weight, weight, [True, True, True]
    )  # it asks for the bias, but only for its dtype


def _forward_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = normalize(_add(x, residual), weight, bias, eps)
    y = y.to(_sum_dtype(x, residual))
    return (y, mean, rstd) if keep else (y, mean.new_empty(0), mean.new_empty(0))


def _forward_quantize_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, _, _ = normalize(_add(x, residual), weight, bias, eps)
    return y.to(_sum_dtype(x, residual)), *quantize_torch(y, out_scale)


def _backward_torch(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh, dweight, dbias = normalize_backward(dy, _add(x, residual), weight, mean, rstd)
    return dh.to(_sum_dtype(x, residual)), dweight, dbias


# cpu --------------------------------------------------------------------------------------------------------


def _sum_arguments(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, ...]:
    first = x.data_ptr(), x.stride(0), _rows.DTYPE_CODE[x.dtype]
    if residual is None:
        return *first, 0, 0, 0, x.shape[0]
    return *first, residual.data_ptr(), residual.stride(0), _rows.DTYPE_CODE[residual.dtype], x.shape[0]


def _forward_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = forward_like(x, weight, bias, residual, eps, keep)
    x, residual = _rows.rows(x), None if residual is None else _rows.rows(residual)
    weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    out = _rows.normalized(weight, bias, eps, y, mean, rstd)
    backends.cpu().layer_norm_forward(*_sum_arguments(x, residual), out, torch.get_num_threads())
    return y, mean, rstd


def _forward_quantize_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, y_q, found = quantize_like(x, weight, bias, residual, eps, out_scale)
    x, residual = _rows.rows(x), None if residual is None else _rows.rows(residual)
    weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    out = _rows.normalized(weight, bias, eps, y, codes=_rows.codes(y_q, out_scale, found))
    backends.cpu().layer_norm_forward(*_sum_arguments(x, residual), out, torch.get_num_threads())
    return y, y_q, found


def _backward_cpu(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh, dweight, dbias = backward_like(dy, x, weight, residual, mean, rstd)
    x, residual = _rows.rows(x), None if residual is None else _rows.rows(residual)
    dy, weight = _rows.rows(dy.to(dh.dtype)), _rows.parameter(weight)
    gradient = _rows.gradient(dy, weight, mean, rstd, dh)
    pointers = dweight.data_ptr(), dbias.data_ptr()
    backends.cpu().layer_norm_backward(*_sum_arguments(x, residual), gradient, *pointers, torch.get_num_threads())
    return dh, dweight, dbias


# gpu --------------------------------------------------------------------------------------------------------


def _terms(x: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [_rows.rows(x), None if residual is None else _rows.rows(residual)]


_NO_IDS = (None, None)


def _forward_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import layer_norm as kernels

    y, mean, rstd = forward_like(x, weight, bias, residual, eps, keep)
    weight, bias = weight.contiguous(), bias.contiguous()
    kept = (mean, rstd) if keep else ()
    kernels.normalize_fwd(_terms(x, residual), _NO_IDS, weight, bias, eps, y, *kept)
    return y, mean, rstd


def _forward_quantize_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import layer_norm as kernels

    y, y_q, found = quantize_like(x, weight, bias, residual, eps, out_scale)
    weight, bias = weight.contiguous(), bias.contiguous()
    terms = _terms(x, residual)
    kernels.normalize_fwd(terms, _NO_IDS, weight, bias, eps, y, y_q=y_q, scale=out_scale, found=found)
    return y, y_q, found


def _backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import layer_norm as kernels

    dh, dweight, dbias = backward_like(dy, x, weight, residual, mean, rstd)
    terms = _terms(x, residual)
    kernels.normalize_bwd(_rows.rows(dy), terms, _NO_IDS, weight.contiguous(), mean, rstd, dh, dweight, dbias)
    return dh, dweight, dbias


# cuda: forward only -----------------------------------------------------------------------------------------


def _cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    statistics: tuple[int, int] = (0, 0),
    codes: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> None:
    """y [N, C], and where addresses are given μ and rstd; codes, scales to write, scales to read and their stride."""
    x = _rows.rows(x.to(y.dtype))
    residual = None if residual is None else _rows.rows(residual.to(y.dtype))
    if weight.dtype == bias.dtype == y.dtype:
        weight, bias = weight.contiguous(), bias.contiguous()
    else:
        weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    backends.cuda().layer_norm(
        *(x.data_ptr(), x.stride(0)),
        *((0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))),
        backends.CUDA_DTYPE[y.dtype],
        *(weight.data_ptr(), bias.data_ptr(), backends.CUDA_DTYPE[weight.dtype]),
        *x.shape,
        eps,
        y.data_ptr(),
        *statistics,
        *codes,
        *backends.device_and_stream(x.device),
    )


def _forward_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = forward_like(x, weight, bias, residual, eps, keep)
    statistics = (mean.data_ptr(), rstd.data_ptr()) if keep else (0, 0)
    _cuda(x, weight, bias, residual, eps, y, statistics)
    return y, mean, rstd


def _forward_quantize_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, y_q, found = quantize_like(x, weight, bias, residual, eps, out_scale)
    if out_scale is None:
        scales = (found.data_ptr(), 0, 0)
    else:
        out_scale = out_scale.contiguous()
        scales = (0, out_scale.data_ptr(), 1 if out_scale.dim() else 0)
    _cuda(x, weight, bias, residual, eps, y, codes=(y_q.data_ptr(), *scales))
    return y, y_q, found


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
FORWARD_QUANTIZE = {
    "torch": _forward_quantize_torch,
    "cpu": _forward_quantize_cpu,
    "triton": _forward_quantize_triton,
    "cuda": _forward_quantize_cuda,
}
BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
