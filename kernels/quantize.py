"""Symmetric int8 codes of rows: scale = max |x| / 127, r = 1 / scale, code = round(clamp(x · r, −127, 127)).

One pass: a row is read into registers, which its maximum and its codes are both made from. Every operation is rounded
once (``div.rn``, no FMA), so the bits are those of ops/quantize.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels.common import launch_rows, quantize_rows, row_tile


@triton.jit(do_not_specialize=["N"])
def _quantize_kernel(
    x,  # [N, C], rows x_stride elements apart
    scale,  # fp32, scale_stride elements apart, or None: each row's own
    x_q,  # int8 [N, C]
    found,  # fp32 [N], or None
    N,
    C,
    x_stride,
    scale_stride,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, counted, inside = row_tile(tl.program_id(0), N, C, ROWS, BLOCK_C)
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    codes = quantize_rows(values, rows, counted, scale, scale_stride, found)
    tl.store(x_q + rows[:, None] * C + columns[None, :], codes, mask=inside)


def quantize(x: torch.Tensor, scale: torch.Tensor | None, x_q: torch.Tensor, found: torch.Tensor) -> None:
    """Write the codes, and the scales where none is given.

    Args:
        x: [N, C] float32, bfloat16 or float16; any row stride, last stride 1.
        scale: float32 [] or [N] of any stride, or None.
        x_q: int8 [N, C], contiguous.
        found: float32 [N], contiguous; gets each row's own scale if none is given.
    """
    found_by = found if scale is None else None
    strides = {"x_stride": x.stride(0), "scale_stride": stride_of(scale)}
    launch_rows(_quantize_kernel, x, "quantize", [x], x, scale, x_q, found_by, **strides)


def stride_of(scale: torch.Tensor | None) -> int:
    """Elements between the scales of two rows; 0 where all share one."""
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)
