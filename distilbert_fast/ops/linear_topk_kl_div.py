"""linear_topk_kl_div: the vocabulary losses where k of the teacher's tokens are known, and the mass of the rest.

    s = h Wᵀ + b    q = softmax(s/τ)    q_tail = Σ q_v over v not in ids        p, p_tail: given, of sum 1
    kl = mean over kd_mask of τ² [Σ_ids p_i (log p_i − log q_i) + p_tail (log p_tail − log q_tail)]
    d / d s_v = τ (q_v − p_v) at ids    τ (q_tail − p_tail) q_v / q_tail elsewhere
    ce = mean over labels ≠ ignore_index of −log softmax(s)[label]

This is the KL of both distributions with all other tokens taken as one: never more than the full KL (data processing
inequality, Cover and Thomas, Elements of Information Theory, 2.8), and equal to it for k = V. Leaving the tail out
instead, as is often done, has its minimum at a student that gives the tail no mass at all.

Rows are projected once for both losses, a chunk at a time, as in linear_kl_div.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distilbert_fast import backends
from distilbert_fast.ops import _check
from distilbert_fast.ops import _vocabulary_losses as shared
from distilbert_fast.ops._operator import function
from distilbert_fast.ops._vocabulary_losses import ForwardResult, Losses
from distilbert_fast.ops.linear import product_into

OP = "linear_topk_kl_div"


@function(casts=True)
def linear_topk_kl_div(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to a teacher's k most likely tokens and the mass of all others, and cross-entropy to labels.

    Args:
        h, W, b: the student's hidden states [N, C] and vocabulary projection [V, C], [V] or None, one dtype: float32,
            bfloat16, float16 or float64. The losses are differentiable in these.
        ids: int64 [N, k] in [0, V), no two alike in a row. On CUDA an id out of range is a device assertion.
        log_p: float [N, k], the log-probabilities of ids at this temperature.
        log_tail: float [N], the log of the other tokens' mass; -inf for none. exp(log_p) and exp(log_tail) of a row
            sum to 1.
        temperature: τ > 0 of both sides of the KL; the cross-entropy has none.
        kd_mask: bool [N], True = the row counts for the KL. None counts all. The other rows of ids, log_p and log_tail
            are not read.
        labels, ignore_index, reduction: as in ``linear_kl_div``.

    Returns:
        (kl, ce), two scalars, float32 (float64 if the student is). No counted row: 0, gradient 0.

    dtypes, memory and torch.autocast as in ``linear_kl_div``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "h", h, ("N", "C"))
    h, W, b = shared.check_side(OP, h, W, b)
    device, n = h.device, h.shape[0]
    _check.tensor(OP, "ids", ids, (n, "k"), (torch.int64,), device)
    if not 0 < ids.shape[1] <= W.shape[0]:
        _check.refuse(OP, "ids", f"1 to V = {W.shape[0]} a row", ids.shape[1])
    _check.tensor(OP, "log_p", log_p, ids.shape, device=device)
    _check.tensor(OP, "log_tail", log_tail, (n,), device=device)
    _check.positive(OP, "temperature", temperature)
    shared.check_rows(OP, h, kd_mask, labels, ignore_index, reduction)
    of_teacher = ids, log_p.detach(), log_tail.detach()
    return _losses(h, W, b, *of_teacher, kd_mask, labels, float(temperature), ignore_index, reduction == "mean")


def linear_topk_kl_div_reference(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``linear_topk_kl_div`` in differentiable torch, all logits stored."""
    s = F.linear(h, W, b)  # [N, V]
    log_q = torch.log_softmax(s / temperature, dim=1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
    log_q_tail = log_q.masked_fill(~others, -torch.inf).logsumexp(dim=1)  # [N]
    kl = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(dim=1)
    if ids.shape[1] < W.shape[0]:
        kl = kl + torch.where(log_tail == -torch.inf, 0.0, log_tail.exp() * (log_tail - log_q_tail))
    counted = torch.ones_like(kl, dtype=torch.bool) if kd_mask is None else kd_mask
    kl = temperature**2 * kl[counted].sum()
    if reduction == "mean":
        kl = kl / counted.sum().clamp(min=1)
    return kl, shared.reference_cross_entropy(s, labels, ignore_index, reduction)


class Call(NamedTuple):
    """All arguments, and which of the student's gradients are wanted."""

    h: torch.Tensor  # [N, C]
    W: torch.Tensor  # [V, C]
    b: torch.Tensor | None  # [V]
    ids: torch.Tensor  # int64 [N, k]
    log_p: torch.Tensor  # [N, k]
    log_tail: torch.Tensor  # [N]
    kd_mask: torch.Tensor | None  # bool [N]
    labels: torch.Tensor | None  # int64 [N]
    temperature: float
    ignore_index: int
    dh: bool
    dW: bool
    db: bool
    mean: bool = True

    def targets(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, log_p and log_tail of places [R], contiguous and in range, the logarithms in a dtype."""
        ids = self.ids[rows]
        shared.check_range(OP, "ids", ids, self.W.shape[0])
        return ids, self.log_p[rows].to(dtype), self.log_tail[rows].to(dtype)


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(call: Call, defer: bool) -> ForwardResult:
    begun = shared.plan_chunks(call, defer)
    W, b = shared.torch_projection(*call[:3])
    wanted, tau = shared.any_gradient(call), call.temperature

    def losses(x: torch.Tensor, part: torch.Tensor, targets: torch.Tensor) -> Losses:
        s = F.linear(x, W, b)  # [R, V]
        dtype = begun.outputs[0].dtype
        z = s[: len(part)].to(dtype) / tau  # [R_kl, V]
        kl, G = _divergence(z, call.targets(part, dtype), wanted)
        kl_gradient = s[:0] if G is None else G.mul_(tau).to(s.dtype)
        return Losses(tau**2 * kl, kl_gradient, *shared.torch_cross_entropy(s, targets, dtype, wanted))

    return shared.by_chunks(OP, losses, W, call, begun)


def _divergence(
    z: torch.Tensor, teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The KL summed over R rows, and its gradient for the student's logits over τ, z [R, V], written over these."""
    ids, log_p, log_tail = teacher
    p, p_tail = log_p.exp(), log_tail.exp()
    mass = p.sum(dim=1) + p_tail  # 1, but for the rounding of what is given
    z -= z.amax(dim=1, keepdim=True)  # the sums of exponentials are then small, and so are their roundings
    top = z.gather(1, ids)  # [R, k]
    rest = z.scatter_(1, ids, -torch.inf)  # [R, V]
    lse_rest = rest.logsumexp(dim=1)
    lse = torch.logaddexp(top.logsumexp(dim=1), lse_rest)
    log_q, log_q_tail = top - lse[:, None], lse_rest - lse
    kl = _terms(p, log_p, log_q).sum() + _terms(p_tail, log_tail, log_q_tail).sum()
    if not gradient:
        return kl, None
    # q_v / q_tail; 0 where there is no tail
    G = rest.sub_(lse_rest.masked_fill(lse_rest == -torch.inf, 0.0)[:, None]).exp_()
    G.mul_((mass * log_q_tail.exp() - p_tail)[:, None])
    return kl, G.scatter_(1, ids, mass[:, None] * log_q.exp() - p)


def _terms(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p − log q), 0 at p = 0."""
    return torch.where(log_p == -torch.inf, 0.0, p * (log_p - log_q))


# cpu -----------------------------------------------------------------------------------------------------------


def _forward_cpu(call: Call, defer: bool) -> ForwardResult:
    """The logits of every chunk stand in the same memory, and gradients are written over them."""
    memory, v, k = shared.CpuChunks(call, defer), call.W.shape[0], call.ids.shape[1]

    def losses(x: torch.Tensor, part: torch.Tensor, targets: torch.Tensor) -> Losses:
        r, r_kl = len(x), len(part)
        of_teacher = call.targets(part, torch.float32)
        s = product_into(memory.logits[:r], x, call.W, call.b)
        pointers = (y.data_ptr() for y in of_teacher)
        shape = backends.CPU_DTYPE[s.dtype], r, r_kl, v, call.temperature
        kernel = partial(backends.cpu().linear_topk_kl_div, s.data_ptr(), *shape, *pointers, k)
        return memory.losses(kernel, r, r_kl, targets)

    return shared.by_chunks(OP, losses, call.W, call, memory.plan)


_losses = shared.losses_of(OP, Call, {"torch": _forward_torch, "cpu": _forward_cpu}, ("h",))
