"""kl_div: softmax-temperature Kullback-Leibler divergence, the soft-target loss of distillation.

    loss_n = τ² Σ_v p_t (log p_t − log p_s),   p = softmax(logits / τ)         d loss_n / d student = τ (p_s − p_t)

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._operator import function, is_eager, operator

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
    _check.tensor(OP, "student", student, ("N", "V"))
    _check.tensor(OP, "teacher", teacher, student.shape, device=student.device)
    if student.shape[1] == 0 and student.shape[0] > 0:
        _check.refuse(OP, "student", "of at least one column", list(student.shape))
    _check.positive(OP, "temperature", temperature)
    _check.choice(OP, "reduction", reduction, ("mean", "sum", "none"))
    if mask is not None:
        _check.tensor(OP, "mask", mask, (student.shape[0],), (torch.bool,), student.device)
    teacher = teacher.detach()
    if not (torch.is_grad_enabled() and student.requires_grad):
        rows, _ = _forward(student, teacher, mask, temperature, reduction == "mean", "none")
        return _rows.reduce(rows, mask, reduction)
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
    rows = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return _rows.reduce(rows, mask, reduction)


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        temperature: float,
        reduction: str,
        keep: str,
    ) -> torch.Tensor:
        rows, kept = _forward(student, teacher, mask, temperature, reduction == "mean", keep)
        ctx.temperature, ctx.reduction, ctx.keep = temperature, reduction, keep
        if keep == "gradient":
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(student, teacher, mask, kept)
        return _rows.reduce(rows, mask, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.keep == "gradient":
            (gradient,) = ctx.saved_tensors
            if ctx.reduction == "none":
                dstudent = gradient * dloss[:, None].to(gradient.dtype)
            elif _is_one(dloss):
                dstudent = gradient  # autograd copies it if anybody else still holds it
            else:
                dstudent = gradient * dloss.to(gradient.dtype)
        else:
            student, teacher, mask, stats = ctx.saved_tensors
            if ctx.reduction == "mean":
                dloss = dloss / _rows.count(student, mask)
            dstudent = _backward(student, teacher, mask, dloss.expand(student.shape[0]), stats, ctx.temperature)
        return dstudent, None, None, None, None, None


def _is_one(dloss: torch.Tensor) -> bool:
    """True only where the value can be read for free: a real CPU scalar."""
    return is_eager((dloss,)) and dloss.device.type == "cpu" and bool(dloss == 1)


def _kept_like(student: torch.Tensor, keep: str) -> torch.Tensor:
    """What backward needs: the gradient [N, V], the softmax statistics [N, 4], or nothing.

    Statistics of a row are (m_s, Z_s, m_t, Z_t) with m = max x, Z = Σ exp((x − m)/τ): p = exp((x − m)/τ)/Z loses
    nothing to the rounding of a log-sum-exp.
    """
    if keep == "gradient":
        return _rows.empty_like(student, student.dtype)
    return student.new_empty(
        (student.shape[0], 4 if keep == "stats" else 0), dtype=_rows.accumulation_dtype(student.dtype)
    )


def _forward_fake(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return student.new_empty(student.shape[0], dtype=_rows.accumulation_dtype(student.dtype)), _kept_like(student, keep)


@operator(
    "kl_div_forward(Tensor student, Tensor teacher, Tensor? mask, float temperature, bool mean, str keep)"
    " -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row losses [N] and what ``keep`` asks for; the kept gradient is already divided by the count if ``mean``."""
    name = backends.select(OP, student.device, student.dtype, teacher.dtype)
    return _FORWARD[name](_rows.rows(student), _rows.rows(teacher), mask, temperature, mean, keep)


def _backward_fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    return _kept_like(student, "gradient")


