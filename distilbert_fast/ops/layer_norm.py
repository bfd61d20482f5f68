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

from distilbert_fast.ops import _check
from distilbert_fast.ops._layer_norm_backends import OP, Call, Gradient, backward, forward
from distilbert_fast.ops._operator import function
from distilbert_fast.ops._rows import as_scale


@function()
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
    wanted = x.requires_grad or weight.requires_grad or bias.requires_grad
    if torch.is_grad_enabled() and (wanted or (residual is not None and residual.requires_grad)):
        return _LayerNorm.apply(x, weight, bias, residual, eps)
    return forward(Call(x, weight, bias, residual, None, eps, "nothing"))[0]


@function()
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
    y, y_q, found = forward(Call(x, weight, bias, residual, out_scale, eps, "codes"))
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


def _check_arguments(op: str, x: torch.Tensor, weight: Any, bias: Any, residual: Any, eps: Any) -> None:
    _check.tensor(op, "x", x, ("N", "C"))
    _check.tensor(op, "weight", weight, (x.shape[1],), device=x.device)
    _check.tensor(op, "bias", bias, (x.shape[1],), device=x.device)
    if residual is not None:
        _check.tensor(op, "residual", residual, x.shape, device=x.device)
    _check.positive(op, "eps", eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, residual: Any, eps: float) -> torch.Tensor:
        call = Call(x, weight, bias, residual, None, eps, "statistics")
        y, mean, rstd = forward(call)
        ctx.save_for_backward(x, weight, residual, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call = Gradient(dy, *ctx.saved_tensors)
        dh, dweight, dbias = backward(call)
        dresidual = None if call.residual is None else dh.to(call.residual.dtype)
        dx, dweight = dh.to(call.x.dtype), dweight.to(call.weight.dtype)
        return dx, dweight, dbias.to(ctx.bias_dtype), dresidual, None
