"""cosine_loss: 1 − cos between hidden states, the loss that aligns the directions of student and teacher.

    loss_n = 1 − c_n,    c = s·t a b,    a = 1/√(s·s + ε),  b = 1/√(t·t + ε)          d loss_n / d s = a (a c s − b t)

ε = 1e-12 is that of torch.nn.CosineEmbeddingLoss, whose target 1 this is. L_cos of Sanh et al.: DistilBERT, a
distilled version of BERT, arXiv:1910.01108.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _rows
from distilbert_fast.ops._operator import function, operator, triton_kernels

OP = "cosine_loss"
EPSILON = 1e-12


@function()
def cosine_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """1 − cos(student, teacher) over rows of hidden states.

    Args:
        student: hidden states [N, C], float32, bfloat16, float16 or float64, any strides. The loss is
            differentiable in these.
        teacher: hidden states [N, C], same device, any of those dtypes. Never gets a gradient.
        mask: bool [N], True = the row counts. None counts all.
        reduction: "mean" over counted rows, "sum", or "none" (0 in rows that do not count).

    Returns:
        Scalar, or [N] for "none"; float32 (float64 if the student is). All rows masked out: loss 0, gradient 0.
        A zero row on either side has loss 1 and, as in torch, the finite gradient −t/√(ε(t·t + ε)) at s = 0.
        A row that is not finite has a non-finite loss and leaves the others exact.

    Arithmetic is float32 for every dtype but float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _rows.check_pair(OP, "C", student, teacher, mask, reduction)
    teacher = teacher.detach()
    if not (torch.is_grad_enabled() and student.requires_grad):
        losses, _ = _forward(Call(student, teacher, mask))
        return _rows.reduce(losses, mask, reduction)
    return _CosineLoss.apply(student, teacher, mask, reduction)


def cosine_loss_reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The definition of ``cosine_loss`` in differentiable torch, computed in the dtype of the hidden states."""
    a = (student.square().sum(dim=1) + EPSILON).rsqrt()
    b = (teacher.square().sum(dim=1) + EPSILON).rsqrt()
    losses = 1 - (student * teacher).sum(dim=1) * a * b
    if mask is not None:
        losses = torch.where(mask, losses, 0.0)
    return _rows.reduce(losses, mask, reduction)


class _CosineLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Any, teacher: Any, mask: Any, reduction: str) -> torch.Tensor:
        losses, stats = _forward(Call(student, teacher, mask))
        ctx.reduction = reduction
        ctx.save_for_backward(student, teacher, mask, stats)
        return _rows.reduce(losses, mask, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, mask, stats = ctx.saved_tensors
        drows = _rows.reduce_backward(dloss, student, mask, ctx.reduction)
        return _backward(Gradient(student, teacher, mask, drows, stats)), None, None, None


# The record of a call, its fakes and registered ops ------------------------------------------------------------


class Call(NamedTuple):
    """All arguments of forward."""

    student: torch.Tensor  # [N, C]
    teacher: torch.Tensor  # [N, C]
    mask: torch.Tensor | None  # bool [N]


class Gradient(NamedTuple):
    """All arguments of backward."""

    student: torch.Tensor  # [N, C]
    teacher: torch.Tensor  # [N, C]
    mask: torch.Tensor | None  # bool [N]
    drows: torch.Tensor  # [N], the upstream gradient of each row
    stats: torch.Tensor  # [N, 3]


Pair = tuple[torch.Tensor, torch.Tensor]


def _forward_like(call: Call) -> Pair:
    n, dtype = call.student.shape[0], _rows.accumulation_dtype(call.student.dtype)
    return call.student.new_empty(n, dtype=dtype), call.student.new_empty((n, 3), dtype=dtype)


@operator("cosine_loss_forward", _forward_like)
def _forward(call: Call) -> Pair:
    """Row losses [N], and (c, a, b) of each row [N, 3] for backward."""
    return _FORWARD[_rows.select_for_pair(OP, call)](_rows.whole_pair(call))


def _backward_like(call: Gradient) -> torch.Tensor:
    return _rows.empty_like(call.student, call.student.dtype)


@operator("cosine_loss_backward", _backward_like)
def _backward(call: Gradient) -> torch.Tensor:
    """Gradient [N, C] from the upstream gradient of each row [N]."""
    drows = call.drows.to(_rows.accumulation_dtype(call.student.dtype)).contiguous()
    return _BACKWARD[_rows.select_for_pair(OP, call)](_rows.whole_pair(call)._replace(drows=drows))


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(call: Call) -> Pair:
    student, teacher, mask = call
    dtype = _rows.accumulation_dtype(student.dtype)
    s, t = student.to(dtype), teacher.to(dtype)
    a = (s.square().sum(dim=1) + EPSILON).rsqrt()
    b = (t.square().sum(dim=1) + EPSILON).rsqrt()
    c = (s * t).sum(dim=1) * a * b
    losses = 1 - c
    if mask is not None:
        losses = torch.where(mask, losses, 0.0)
    return losses, torch.stack([c, a, b], dim=1)


def _backward_torch(call: Gradient) -> torch.Tensor:
    student, teacher, mask, drows, stats = call
    c, a, b = stats.unbind(dim=1)  # [N] each
    scale = a * drows
    dstudent = student * (scale * a * c)[:, None] - teacher * (scale * b)[:, None]
    if mask is not None:
        dstudent = torch.where(mask[:, None], dstudent, 0.0)
    return dstudent.to(student.dtype)


# cpu -----------------------------------------------------------------------------------------------------------


def _forward_cpu(call: Call) -> Pair:
    losses, stats = _forward_like(call)
    n, c = call.student.shape
    pair = *_rows.pair_arguments(call, backends.CPU_DTYPE), c
    backends.cpu().cosine_loss_forward(pair, n, losses.data_ptr(), stats.data_ptr(), torch.get_num_threads())
    return losses, stats


def _backward_cpu(call: Gradient) -> torch.Tensor:
    dstudent = _backward_like(call)
    n, c = dstudent.shape
    pair = *_rows.pair_arguments(call, backends.CPU_DTYPE), c
    pointers = call.drows.data_ptr(), call.stats.data_ptr(), dstudent.data_ptr()
    backends.cpu().cosine_loss_backward(pair, n, *pointers, torch.get_num_threads())
    return dstudent


# triton --------------------------------------------------------------------------------------------------------


def _forward_triton(call: Call) -> Pair:
    losses, stats = _forward_like(call)
    triton_kernels("cosine_loss").cosine_loss_fwd(*call, EPSILON, losses, stats)
    return losses, stats


def _backward_triton(call: Gradient) -> torch.Tensor:
    dstudent = _backward_like(call)
    triton_kernels("cosine_loss").cosine_loss_bwd(*call, dstudent)
    return dstudent


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
_BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
