"""attention: multi-head attention over sequences of any length, with a mask per head and its gradient.

    p = softmax(scale · q kᵀ)     o = m_h · drop(p) v      per sequence and head h; no head mask: m_h = 1

With g = d loss / d o and dp = drop(g vᵀ), r = rowsum(p ∘ dp) = rowsum(g ∘ o_unmasked):

    dv = m_h · drop(p)ᵀ g                                                              dm_h = Σ r
    ds = p ∘ (dp − r)         dq = m_h · scale · ds k         dk = m_h · scale · dsᵀ q

Vaswani et al.: Attention Is All You Need, arXiv:1706.03762. The mask and its gradient, the importance of a
head: Michel, Levy, Neubig: Are Sixteen Heads Really Better than One?, arXiv:1905.10650.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast.ops import _attention_backends as served
from distilbert_fast.ops import _check
from distilbert_fast.ops._attention_backends import OP, Call, Forward, Gradients
from distilbert_fast.ops._autocast import autocast, without_autocast
from distilbert_fast.ops._operator import function, is_eager, operator
from distilbert_fast.ops._rows import accumulation_dtype, whole_rows

PADDED = "padded_attention"


@function(casts=True)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    max_length: int | None = None,
) -> torch.Tensor:
    """m_h · softmax(q kᵀ · scale) · v within each of the sequences that lie one after another in N tokens.

    Args:
        q, k, v: [N, H, D], one dtype: float32, bfloat16, float16 or float64. Any strides, so the three may be
            views of one projection [N, 3, H, D]; a copy is made if the last stride is not 1.
        cu_seqlens: int32 [B + 1] on the same device; sequence b holds tokens cu_seqlens[b] to
            cu_seqlens[b + 1] - 1. Starts at 0, never decreases (a sequence may be empty), ends at N. The
            values are checked wherever the host reads them: always for CPU tensors.
        head_mask: m, float [H] or [B, H]; differentiable. None = 1. A head with m_h = 0 gives exact zeros
            and, except by torch on a GPU, costs nothing unless the gradient of its mask is asked for.
        dropout_p: chance in [0, 1) that a probability is dropped, drawn from torch's generator; the others
            are divided by 1 - dropout_p. There is no training flag: pass 0 to infer.
        scale: finite and above 0; None = 1 / sqrt(D).
        max_length: a promise, at least 1: no sequence is longer. On a GPU short ones then take one tile, and nothing is
            searched. Checked where the values of cu_seqlens are; elsewhere a longer sequence gets NaN.

    Returns:
        [N, H, D], contiguous, in the dtype of q. The softmax is float32 for every dtype but float64. Under
        torch.autocast the arguments are cast as for a matrix product.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
    if cu_seqlens.shape[0] == 0:
        _check.refuse(OP, "cu_seqlens", "of shape [B + 1], B ≥ 0", list(cu_seqlens.shape))
    batch = cu_seqlens.shape[0] - 1
    if max_length is not None:
        _check.positive(OP, "max_length", max_length)
        if batch > 0 and is_eager((cu_seqlens,)) and cu_seqlens.device.type == "cpu":
            longest = int(cu_seqlens.diff().max())
            if longest > max_length:
                _check.refuse(OP, "cu_seqlens", f"sequences of at most max_length = {max_length} tokens", longest)
    others = cu_seqlens, None, head_mask, dropout_p, scale, max_length or 0
    return _attention(OP, ("N", "H", "D"), batch, q, k, v, *others)


