"""1 − cos of rows:  loss = 1 − c,  c = s·t a b,  a = 1/√(s·s + ε),  b = 1/√(t·t + ε),  d loss / d s = a (a c s − b t).

Forward reads both rows once for their three products and keeps c, a and b. Backward reads them once more and writes the
gradient. Rows that do not count are not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels.common import launch_rows, row_tile


@triton.jit
def _load_pair(
    student,
    teacher,
    mask,
    student_stride,
    teacher_stride,
    mask_stride,
    N,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows and columns of this program's tile, which rows there are, which of them count, and both sides of those."""
    rows, columns, present, inside = row_tile(tl.program_id(0), N, C, ROWS, BLOCK_C)
    counted = present
    if mask is not None:
        counted = present & (tl.load(mask + rows * mask_stride, mask=present, other=0) != 0)
        inside = inside & counted[:, None]
    s = tl.load(student + rows[:, None] * student_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + rows[:, None] * teacher_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return rows, columns, present, counted, s, t


@triton.jit(do_not_specialize=["N"])
def _cosine_loss_fwd_kernel(
    student,  # [N, C], rows student_stride elements apart
    teacher,  # [N, C]
    mask,  # bool [N], True = counted, or None
    loss,  # fp32 [N]
    stats,  # fp32 [N, 3]: c, a, b
    student_stride,
    teacher_stride,
    mask_stride,
    N,
    C,
    epsilon,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, _, present, counted, s, t = _load_pair(
        student, teacher, mask, student_stride, teacher_stride, mask_stride, N, C, ROWS, BLOCK_C
    )
    a = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(s * s, axis=1) + epsilon))  # [ROWS]
    b = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(t * t, axis=1) + epsilon))
    c = tl.sum(s * t, axis=1) * a * b
    tl.store(loss + rows, tl.where(counted, 1.0 - c, 0.0), mask=present)
    tl.store(stats + 3 * rows, c, mask=present)
    tl.store(stats + 3 * rows + 1, a, mask=present)
    tl.store(stats + 3 * rows + 2, b, mask=present)


@triton.jit(do_not_specialize=["N"])
def _cosine_loss_bwd_kernel(
    student,  # student … mask: as in forward
    teacher,
    mask,
    drows,  # fp32 [N]: upstream gradient
    stats,  # fp32 [N, 3]: c, a, b
    dstudent,  # [N, C]
    student_stride,
    teacher_stride,
    mask_stride,
    N,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, present, counted, s, t = _load_pair(
        student, teacher, mask, student_stride, teacher_stride, mask_stride, N, C, ROWS, BLOCK_C
    )
    c = tl.load(stats + 3 * rows, mask=counted, other=0.0)
    a = tl.load(stats + 3 * rows + 1, mask=counted, other=0.0)
    b = tl.load(stats + 3 * rows + 2, mask=counted, other=0.0)
    scale = a * tl.load(drows + rows, mask=counted, other=0.0)
    ds = s * (scale * a * c)[:, None] - t * (scale * b)[:, None]
    inside = present[:, None] & (columns < C)[None, :]
    tl.store(dstudent + rows[:, None] * C + columns[None, :], ds.to(dstudent.dtype.element_ty), mask=inside)


def cosine_loss_fwd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    epsilon: float,
    loss: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    """Write the row losses and what backward needs.

    Args:
        student, teacher: [N, C] float32, bfloat16 or float16; any row stride, last stride 1.
        mask: bool [N] of any stride, or None.
        epsilon: ε, added to the squares of both norms.
        loss: float32 [N], contiguous; gets 0 in rows that do not count.
        stats: float32 [N, 3], contiguous; gets c, a, b.
    """
    _launch(_cosine_loss_fwd_kernel, "cosine_loss_fwd", student, teacher, mask, loss, stats, epsilon=epsilon)


def cosine_loss_bwd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    dstudent: torch.Tensor,
) -> None:
    """Write the gradient.

    Args:
        student, teacher, mask: as given to ``cosine_loss_fwd``.
        drows: float32 [N], contiguous; the upstream gradient of each row's loss.
        stats: float32 [N, 3], contiguous; what ``cosine_loss_fwd`` wrote.
        dstudent: [N, C], contiguous; gets drows · d loss / d student.
    """
    _launch(_cosine_loss_bwd_kernel, "cosine_loss_bwd", student, teacher, mask, drows, stats, dstudent)


def _launch(
    kernel: Any,
    name: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    *others: Any,
    **named: Any,
) -> None:
    strides = student.stride(0), teacher.stride(0), 0 if mask is None else mask.stride(0)
    launch_rows(kernel, student, name, (student, teacher), student, teacher, mask, *others, *strides, **named)
