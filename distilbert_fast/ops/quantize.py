"""quantize: symmetric int8 codes with one scale a row (dynamic) or one scale in all (static).

    x_q = clamp(round(x / scale), −127, 127)        x ≈ x_q · scale        scale_n = max_c |x_nc| / 127

Wu, Judd, Zhang, Isaev, Micikevicius: Integer Quantization for Deep Learning Inference, arXiv:2004.09602, §3.
"""

from __future__ import annotations

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._operator import function, operator, triton_kernels
from distilbert_fast.ops._rows import TINY, as_scale

OP = "quantize"


@function()
def quantize(x: torch.Tensor, scale: float | torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of the rows of x, and the scale that undoes them.

    Args:
        x: [N, C], float32, bfloat16, float16 or float64.
        scale: None finds each row's own. Else a number above 0, or a float32 tensor [] or [N] on x's device.

    Returns:
        x_q: codes int8 [N, C], from −127 to 127; −128 never occurs.
        scale: float32 [N]; or the given one, a number as a float32 tensor [].

    The arithmetic is float32 (float64 is rounded to it first), each operation correctly rounded, ties to
    even, so that every backend gives the same bits:
        scale = max|row| / 127, or 0 if that is below 2⁻¹²⁶;  r = 1 / scale if scale ≥ 2⁻¹²⁶, else 0;
        x_q = round(clamp(x · r, −127, 127)), or 0 where x · r is not a number.
    So a zero row, or one so small that its scale would be subnormal, has scale 0 and codes 0. A row that
    holds a non-finite value has a non-finite scale and codes 0, so that nothing computed from it is finite;
    the other rows stay exact. With a given scale, ±∞ becomes ±127 and NaN 0, since int8 has no other place
    for them; a scale that is 0, negative or not finite gives codes 0.

    Not differentiable: neither result carries a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "x", x, ("N", "C"))
    if scale is not None:
        scale = as_scale(OP, "scale", scale, x).detach()
    x_q, found = _forward(x.detach(), scale)
    return x_q, found if scale is None else scale


def quantize_reference(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``quantize`` in torch, computed in the dtype of x: in float32, its very bits."""
    if scale is None:
        largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])  # [N]
        # Divided by a tensor: by a number, torch on CUDA multiplies by the rounded 1/127 instead.
        scale = largest / torch.full_like(largest, 127.0)
        scale = torch.where(scale < TINY, 0.0, scale)
    inverse = torch.where(scale >= TINY, scale.reciprocal(), 0.0)
    x_q = (x * (inverse[:, None] if inverse.dim() else inverse)).clamp_(-127.0, 127.0).round_()
    return x_q.nan_to_num_(0.0).to(torch.int8), scale


@operator("quantize_forward", _rows.codes_like)
def _forward(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, C], and the scales found [N]: none, [0], where one was given."""
    return _FORWARD[backends.select(OP, x.device, x.dtype)](x, scale)


# torch ------------------------------------------------------------------------------------------------------


def quantize_torch(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x_q, found = quantize_reference(x.to(torch.float32).contiguous(), scale)
    return x_q, found if scale is None else x.new_empty(0, dtype=torch.float32)


# cpu --------------------------------------------------------------------------------------------------------


def _forward_cpu(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x_q, found = _rows.codes_like(x, scale)
    x = _rows.whole_rows(x)
    matrix = x.data_ptr(), x.stride(0), backends.CPU_DTYPE[x.dtype], *x.shape
    backends.cpu().quantize(*matrix, _rows.codes_arguments(x_q, scale, found), torch.get_num_threads())
    return x_q, found


# gpu --------------------------------------------------------------------------------------------------------


def _forward_triton(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x_q, found = _rows.codes_like(x, scale)
    triton_kernels("quantize").quantize(_rows.whole_rows(x), scale, x_q, found)
    return x_q, found


_FORWARD = {"torch": quantize_torch, "cpu": _forward_cpu, "triton": _forward_triton}
