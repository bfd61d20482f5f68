"""What row-wise ops share: the dtype of their arithmetic, outputs, scales, the reduction of row losses, and how tensors
are handed to their CPU kernels: neighbours inside a row touch, parameters are float32.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from distilbert_fast import backends
from distilbert_fast.backends import CPU_DTYPE
from distilbert_fast.ops import _check

X = TypeVar("X", torch.Tensor, torch.Tensor | None)

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TINY = 2.0**-126  # the smallest normal float32: the reciprocal of any scale from here up is finite
_LARGEST = torch.finfo(torch.float32).max


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on values of this one, and of their sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_rows(x: X) -> X:
    """x [..., C] itself where its rows are whole, wherever they lie; else a contiguous copy. None is None."""
    return x if x is None or x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous memory for an output of the shape of x; torch.empty of a shape takes twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def codes_like(y: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the int8 codes of y [N, C], and for the scales found [N]: none, [0], where one is given."""
    return empty_like(y, torch.int8), y.new_empty(y.shape[0] if scale is None else 0, dtype=torch.float32)


def parameter_gradients_like(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for dw and db [C] of a normalization, in the dtype of its statistics."""
    c = call.weight.shape[0]
    return call.mean.new_empty(c), call.mean.new_empty(c)


def normalized_like(y: torch.Tensor, call: Any) -> Outputs:
    """y [N, C] and memory for what a call keeps of its normalization, else [0] and [0].

    "statistics": μ [N] and rstd [N] for backward. "codes": those of ``codes_like``.
    """
    if call.keep == "codes":
        return y, *codes_like(y, call.out_scale)
    if call.keep == "statistics":
        n, dtype = y.shape[0], accumulation_dtype(y.dtype)
        return y, y.new_empty(n, dtype=dtype), y.new_empty(n, dtype=dtype)
    return y, y.new_empty(0), y.new_empty(0)


def as_scale(op: str, argument: str, scale: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A given scale, checked, as a float32 tensor: [] or one value for each row of x [N, …]."""
    if not isinstance(scale, torch.Tensor):
        _check.positive(op, argument, scale)
        if not TINY <= scale <= _LARGEST:
            _check.refuse(op, argument, f"from {TINY:.3g} to {_LARGEST:.3g}", scale)
        return torch.full((), scale, dtype=torch.float32, device=x.device)
    if scale.dim() > 0 and tuple(scale.shape) != (x.shape[0],):
        _check.refuse(op, argument, f"of shape [] or [{x.shape[0]}]", list(scale.shape))
    _check.tensor(op, argument, scale, scale.shape, (torch.float32,), x.device)
    return scale


# Losses of rows of a student and of a teacher ----------------------------------------------------------------------


def check_pair(op: str, columns: str, student: Any, teacher: Any, mask: Any, reduction: str) -> None:
    _check.tensor(op, "student", student, ("N", columns))
    _check.tensor(op, "teacher", teacher, student.shape, device=student.device)
    _check.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if mask is not None:
        _check.tensor(op, "mask", mask, (student.shape[0],), (torch.bool,), student.device)


def select_for_pair(op: str, call: Any) -> str:
    """The backend that serves a call."""
    student, teacher = call[:2]
    return backends.select(op, student.device, student.dtype, teacher.dtype)


def whole_pair(call: Any) -> Any:
    """The same call on matrices whose rows are whole, and on a contiguous ``mask``."""
    student, teacher, mask = call[:3]
    if student.is_contiguous() and teacher.is_contiguous() and (mask is None or mask.is_contiguous()):
        return call
    mask = None if mask is None else mask.contiguous()
    return call._replace(student=whole_rows(student), teacher=whole_rows(teacher), mask=mask)


def reduce(losses: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """The "mean" of losses [N] over counted rows, their "sum", or "none": as they are. Masked ones are 0 already."""
    if reduction == "none":
        return losses
    if reduction == "mean" and mask is None and losses.shape[0] > 0:
        return losses.mean()
    total = losses.sum()
    return total / count(losses, mask) if reduction == "mean" else total


def reduce_backward(dloss: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """The upstream gradient of each row of x: [N]."""
    if reduction == "mean":
        dloss = dloss / count(x, mask)
    return dloss.expand(x.shape[0])


def count(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | int:
    """Counted rows of x, at least 1; on the device, so that no kernel queue is drained to learn it."""
    return max(x.shape[0], 1) if mask is None else mask.sum().clamp(min=1)


# Arguments of native kernels -------------------------------------------------------------------------------------


def address(x: torch.Tensor | None) -> int:
    """Where native code finds a tensor's elements; 0: there is none."""
    return 0 if x is None else x.data_ptr()


def scale_arguments(scale: torch.Tensor | None) -> tuple[int, int]:
    """Address of one number a row or of one in all, and the stride from one row's to the next."""
    return (0, 0) if scale is None else (scale.data_ptr(), scale.stride(0) if scale.numel() > 1 else 0)


def matrix_arguments(x: torch.Tensor | None, dtype_codes: dict[torch.dtype, int]) -> tuple[int, int, int]:
    """Address, row stride and dtype of a matrix whose rows are whole, or of none."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), dtype_codes[x.dtype])


def pair_arguments(call: Any, dtype_codes: dict[torch.dtype, int]) -> tuple[int, ...]:
    """Student, teacher and mask."""
    student, teacher, mask = call[:3]
    return (
        student.data_ptr(), teacher.data_ptr(), student.stride(0), teacher.stride(0),
        dtype_codes[student.dtype], dtype_codes[teacher.dtype], 0 if mask is None else mask.data_ptr(),
    )  # fmt: skip


def parameter(x: X) -> X:
    """x [C] as contiguous float32. None is None."""
    return x if x is None or (x.dtype is torch.float32 and x.is_contiguous()) else x.float().contiguous()


NO_CODES = (0, 0, 0, 0, 0, 0)


def codes_arguments(
    x_q: torch.Tensor, scale: torch.Tensor | None, found: torch.Tensor
) -> tuple[int, int, int, int, int, int]:
    """Codes of csrc/cpu/ops/rows.h: x_q [N, C] contiguous, by the given scale, or by those ``found`` [N] then."""
    if scale is None:
        return x_q.data_ptr(), x_q.shape[1], 0, found.data_ptr(), 0, 0
    return x_q.data_ptr(), x_q.shape[1], 0, 0, *scale_arguments(scale)


def normalized_arguments(weight: torch.Tensor, bias: torch.Tensor, call: Any, outputs: Outputs) -> tuple[object, ...]:
    """Normalized of csrc/cpu/ops/rows.h, with the ``normalized_like`` of a call, and no second y."""
    y, first, second = outputs
    c = y.shape[1]
    if call.keep == "codes":
        kept: tuple[object, ...] = 0, 0, codes_arguments(first, call.out_scale, second)
    else:
        kept = first.data_ptr(), second.data_ptr(), NO_CODES
    return c, weight.data_ptr(), bias.data_ptr(), call.eps, y.data_ptr(), c, CPU_DTYPE[y.dtype], 0, 0, *kept


def gradient_arguments(
    dy: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, dh: torch.Tensor
) -> tuple[int, ...]:
    """NormalizedGradient of csrc/cpu/ops/rows.h, with dh [N, C] contiguous."""
    return (
        *(dh.shape[1], *matrix_arguments(dy, CPU_DTYPE)),
        *(weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(), dh.data_ptr(), CPU_DTYPE[dh.dtype]),
    )
