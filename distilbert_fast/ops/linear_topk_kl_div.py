"""linear_topk_kl_div: KL to soft targets of which the k most likely are known, and the mass of the rest.

    s = h Wᵀ + b    q = softmax(s/τ)    q_tail = Σ q_v over v not in ids        p, p_tail: given, of sum 1
    kl = mean over mask of τ² [Σ_ids p_i (log p_i − log q_i) + p_tail (log p_tail − log q_tail)]
    d / d s_v = τ (q_v − p_v) at ids    τ (q_tail − p_tail) q_v / q_tail elsewhere

This is the KL of both distributions with all other tokens taken as one: never more than the full KL (data processing
inequality, Cover and Thomas, Elements of Information Theory, 2.8), and equal to it for k = V. Leaving the tail out
instead, as is often done, has its minimum at a student that gives the tail no mass at all.

Rows are projected a chunk at a time; its gradients are summed before the next is made, as in linear_kl_div.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distilbert_fast.ops import _check
from distilbert_fast.ops._autocast import as_written, autocast
from distilbert_fast.ops._rows import accumulation_dtype
from distilbert_fast.ops._vocabulary_losses import chunk_rows, projection_dtype

OP = "linear_topk_kl_div"


def linear_topk_kl_div(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL to a teacher's k most likely tokens and the mass of all others, from hidden states.

    Args:
        h, W, b: the student's hidden states [N, C] and vocabulary projection [V, C], [V] or None, one dtype: float32,
            bfloat16, float16 or float64. The loss is differentiable in these.
        ids: int64 [N, k] in [0, V), no two alike in a row. On CUDA an id out of range is a device assertion.
        log_p: float [N, k], the log-probabilities of ids at this temperature.
        log_tail: float [N], the log of the other tokens' mass; -inf for none. exp(log_p) and exp(log_tail) of a row
            sum to 1.
        temperature: τ > 0 of both sides.
        mask: bool [N], True = the row counts. None counts all.

    Returns:
        A scalar, float32 (float64 if the student is). No counted row: 0, gradient 0.

    The logits have the dtype of the student (float32 for float16), all else is float32, float64 for float64. Memory
    beyond inputs and gradients is that of one chunk of rows. Under torch.autocast as in ``linear_kl_div``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "h", h, ("N", "C"))
    h, W, b = autocast(h.device, h, W, b)
    device, n = h.device, h.shape[0]
    _check.tensor(OP, "W", W, ("V", h.shape[1]), (h.dtype,), device)
    if b is not None:
        _check.tensor(OP, "b", b, (W.shape[0],), (h.dtype,), device)
    _check.tensor(OP, "ids", ids, (n, "k"), (torch.int64,), device)
    if not 0 < ids.shape[1] <= W.shape[0]:
        _check.refuse(OP, "ids", f"1 to V = {W.shape[0]} a row", ids.shape[1])
    _check.tensor(OP, "log_p", log_p, tuple(ids.shape), device=device)
    _check.tensor(OP, "log_tail", log_tail, (n,), device=device)
    _check.positive(OP, "temperature", temperature)
    if mask is not None:
        _check.tensor(OP, "mask", mask, (n,), (torch.bool,), device)
    if device.type == "cpu" and bool(((ids < 0) | (ids >= W.shape[0])).any()):
        wrong = ids[(ids < 0) | (ids >= W.shape[0])]
        _check.refuse(OP, "ids", f"in [0, V = {W.shape[0]})", int(wrong[0]))
    call = h, W, b, ids, log_p.detach(), log_tail.detach(), float(temperature), mask
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, W, b))):
        with as_written(device):
            return _forward(*call, False, False, False)[0]
    return _LinearTopKKLDiv.apply(*call)


def linear_topk_kl_div_reference(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of ``linear_topk_kl_div`` in differentiable torch, all logits stored."""
    log_q = torch.log_softmax(F.linear(h, W, b) / temperature, dim=1)  # [N, V]
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
    log_q_tail = log_q.masked_fill(~others, -torch.inf).logsumexp(dim=1)  # [N]
    kl = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(dim=1)
    if ids.shape[1] < W.shape[0]:
        kl = kl + log_tail.exp() * (log_tail - log_q_tail)
    counted = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    return temperature**2 * kl[counted].sum() / counted.sum().clamp(min=1)


class _LinearTopKKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        ids: torch.Tensor,
        log_p: torch.Tensor,
        log_tail: torch.Tensor,
        temperature: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        with as_written(h.device):
            kl, *sums = _forward(h, W, b, ids, log_p, log_tail, temperature, mask, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(*sums)
        ctx.dtype = h.dtype
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = (None if x is None else (dkl * x).to(ctx.dtype) for x in ctx.saved_tensors)
        return *gradients, None, None, None, None, None


def _forward(
    h: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None,
    *wanted: bool,
) -> tuple[Any, ...]:
    """The loss, and its gradients dh [N, C], dW [V, C], db [V], or None for one that is not wanted."""
    work, accumulate = projection_dtype(h), accumulation_dtype(h.dtype)
    W, b = W.to(work), None if b is None else b.to(work)
    kl = h.new_zeros((), dtype=accumulate)
    dh, dW, db = (
        torch.zeros(shape, dtype=dtype, device=h.device) if want else None
        for shape, dtype, want in zip(
            (h.shape, W.shape, W.shape[:1]), (work, accumulate, accumulate), wanted, strict=True
        )
    )
    rows = torch.arange(len(h), device=h.device) if mask is None else mask.nonzero().flatten()
    share = temperature**2 / max(1, len(rows))  # of a row in the mean
    for chunk in rows.split(chunk_rows(len(W), h.device)):
        x = h[chunk].to(work)  # [R, C]
        of_teacher = ids[chunk], log_p[chunk].to(accumulate), log_tail[chunk].to(accumulate)
        loss, G = _losses(F.linear(x, W, b).to(accumulate) / temperature, *of_teacher, any(wanted))
        kl += loss * share
        if G is None:
            continue
        G = G.mul_(share / temperature).to(work)  # [R, V]
        if dh is not None:
            dh[chunk] = G @ W
        if dW is not None:
            dW += G.t() @ x
        if db is not None:
            db += G.sum(dim=0, dtype=accumulate)
    return kl, dh, dW, db


def _losses(
    z: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, log_tail: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The KL summed over R rows, and its gradient for the student's logits over τ, z [R, V], written over these."""
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