@operator(
    "kl_div_backward(Tensor student, Tensor teacher, Tensor? mask, Tensor drows, Tensor stats, float temperature)"
    " -> Tensor",
    _backward_fake,
)
def _backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient [N, V] from the saved statistics and the upstream gradient of each row [N]."""
    name = backends.select(OP, student.device, student.dtype, teacher.dtype)
    drows = drows.to(_rows.accumulation_dtype(student.dtype)).contiguous()
    return _BACKWARD[name](_rows.rows(student), _rows.rows(teacher), mask, drows, stats, temperature)


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _rows.accumulation_dtype(student.dtype)
    s, t = student.to(dtype), teacher.to(dtype)
    rows = kl_div_reference(s, t, temperature, mask, "none")
    if keep == "none":
        return rows, _kept_like(student, keep)
    stats = torch.cat([_statistics(s, temperature), _statistics(t, temperature)], dim=1)  # [N, 4]
    if keep == "stats":
        return rows, stats
    drows = torch.ones_like(rows) / (_rows.count(rows, mask) if mean else 1)
    return rows, _backward_torch(student, teacher, mask, drows, stats, temperature)


def _statistics(x: torch.Tensor, temperature: float) -> torch.Tensor:
    m = x.amax(dim=1, keepdim=True)
    return torch.cat([m, torch.exp((x - m) / temperature).sum(dim=1, keepdim=True)], dim=1)  # [N, 2]


def _backward_torch(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    dtype = _rows.accumulation_dtype(student.dtype)
    m_s, z_s, m_t, z_t = stats.split(1, dim=1)  # [N, 1] each
    p_s = torch.exp((student.to(dtype) - m_s) / temperature) / z_s
    p_t = torch.exp((teacher.to(dtype) - m_t) / temperature) / z_t
    dstudent = (p_s - p_t) * (temperature * drows)[:, None]
    if mask is not None:
        dstudent = torch.where(mask[:, None], dstudent, 0.0)
    return dstudent.to(student.dtype)


# cpu -----------------------------------------------------------------------------------------------------------


def _logits_arguments(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, codes: dict[torch.dtype, int]
) -> tuple[int, ...]:
    """What all native entries begin with."""
    return (
        student.data_ptr(),
        teacher.data_ptr(),
        student.stride(0),
        teacher.stride(0),
        codes[student.dtype],
        codes[teacher.dtype],
        0 if mask is None else mask.data_ptr(),
        student.shape[0],
        student.shape[1],
    )


def _forward_cpu(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = None if mask is None else mask.contiguous()
    rows = student.new_empty(student.shape[0], dtype=torch.float32)
    kept = backends.empty_cpu(student) if keep == "gradient" else _kept_like(student, keep)
    backends.cpu().kl_div_forward(
        *_logits_arguments(student, teacher, mask, _rows.DTYPE_CODE),
        temperature,
        mean,
        rows.data_ptr(),
        kept.data_ptr() if keep == "stats" else 0,
        kept.data_ptr() if keep == "gradient" else 0,
        torch.get_num_threads(),
    )
    return rows, kept


def _backward_cpu(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    mask = None if mask is None else mask.contiguous()
    dstudent = backends.empty_cpu(student)
    backends.cpu().kl_div_backward(
        *_logits_arguments(student, teacher, mask, _rows.DTYPE_CODE),
        temperature,
        drows.data_ptr(),
        stats.data_ptr(),
        dstudent.data_ptr(),
        torch.get_num_threads(),
    )
    return dstudent


# gpu -----------------------------------------------------------------------------------------------------------


def _scale(rows: torch.Tensor, mask: torch.Tensor | None, mean: bool) -> torch.Tensor:
    """1 / count as a float32 scalar on the device: the host never waits to learn it."""
    ones = torch.ones((), dtype=torch.float32, device=rows.device)
    return ones / _rows.count(rows, mask) if mean else ones


def _forward_triton(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import kl_div as kernels

    rows, kept = _forward_fake(student, teacher, mask, temperature, mean, keep)
    stats = kept if keep == "stats" else None
    gradient = kept if keep == "gradient" else None
    kernels.kl_div_fwd(student, teacher, mask, _scale(rows, mask, mean), temperature, rows, stats, gradient)
    return rows, kept


def _backward_triton(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    from distilbert_fast.kernels import kl_div as kernels

    dstudent = _kept_like(student, "gradient")
    kernels.kl_div_bwd(student, teacher, mask, drows, stats, temperature, dstudent)
    return dstudent


def _forward_cuda(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, temperature: float, mean: bool, keep: str
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = None if mask is None else mask.contiguous()
    rows, kept = _forward_fake(student, teacher, mask, temperature, mean, keep)
    scale = _scale(rows, mask, mean)
    backends.cuda().kl_div_forward(
        *_logits_arguments(student, teacher, mask, backends.CUDA_DTYPE),
        temperature,
        scale.data_ptr(),
        rows.data_ptr(),
        kept.data_ptr() if keep == "stats" else 0,
        kept.data_ptr() if keep == "gradient" else 0,
        *backends.device_and_stream(student.device),
    )
    return rows, kept


def _backward_cuda(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    mask = None if mask is None else mask.contiguous()
    dstudent = _kept_like(student, "gradient")
    backends.cuda().kl_div_backward(
        *_logits_arguments(student, teacher, mask, backends.CUDA_DTYPE),
        temperature,
        drows.data_ptr(),
        stats.data_ptr(),
        dstudent.data_ptr(),
        *backends.device_and_stream(student.device),
    )
    return dstudent


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
_BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton, "cuda": _backward_cuda}
