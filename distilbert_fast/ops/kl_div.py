"""kl_div: softmax-temperature Kullback-Leibler divergence, the soft-target loss of distillation.

    loss_n = τ² Σ_v p_t (log p_t − log p_s),   p = softmax(logits / τ)         d loss_n / d student = τ (p_s − p_t)

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._operator import function, is_eager, operator, triton_kernels

OP = "kl_div"


@function()
def kl_div(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    recompute: bool = False,
) -> torch.Tensor:
    """τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)) over rows of logits.

    Args:
        student: logits [N, V], float32, bfloat16, float16 or float64. The loss is differentiable in these.
        teacher: logits [N, V], same device, any of those dtypes. Never gets a gradient.
        temperature: τ > 0; both sides are divided by it.
        mask: bool [N], True = the row counts. None counts all.
        reduction: "mean" over counted rows, "sum", or "none" (0 in rows that do not count).
        recompute: False computes the gradient together with the loss, in one pass over the logits, and keeps
            it [N, V] for backward. True keeps four numbers a row and computes the gradient in backward: the
            logits are read again, and they, not the gradient, stay in memory meanwhile. A float16 student
            always does: its gradient would underflow before a loss scale could lift it.

    Returns:
        Scalar, or [N] for "none"; float32 (float64 if the student is). All rows masked out: loss 0, gradient 0.
        A row with a non-finite logit has a non-finite loss and leaves the others exact.

    Arithmetic is float32 for every dtype but float64. The last dimension is copied if its stride is not 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _rows.check_pair(OP, "V", student, teacher, mask, reduction)
    if student.shape[1] == 0 and student.shape[0] > 0:
        _check.refuse(OP, "student", "of at least one column", list(student.shape))
    _check.positive(OP, "temperature", temperature)
    teacher = teacher.detach()
    if not (torch.is_grad_enabled() and student.requires_grad):
        losses, _ = forward(Call(student, teacher, mask, temperature, reduction == "mean", "none"))
        return _rows.reduce(losses, mask, reduction)
    keep = "stats" if recompute or student.dtype == torch.float16 else "gradient"
    return _KLDiv.apply(student, teacher, mask, temperature, reduction, keep)