@function(casts=True)
def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """``attention`` over B sequences padded to T tokens.

    Args:
        q, k, v: [B, T, H, D], otherwise as for ``attention``.
        attention_mask: bool [B, T] on the same device, True = a token, False = padding, wherever it stands.
            What padding holds, even NaN, reaches nothing. None = no padding.
        head_mask, dropout_p, scale: as for ``attention``.

    Returns:
        [B, T, H, D], contiguous, in the dtype of q; 0 at padding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(PADDED, "q", q, ("B", "T", "H", "D"))
    if attention_mask is not None:
        _check.tensor(PADDED, "attention_mask", attention_mask, tuple(q.shape[:2]), (torch.bool,), q.device)
    batch = q.shape[0]
    others = None, attention_mask, head_mask, dropout_p, scale, 0
    return _attention(PADDED, ("B", "T", "H", "D"), batch, q, k, v, *others)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition of ``attention`` without dropout in differentiable torch, computed in the dtype of q."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outputs = [q[:0]]
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        p = torch.softmax(torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) * scale, dim=-1)
        o = torch.einsum("hij,jhd->ihd", p, v[begin:end])
        if head_mask is not None:
            o = o * (head_mask if head_mask.dim() == 1 else head_mask[b])[:, None]
        outputs.append(o)
    return torch.cat(outputs)


def _attention(op: str, shape: tuple[str, ...], batch: int, q: Any, k: Any, v: Any, *others: Any) -> torch.Tensor:
    """Both forms: [N, H, D] with cu_seqlens, or [B, T, H, D] with or without an attention mask."""
    cu_seqlens, attention_mask, head_mask, dropout_p, scale, max_length = others
    _check.tensor(op, "q", q, shape)
    q, k, v = autocast(q.device, q, k, v)
    for name, x in (("k", k), ("v", v)):
        _check.tensor(op, name, x, q.shape, (q.dtype,), q.device)
    if cu_seqlens is not None and cu_seqlens.device != q.device:
        _check.refuse(op, "cu_seqlens", f"on {q.device}", cu_seqlens.device)
    heads, size = q.shape[-2:]
    if size == 0:
        _check.refuse(op, "q", "of head size D ≥ 1", list(q.shape))
    if head_mask is not None:
        per_sequence = isinstance(head_mask, torch.Tensor) and head_mask.dim() == 2
        _check.tensor(op, "head_mask", head_mask, (batch, heads) if per_sequence else (heads,), device=q.device)
        head_mask = head_mask.to(accumulation_dtype(q.dtype)).expand(batch, heads)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        _check.refuse(op, "dropout_p", "a number", type(dropout_p).__name__, TypeError)
    if not 0 <= dropout_p < 1:
        _check.refuse(op, "dropout_p", "at least 0 and below 1", dropout_p)
    if scale is None:
        scale = 1 / math.sqrt(size)
    _check.positive(op, "scale", scale)
    # The seed stays on the device: the kernels read it there, and a captured graph draws a new one each time.
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
    differentiable = [x for x in (q, k, v, head_mask) if x is not None and x.requires_grad]
    call = Call(q, k, v, cu_seqlens, attention_mask, head_mask, seed, dropout_p, scale, False, max_length)
    if not (torch.is_grad_enabled() and differentiable):
        return _forward(call)
    return _Attention.apply(*call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """Arguments: those of ``Call``."""
        dm = arguments[5] is not None and ctx.needs_input_grad[5]
        call = Call(*arguments)._replace(dm=dm)
        ctx.numbers = call[7:]
        o, unmasked, stats = _forward_keeping(call)
        nothing_kept = stats.shape[0] == 0
        ctx.save_for_backward(*call[:7], unmasked if dm or nothing_kept else o, stats)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, o, stats = ctx.saved_tensors
        call = Call(*(*tensors, *ctx.numbers))
        dq, dk, dv, dm = _backward(call, do, o, stats)
        return dq, dk, dv, None, None, dm if call.dm else None, *(None,) * 5


def _whole(call: Call) -> Call:
    """The same call, the last dimensions of whose q, k and v touch."""
    q, k, v = whole_rows(call.q), whole_rows(call.k), whole_rows(call.v)
    return call if q is call.q and k is call.k and v is call.v else call._replace(q=q, k=k, v=v)


def _forward_like(call: Call) -> torch.Tensor:
    return call.q.new_empty(call.q.shape)


@operator("attention_forward", _forward_like)
def _forward(call: Call) -> torch.Tensor:
    """The output, contiguous."""
    kernel = served.FORWARD[served.backend_of(call.q)]
    with without_autocast(call.q.device):
        return kernel(_whole(call))


def _forward_keeping_like(call: Call) -> Forward:
    keeps = call.q.device.type != "meta" and served.backend_of(call.q) in served.FORWARD_KEEPING
    return _forward_like(call), *(served.kept_like(call) if keeps else served.nothing_like(call.q))


@operator("attention_forward_keeping", _forward_keeping_like)
def _forward_keeping(call: Call) -> Forward:
    """The output, and for backward, where its backend reads them: the output before the head mask, if dm is wanted,
    and the softmax statistics float32 [2, H, N]. Else both are empty."""
    kernel = served.FORWARD_KEEPING.get(served.backend_of(call.q))
    if kernel is None:
        return _forward(call), *served.nothing_like(call.q)
    with without_autocast(call.q.device):
        return kernel(_whole(call))


def _backward_like(call: Call, do: torch.Tensor, o: torch.Tensor, stats: torch.Tensor) -> Gradients:
    return served.gradients_like(call)


@operator("attention_backward", _backward_like)
def _backward(call: Call, do: torch.Tensor, o: torch.Tensor, stats: torch.Tensor) -> Gradients:
    """dq, dk, dv, and the gradient of the head mask [B, H] if it is wanted, else nothing [0, 0].

    o, stats: what ``_forward_keeping`` kept; o is the output before the head mask if dm is wanted, else after it.
    """
    kernel = served.BACKWARD[served.backend_of(call.q)]
    with without_autocast(call.q.device):
        return kernel(_whole(call), whole_rows(do), o, stats)
