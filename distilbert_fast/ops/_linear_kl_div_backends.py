"""How each backend computes a chunk of ops/linear_kl_div.py."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distilbert_fast import backends
from distilbert_fast.ops import _vocabulary_losses as shared
from distilbert_fast.ops._operator import triton_kernels
from distilbert_fast.ops._vocabulary_losses import ForwardResult, Losses
from distilbert_fast.ops.kl_div import Call as KLDivCall
from distilbert_fast.ops.kl_div import forward as _kl_div_forward
from distilbert_fast.ops.linear import product_into

OP = "linear_kl_div"


class Call(NamedTuple):
    """All arguments, and which of the student's gradients are wanted."""

    h: torch.Tensor  # [N, C_s], the student's
    W: torch.Tensor  # [V, C_s]
    b: torch.Tensor | None  # [V]
    h_t: torch.Tensor  # [N, C_t]
    W_t: torch.Tensor  # [V, C_t]
    b_t: torch.Tensor | None  # [V]
    kd_mask: torch.Tensor | None  # bool [N]
    labels: torch.Tensor | None  # int64 [N]
    temperature: float
    ignore_index: int
    dh: bool
    dW: bool
    db: bool
    mean: bool = True


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(call: Call, defer: bool) -> ForwardResult:
    begun = shared.plan_chunks(call, defer)
    h_t, wanted = call.h_t, shared.any_gradient(call)
    (W, b), (W_t, b_t) = shared.torch_projection(*call[:3]), shared.torch_projection(*call[3:6])

    def losses(h: torch.Tensor, part: torch.Tensor, targets: torch.Tensor) -> Losses:
        s = F.linear(h, W, b)  # [R, V]
        kl, kl_gradient = begun.outputs[0].new_zeros(()), s[:0]
        if len(part) > 0:
            t = F.linear(h_t[part].to(W_t.dtype), W_t, b_t)
            keep = "gradient" if wanted else "none"
            row_losses, kept = _kl_div_forward(KLDivCall(s[: len(part)], t, None, call.temperature, False, keep))
            kl = row_losses.sum()
            kl_gradient = kept if wanted else kl_gradient
        return Losses(kl, kl_gradient, *shared.torch_cross_entropy(s, targets, kl.dtype, wanted))

    return shared.by_chunks(OP, losses, W, call, begun)


# cpu -----------------------------------------------------------------------------------------------------------


def _forward_cpu(call: Call, defer: bool) -> ForwardResult:
    """As in torch, but the logits of every chunk stand in the same memory, and gradients are written over them."""
    memory, v = shared.CpuChunks(call, defer), call.W.shape[0]
    h_t, W_t, b_t = call[3:6]
    teacher = backends.empty_cpu(h_t.new_empty((memory.plan.largest, v)))

    def losses(h: torch.Tensor, part: torch.Tensor, targets: torch.Tensor) -> Losses:
        r, r_kl = len(h), len(part)
        s = product_into(memory.logits[:r], h, call.W, call.b)
        if r_kl > 0:
            product_into(teacher[:r_kl], h_t[part], W_t, b_t)
        dtypes = backends.CPU_DTYPE[s.dtype], backends.CPU_DTYPE[teacher.dtype]
        shape = r, r_kl, v, call.temperature
        kernel = partial(backends.cpu().linear_kl_div, s.data_ptr(), teacher.data_ptr(), *dtypes, *shape)
        return memory.losses(kernel, r, r_kl, targets)

    return shared.by_chunks(OP, losses, call.W, call, memory.plan)


# gpu -----------------------------------------------------------------------------------------------------------


def _forward_triton(call: Call, defer: bool) -> ForwardResult:
    """The logits of every chunk stand in the same memory, and gradients are written over them: the KL's over the
    teacher's, which nobody reads again, the cross-entropy's over the student's.
    """
    kernels = triton_kernels("linear_kl_div")
    begun = shared.plan_chunks(call, defer)
    h_t, b_t = call.h_t, call.b_t
    W, W_t = call.W.to(shared.projection_dtype(call.h)), call.W_t.to(shared.projection_dtype(h_t))
    v, wanted, rows, width = W.shape[0], shared.any_gradient(call), begun.largest, kernels.width(W.shape[0])
    student, teacher = W.new_empty((rows, width)), W_t.new_empty((rows, width))
    bias_s, bias_t = kernels.padded_bias(call.b, W, v), kernels.padded_bias(b_t, W_t, v)
    kl_gradient = teacher if W_t.dtype == W.dtype else W.new_empty((rows if wanted else 0, width))
    kl, ce = (begun.outputs[0].new_empty(rows) for _ in range(2))

    def losses(h: torch.Tensor, part: torch.Tensor, targets: torch.Tensor) -> Losses:
        r, r_kl, r_ce = len(h), len(part), len(targets)
        s, t = student[:r], teacher[:r_kl]  # [R, width], [R_kl, width]
        for logits, hidden, weight in ((s, h, W), (t, h_t[part].to(W_t.dtype), W_t)):
            logits[:, v:] = 0.0  # where the gradient of a non-finite row may stand
            torch.mm(hidden, weight.t(), out=logits[:, :v])
        dkl, dce = (kl_gradient[:r_kl], s[r - r_ce :]) if wanted else (None, None)
        kernels.linear_kl_div_fwd(s, bias_s, t, bias_t, targets, v, call.temperature, kl, ce, dkl, dce)
        nothing = s[:0, :v]
        return Losses(
            kl[:r_kl].sum(),
            nothing if dkl is None else dkl[:, :v],
            ce[:r_ce].sum(),
            nothing if dce is None else dce[:, :v],
        )

    return shared.by_chunks(OP, losses, W, call, begun)


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
