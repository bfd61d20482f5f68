"""layer_norm: the residual addition and LayerNorm that end a Transformer block, and int8 codes of its result.

    h = x + residual        y = (h − μ) · rstd · w + b,   μ = mean_c h,   rstd = 1 / √(mean_c (h − μ)² + ε)

    dŷ = dy · w      dh = rstd · (dŷ − mean_c dŷ − ĥ · mean_c (dŷ · ĥ)),   ĥ = (h − μ) · rstd
    dw = Σ_n dy · ĥ      db = Σ_n dy      dx = dresidual = dh

Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._operator import operator
from distilbert_fast.ops.quantize import as_scale, quantize_torch

OP = "layer_norm"


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """LayerNorm of each row of x + residual.

    Args:
        x: [N, C], float32, bfloat16, float16 or float64. Differentiable, as are the next three.
        weight: w [C], same device, any of those dtypes.
        bias: b [C], likewise.
        residual: [N, C], likewise; None adds nothing.
        eps: ε > 0, added to the variance.

    Returns:
        y [N, C] in the dtype that x + residual has in torch.

    Sum, statistics and normalisation are float32 for every dtype but float64, rounded once, at the end. The
    variance is that of the centred values, never E[h²] − μ². A row that holds a non-finite value is NaN and
    leaves the others exact. Backward reads x and residual again, and keeps two numbers a row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check_arguments(OP, x, weight, bias, residual, eps)
    differentiable = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        return _LayerNorm.apply(x, weight, bias, residual, eps)
    return _forward(x, weight, bias, residual, eps, False)[0]


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-12,
    out_scale: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``layer_norm`` and ``quantize`` of its result in one pass, for the int8 linear layers that read it.

    Args:
        x, weight, bias, residual, eps: as in ``layer_norm``.
        out_scale: None finds each row's own scale. Else a number above 0, or a float32 tensor [] or [N].

    Returns:
        y: as ``layer_norm`` gives it.
        y_q: int8 [N, C], the codes of the float32 y, before it is rounded to its dtype.
        y_scale: float32 [N]; or the given one, a number as a float32 tensor [].

    Inference only: nothing it returns carries a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check_arguments("layer_norm_quantize", x, weight, bias, residual, eps)
    if out_scale is not None:
        out_scale = as_scale("layer_norm_quantize", "out_scale", out_scale, x).detach()
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    residual = None if residual is None else residual.detach()
    y, y_q, found = _forward_quantize(x, weight, bias, residual, eps, out_scale)
    return y, y_q, found if out_scale is None else out_scale


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """The definition of ``layer_norm`` in differentiable torch, computed in the dtype of its arguments."""
    h = x if residual is None else x + residual
    centred = h - h.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)
    return centred * rstd * weight + bias


def _check_arguments(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
) -> None:
    _check.tensor(op, "x", x, ("N", "C"))
    _check.tensor(op, "weight", weight, (x.shape[1],), device=x.device)
    _check.tensor(op, "bias", bias, (x.shape[1],), device=x.device)
    if residual is not None:
        _check.tensor(op, "residual", residual, tuple(x.shape), device=x.device)
    _check.positive(op, "eps", eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        y, mean, rstd = _forward(x, weight, bias, residual, eps, True)
        ctx.save_for_backward(x, weight, residual, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, residual, mean, rstd = ctx.saved_tensors
        dh, dweight, dbias = _backward(dy, x, weight, residual, mean, rstd)
        dresidual = None if residual is None else dh.to(residual.dtype)
        return dh.to(x.dtype), dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), dresidual, None


def _sum_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _select(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, backward: bool = False) -> str:
    select = backends.select_backward if backward else backends.select
    dtypes = (x.dtype, weight.dtype) if residual is None else (x.dtype, weight.dtype, residual.dtype)
    return select(OP, x.device, *dtypes)


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = _rows.empty_like(x, _sum_dtype(x, residual))
    return y, *_rows.statistics_like(y, keep)


@operator(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [N, C], and what backward needs if ``keep``: μ [N] and rstd [N]; else [0] and [0]."""
    return _FORWARD[_select(x, weight, residual)](x, weight, bias, residual, eps, keep)


def _forward_quantize_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = _rows.empty_like(x, _sum_dtype(x, residual))
    return y, *_rows.codes_like(y, out_scale)


@operator(
    "layer_norm_quantize_forward(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps,"
    " Tensor? out_scale) -> (Tensor, Tensor, Tensor)",
    _forward_quantize_fake,
)
def _forward_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [N, C], its codes [N, C], and the scales found [N]: none, [0], where one was given."""
    return _FORWARD_QUANTIZE[_select(x, weight, residual)](x, weight, bias, residual, eps, out_scale)


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh = _rows.empty_like(x, _sum_dtype(x, residual))
    return dh, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


@operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? residual, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh [N, C] in the dtype of y; dw [C] and db [C] in that of the statistics."""
    return _BACKWARD[_select(x, weight, residual, backward=True)](dy, x, weight, residual, mean, rstd)


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
    y, mean, rstd = _forward_fake(x, weight, bias, residual, eps, keep)
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
    y, y_q, found = _forward_quantize_fake(x, weight, bias, residual, eps, out_scale)
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
    dh, dweight, dbias = _backward_fake(dy, x, weight, residual, mean, rstd)
    x, residual = _rows.rows(x), None if residual is None else _rows.rows(residual)
    dy, weight = _rows.rows(dy.to(dh.dtype)), _rows.parameter(weight)
    gradient = _rows.gradient(dy, weight, mean, rstd, dh)
    pointers = dweight.data_ptr(), dbias.data_ptr()
    backends.cpu().layer_norm_backward(*_sum_arguments(x, residual), gradient, *pointers, torch.get_num_threads())
    return dh, dweight, dbias


# triton -----------------------------------------------------------------------------------------------------


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

    y, mean, rstd = _forward_fake(x, weight, bias, residual, eps, keep)
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

    y, y_q, found = _forward_quantize_fake(x, weight, bias, residual, eps, out_scale)
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

    dh, dweight, dbias = _backward_fake(dy, x, weight, residual, mean, rstd)
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
    y, mean, rstd = _forward_fake(x, weight, bias, residual, eps, keep)
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
    y, y_q, found = _forward_quantize_fake(x, weight, bias, residual, eps, out_scale)
    if out_scale is None:
        scales = (found.data_ptr(), 0, 0)
    else:
        out_scale = out_scale.contiguous()
        scales = (0, out_scale.data_ptr(), 1 if out_scale.dim() else 0)
    _cuda(x, weight, bias, residual, eps, y, codes=(y_q.data_ptr(), *scales))
    return y, y_q, found


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
_FORWARD_QUANTIZE = {
    "torch": _forward_quantize_torch,
    "cpu": _forward_quantize_cpu,
    "triton": _forward_quantize_triton,
    "cuda": _forward_quantize_cuda,
}
_BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
