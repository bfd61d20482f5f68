"""How tensors are handed to the row-wise CPU kernels: neighbours inside a row touch, parameters are float32."""

from __future__ import annotations

import torch

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1}


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, C] itself where its rows are whole, wherever they lie; else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def parameter(x: torch.Tensor) -> torch.Tensor:
    """x [C] as contiguous float32."""
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous memory for an output of the shape of x; torch.empty of a shape takes twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


NO_CODES = (0, 0, 0, 0, 0, 0)


def codes(x_q: torch.Tensor, scale: torch.Tensor | None, found: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    """Codes of csrc/cpu/rows.h: x_q [N, C] contiguous, by the given scale, or by those ``found`` [N] then."""
    c = x_q.shape[1]
    if scale is None:
        return x_q.data_ptr(), c, 0, found.data_ptr(), 0, 0
    return x_q.data_ptr(), c, 0, 0, scale.data_ptr(), scale.stride(0) if scale.dim() else 0


def normalized(
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    codes: tuple[int, int, int, int, int, int] = NO_CODES,
) -> tuple[object, ...]:
    """Normalized of csrc/cpu/rows.h, with y [N, C] contiguous and no second y."""
    c = y.shape[1]
    statistics = (0, 0) if mean is None or rstd is None else (mean.data_ptr(), rstd.data_ptr())
    return c, weight.data_ptr(), bias.data_ptr(), eps, y.data_ptr(), c, DTYPE_CODE[y.dtype], 0, 0, *statistics, codes


def gradient(
    dy: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, dh: torch.Tensor
) -> tuple[int, ...]:
    """NormalizedGradient of csrc/cpu/rows.h, with dh [N, C] contiguous."""
    return (
        *(dh.shape[1], dy.data_ptr(), dy.stride(0), DTYPE_CODE[dy.dtype]),
        *(weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dh.data_ptr(), DTYPE_CODE[dh.dtype]),
    )