def kl_div_reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The definition of ``kl_div`` in differentiable torch, computed in the dtype of the logits."""
    log_s = torch.log_softmax(student / temperature, dim=-1)
    log_t = torch.log_softmax(teacher / temperature, dim=-1)
    losses = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    if mask is not None:
        losses = torch.where(mask, losses, 0.0)
    return _rows.reduce(losses, mask, reduction)


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Any, teacher: Any, mask: Any, temperature: float, reduction: str, keep: str
    ) -> torch.Tensor:
        losses, kept = forward(Call(student, teacher, mask, temperature, reduction == "mean", keep))
        ctx.temperature, ctx.reduction, ctx.keep, ctx.applied = temperature, reduction, keep, None
        if keep == "gradient":
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(student, teacher, mask, kept)
        return _rows.reduce(losses, mask, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.keep == "gradient":
            (gradient,) = ctx.saved_tensors
            if ctx.reduction == "none":
                dstudent = gradient * dloss[:, None].to(gradient.dtype)
            elif is_eager((gradient, dloss)) and _scales(gradient):
                dstudent = _scaled(ctx, gradient, dloss)
            elif _is_one(dloss):
                dstudent = gradient  # autograd copies it if anybody else still holds it
            else:
                dstudent = gradient * dloss.to(gradient.dtype)
        else:
            student, teacher, mask, stats = ctx.saved_tensors
            drows = _rows.reduce_backward(dloss, student, mask, ctx.reduction)
            dstudent = _backward(Gradient(student, teacher, mask, drows, stats, ctx.temperature))
        return dstudent, None, None, None, None, None


def _is_one(dloss: torch.Tensor) -> bool:
    """True only where the value can be read for free: a real CPU scalar."""
    return is_eager((dloss,)) and dloss.device.type == "cpu" and bool(dloss == 1)


def _scales(gradient: torch.Tensor) -> bool:
    """Whether a kernel can multiply the kept gradient where it is."""
    return gradient.is_contiguous() and backends.select(OP, gradient.device, gradient.dtype) == "triton"


def _scaled(ctx: Any, gradient: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """dloss · gradient. The first backward of a graph multiplies it where it is, by a kernel that leaves at once if
    dloss is 1. A later one (retain_graph) makes another, since the first may still be somebody's; NaN after a dloss
    of 0.
    """
    factor = dloss.detach().float()
    if ctx.applied is None:
        ctx.applied = factor.clone()
        triton_kernels("kl_div").scale_gradient(gradient, ctx.applied)
        return gradient
    return (gradient * (factor / ctx.applied)).to(gradient.dtype)


# The record of a call, its fakes and registered ops ------------------------------------------------------------


class Call(NamedTuple):
    """All arguments of forward."""

    student: torch.Tensor  # [N, V]
    teacher: torch.Tensor  # [N, V]
    mask: torch.Tensor | None  # bool [N]
    temperature: float
    mean: bool  # whether the kept gradient is divided by the count of rows
    keep: str  # for backward: "gradient" [N, V], "stats" [N, 4] or "none"


class Gradient(NamedTuple):
    """All arguments of backward."""

    student: torch.Tensor  # [N, V]
    teacher: torch.Tensor  # [N, V]
    mask: torch.Tensor | None  # bool [N]
    drows: torch.Tensor  # [N], the upstream gradient of each row
    stats: torch.Tensor  # [N, 4]
    temperature: float


Pair = tuple[torch.Tensor, torch.Tensor]


def _kept_like(student: torch.Tensor, keep: str) -> torch.Tensor:
    """What backward needs: the gradient [N, V], the softmax statistics [N, 4], or nothing.

    Statistics of a row are (m_s, Z_s, m_t, Z_t) with m = max x, Z = Σ exp((x − m)/τ): p = exp((x − m)/τ)/Z loses
    nothing to the rounding of a log-sum-exp.
    """
    if keep == "gradient":
        return _rows.empty_like(student, student.dtype)
    shape = student.shape[0], 4 if keep == "stats" else 0
    return student.new_empty(shape, dtype=_rows.accumulation_dtype(student.dtype))


def _forward_like(call: Call) -> Pair:
    student = call.student
    losses = student.new_empty(student.shape[0], dtype=_rows.accumulation_dtype(student.dtype))
    return losses, _kept_like(student, call.keep)


def _gradient_like(call: Gradient) -> torch.Tensor:
    return _kept_like(call.student, "gradient")


@operator("kl_div_forward", _forward_like)
def forward(call: Call) -> Pair:
    """Row losses [N] and what ``keep`` asks for; the kept gradient is already divided by the count if ``mean``."""
    return _FORWARD[_rows.select_for_pair(OP, call)](_rows.whole_pair(call))


@operator("kl_div_backward", _gradient_like)
def _backward(call: Gradient) -> torch.Tensor:
    """Gradient [N, V] from the saved statistics and the upstream gradient of each row [N]."""
    drows = call.drows.to(_rows.accumulation_dtype(call.student.dtype)).contiguous()
    return _BACKWARD[_rows.select_for_pair(OP, call)](_rows.whole_pair(call)._replace(drows=drows))


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(call: Call) -> Pair:
    student, teacher, mask, temperature, mean, keep = call
    dtype = _rows.accumulation_dtype(student.dtype)
    s, t = student.to(dtype), teacher.to(dtype)
    losses = kl_div_reference(s, t, temperature, mask, "none")
    if keep == "none":
        return losses, _kept_like(student, keep)
    stats = torch.cat([_statistics(s, temperature), _statistics(t, temperature)], dim=1)  # [N, 4]
    if keep == "stats":
        return losses, stats
    drows = torch.ones_like(losses) / (_rows.count(losses, mask) if mean else 1)
    return losses, _backward_torch(Gradient(student, teacher, mask, drows, stats, temperature))


def _statistics(x: torch.Tensor, temperature: float) -> torch.Tensor:
    m = x.amax(dim=1, keepdim=True)
    return torch.cat([m, torch.exp((x - m) / temperature).sum(dim=1, keepdim=True)], dim=1)  # [N, 2]


def _backward_torch(call: Gradient) -> torch.Tensor:
    student, teacher, mask, drows, stats, temperature = call
    dtype = _rows.accumulation_dtype(student.dtype)
    m_s, z_s, m_t, z_t = stats.split(1, dim=1)  # [N, 1] each
    p_s = torch.exp((student.to(dtype) - m_s) / temperature) / z_s
    p_t = torch.exp((teacher.to(dtype) - m_t) / temperature) / z_t
    dstudent = (p_s - p_t) * (temperature * drows)[:, None]
    if mask is not None:
        dstudent = torch.where(mask[:, None], dstudent, 0.0)
    return dstudent.to(student.dtype)


# cpu and cuda --------------------------------------------------------------------------------------------------


def _logits_arguments(call: Call | Gradient, dtype_codes: dict[torch.dtype, int]) -> tuple[Any, ...]:
    """What all native entries begin with."""
    return *_rows.pair_arguments(call, dtype_codes), *call.student.shape, call.temperature


def _kept_addresses(call: Call, kept: torch.Tensor) -> tuple[int, int]:
    """Of the statistics and of the gradient."""
    return kept.data_ptr() if call.keep == "stats" else 0, kept.data_ptr() if call.keep == "gradient" else 0


def _forward_cpu(call: Call) -> Pair:
    student, keep = call.student, call.keep
    losses = student.new_empty(student.shape[0], dtype=torch.float32)
    kept = backends.empty_cpu(student) if keep == "gradient" else _kept_like(student, keep)
    logits, kept_at = _logits_arguments(call, backends.CPU_DTYPE), _kept_addresses(call, kept)
    backends.cpu().kl_div_forward(*logits, call.mean, losses.data_ptr(), *kept_at, torch.get_num_threads())
    return losses, kept


def _backward_cpu(call: Gradient) -> torch.Tensor:
    dstudent = backends.empty_cpu(call.student)
    pointers = call.drows.data_ptr(), call.stats.data_ptr(), dstudent.data_ptr()
    arguments = *_logits_arguments(call, backends.CPU_DTYPE), *pointers
    backends.cpu().kl_div_backward(*arguments, torch.get_num_threads())
    return dstudent


def _forward_cuda(call: Call) -> Pair:
    losses, kept = _forward_like(call)
    scale = _scale(call)
    pointers = scale.data_ptr(), losses.data_ptr(), *_kept_addresses(call, kept)
    arguments = *_logits_arguments(call, backends.CUDA_DTYPE), *pointers
    backends.cuda().kl_div_forward(*arguments, *backends.device_and_stream(losses.device))
    return losses, kept


def _backward_cuda(call: Gradient) -> torch.Tensor:
    dstudent = _gradient_like(call)
    pointers = call.drows.data_ptr(), call.stats.data_ptr(), dstudent.data_ptr()
    arguments = *_logits_arguments(call, backends.CUDA_DTYPE), *pointers
    backends.cuda().kl_div_backward(*arguments, *backends.device_and_stream(dstudent.device))
    return dstudent


def _scale(call: Call) -> torch.Tensor:
    """1 / count as a float32 scalar on the device: the host never waits to learn it."""
    one = torch.ones((), dtype=torch.float32, device=call.student.device)
    return one / _rows.count(call.student, call.mask) if call.mean else one


# triton --------------------------------------------------------------------------------------------------------


def _forward_triton(call: Call) -> Pair:
    losses, kept = _forward_like(call)
    stats, gradient = kept if call.keep == "stats" else None, kept if call.keep == "gradient" else None
    triton_kernels("kl_div").kl_div_fwd(*call[:3], _scale(call), call.temperature, losses, stats, gradient)
    return losses, kept


def _backward_triton(call: Gradient) -> torch.Tensor:
    dstudent = _gradient_like(call)
    triton_kernels("kl_div").kl_div_bwd(*call, dstudent)
    return dstudent


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
_BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton, "cuda": _backward_cuda}
