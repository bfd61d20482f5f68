"""linear_kl_div: the two vocabulary losses of distillation straight from hidden states, logits never stored.

    s = h_s W_sᵀ + b_s    t = h_t W_tᵀ + b_t
    kl = mean over kd_mask of τ² KL(softmax(t/τ) ‖ softmax(s/τ))        d / d s = τ (p_s − p_t)
    ce = mean over labels ≠ ignore_index of −log softmax(s)[label]      d / d s = softmax(s) − onehot(label)

Rows that neither loss counts are never projected. The others are projected a chunk at a time, and each chunk is
turned into its share of the losses and of the gradients dh = G W, dW = Gᵀ h, db = Σ G before the next is made.

The weights α of the two losses reach an op only in its backward. So the forward keeps the gradients of the two
apart, and backward adds them: dW [2, V, C], the size of two weight matrices whatever N is, and each projection is
computed once. (Projecting again in backward would need no such memory and two matrix products in six more.)
L_ce and L_mlm of Sanh et al.: DistilBERT, a distilled version of BERT, arXiv:1910.01108.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._autocast import as_written, autocast
from distilbert_fast.ops._operator import is_eager, operator
from distilbert_fast.ops.kl_div import _forward as _kl_div_forward
from distilbert_fast.ops.kl_div import kl_div_reference
from distilbert_fast.ops.linear import product, product_into

OP = "linear_kl_div"


def linear_kl_div(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to the teacher's soft targets and cross-entropy to labels, each on rows of its own.

    Args:
        h_s, W_s, b_s: the student's hidden states [N, C_s] and vocabulary projection [V, C_s], [V] or None, one
            dtype: float32, bfloat16, float16 or float64. The losses are differentiable in these three.
        h_t, W_t, b_t: the teacher's, [N, C_t], [V, C_t], [V] or None, one dtype, not necessarily the student's.
            Never get a gradient.
        temperature: τ > 0 of the KL; the cross-entropy has none.
        kd_mask: bool [N], True = the row counts for the KL. None counts all.
        labels: int64 [N] in [0, V), or ignore_index where the row does not count for the cross-entropy. None =
            no row counts. On CUDA a label out of range is a device assertion.
        ignore_index: the label of rows without one.

    Returns:
        (kl, ce), two scalars, float32 (float64 if the student is). No counted row: 0, gradient 0.

    The logits have the dtype of their side (float16 is projected in float32: gradients of unit scale would
    underflow before a loss scale could lift them), the losses and dW are summed in float32, in float64 for
    float64. Memory beyond inputs and gradients is that of one chunk of rows. Under torch.autocast the arguments
    are cast as for a matrix product.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "h_s", h_s, ("N", "C_s"))
    h_s, W_s, b_s, h_t, W_t, b_t = autocast(h_s.device, h_s, W_s, b_s, h_t, W_t, b_t)
    device, n = h_s.device, h_s.shape[0]
    _check.tensor(OP, "W_s", W_s, ("V", h_s.shape[1]), (h_s.dtype,), device)
    v = W_s.shape[0]
    if v == 0:
        _check.refuse(OP, "W_s", "of at least one row", list(W_s.shape))
    if b_s is not None:
        _check.tensor(OP, "b_s", b_s, (v,), (h_s.dtype,), device)
    _check.tensor(OP, "h_t", h_t, (n, "C_t"), device=device)
    _check.tensor(OP, "W_t", W_t, (v, h_t.shape[1]), (h_t.dtype,), device)
    if b_t is not None:
        _check.tensor(OP, "b_t", b_t, (v,), (h_t.dtype,), device)
    _check.positive(OP, "temperature", temperature)
    if kd_mask is not None:
        _check.tensor(OP, "kd_mask", kd_mask, (n,), (torch.bool,), device)
    if labels is not None:
        _check.tensor(OP, "labels", labels, (n,), (torch.int64,), device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _check.refuse(OP, "ignore_index", "an integer", type(ignore_index).__name__, TypeError)
    h_t, W_t, b_t = h_t.detach(), W_t.detach(), None if b_t is None else b_t.detach()
    student = [x for x in (h_s, W_s, b_s) if x is not None and x.requires_grad]
    call = h_s, W_s, b_s, h_t, W_t, b_t, kd_mask, labels, float(temperature), ignore_index
    if not (torch.is_grad_enabled() and student):
        return _forward(*call, False, False, False)[:2]
    return _LinearKLDiv.apply(*call)


def linear_kl_div_reference(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``linear_kl_div`` in differentiable torch, both logits stored."""
    s, t = F.linear(h_s, W_s, b_s), F.linear(h_t, W_t, b_t).detach()  # [N, V]
    kl = kl_div_reference(s, t, temperature, kd_mask)
    if labels is None:
        return kl, s.new_zeros(())
    ce = F.cross_entropy(s, labels, ignore_index=ignore_index, reduction="sum")
    return kl, ce / (labels != ignore_index).sum().clamp(min=1)


class _LinearKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_s: torch.Tensor,
        W_s: torch.Tensor,
        b_s: torch.Tensor | None,
        h_t: torch.Tensor,
        W_t: torch.Tensor,
        b_t: torch.Tensor | None,
        kd_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        temperature: float,
        ignore_index: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = W_s, b_s, h_t, W_t, b_t, kd_mask, labels, temperature, ignore_index, *ctx.needs_input_grad[:3]
        ctx.ignore_index, ctx.dtype, ctx.shape = ignore_index, h_s.dtype, h_s.shape
        chunks: list[_Chunk] = []
        kl, ce, *sums = _kernel(h_s, *call, chunks) if is_eager(h_s) else _forward(h_s, *call)
        ctx.single = len(chunks) == 1
        if ctx.single:
            rows, ctx.first_label, ctx.end_kl, h, losses = chunks[0]
            ctx.save_for_backward(W_s, rows, h, losses.kl_gradient, losses.ce_gradient)
        else:
            ctx.save_for_backward(kd_mask, labels, *sums)
        return kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: torch.Tensor, dce: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.single:
            with as_written(dkl.device):
                gradients = _of_one_chunk(ctx, dkl, dce)
            return *(None if x is None else x.to(ctx.dtype) for x in gradients), *[None] * 7
        kd_mask, labels, *sums = ctx.saved_tensors
        weights = [dkl / _rows.count(sums[0][0], kd_mask)]
        if labels is not None:
            weights.append(dce / _rows.count(labels, labels != ctx.ignore_index))
        gradients = (
            _weighted(weights, x).to(ctx.dtype) if wanted else None
            for x, wanted in zip(sums, ctx.needs_input_grad, strict=False)
        )
        return *gradients, None, None, None, None, None, None, None


def _of_one_chunk(ctx: Any, dkl: torch.Tensor, dce: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """dh [N, C_s], dW [V, C_s], db [V]: the two losses' gradients are one matrix before anything is multiplied."""
    W, rows, h, kl, ce = ctx.saved_tensors
    r, v = len(rows), len(W)
    G = kl.new_empty((r, max(v, kl.stride(0))))[:, :v]  # [R, V], its rows as far apart as those of the logits
    torch.mul(kl, dkl / max(ctx.end_kl, 1), out=G[: ctx.end_kl])
    G[ctx.end_kl :] = 0
    G[ctx.first_label :].addcmul_(ce, (dce / max(r - ctx.first_label, 1)).to(G.dtype))
    wanted, dtype = ctx.needs_input_grad, _rows.accumulation_dtype(h.dtype)
    yield h.new_zeros(ctx.shape).index_copy_(0, rows, product(G, W.to(h.dtype).t(), None)) if wanted[0] else None
    dW = h.new_empty((v, h.shape[1]), dtype=dtype) if wanted[1] else None
    if dW is not None:
        _add_product(G.t(), h, dW, begun=False)
    yield dW
    yield G.sum(dim=0, dtype=dtype) if wanted[2] else None


def _weighted(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Σ_l weights[l] · x[l], in the precision of the weights."""
    dtype = weights[0].dtype
    total = x[0].to(dtype) * weights[0]
    for weight, part in zip(weights[1:], x[1:], strict=True):
        total.addcmul_(part.to(dtype), weight)
    return total


def _work(h: torch.Tensor) -> torch.dtype:
    """The dtype in which a side is projected."""
    return torch.float32 if h.dtype == torch.float16 else h.dtype


def _forward_fake(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    kd_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    dh: bool,
    dW: bool,
    db: bool,
) -> tuple[torch.Tensor, ...]:
    losses, dtype = (1 if labels is None else 2), _rows.accumulation_dtype(h_s.dtype)
    (n, c), v = h_s.shape, W_s.shape[0]
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty((losses, n, c if dh else 0), dtype=_work(h_s)),
        h_s.new_empty((losses, v, c if dW else 0), dtype=dtype),
        h_s.new_empty((losses, v if db else 0), dtype=dtype),
    )


@operator(
    "linear_kl_div_forward(Tensor h_s, Tensor W_s, Tensor? b_s, Tensor h_t, Tensor W_t, Tensor? b_t,"
    " Tensor? kd_mask, Tensor? labels, float temperature, int ignore_index, bool dh, bool dW, bool db)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(h_s: torch.Tensor, *call: Any) -> tuple[torch.Tensor, ...]:
    """kl, ce and, of the gradients asked for, those of the sums of row losses: of the KL and, with labels, of
    the cross-entropy: dh [1 or 2, N, C_s], dW [1 or 2, V, C_s], db [1 or 2, V].
    """
    return _kernel(h_s, *call, None)


def _kernel(h_s: torch.Tensor, *call: Any) -> tuple[torch.Tensor, ...]:
    """The same; or, where a list is given for chunks and one holds all rows, that chunk and no sums of gradients.

    A chunk's gradient of the logits is smaller than a dW for each loss, and by then the upstream gradients are known.
    """
    kernel = _FORWARD[backends.select(OP, h_s.device, h_s.dtype, call[2].dtype)]
    with as_written(h_s.device):
        return kernel(h_s, *call)


# Chunks --------------------------------------------------------------------------------------------------------


class _Losses(NamedTuple):
    """Of one chunk: sums of row losses, and where they are wanted gradients of these with respect to logits."""

    kl: torch.Tensor
    kl_gradient: torch.Tensor  # [R_kl, V] in the dtype of the projection; or [0, V]
    ce: torch.Tensor
    ce_gradient: torch.Tensor  # [R_ce, V]; or [0, V]


class _Counted(NamedTuple):
    """The rows that count [R]: of the KL alone, then of both losses, then of the cross-entropy alone."""

    rows: torch.Tensor
    first_label: int
    end_kl: int


class _Chunk(NamedTuple):
    """What backward needs of the rows that count, if they are one chunk."""

    rows: torch.Tensor  # [R]
    first_label: int
    end_kl: int
    h: torch.Tensor  # [R, C_s] in the dtype of the projection
    losses: _Losses


# From h_s [R, C_s], h_t [R_kl, C_t] of the first rows, and the labels [R_ce] of the last.
_LossesOfChunk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], _Losses]


def _chunk(v: int, device: torch.device) -> int:
    """Rows projected at a time: enough for efficient products, few enough to be no burden (32 MB on a CPU)."""
    return max(1, (2**23 if device.type == "cpu" else 2**27) // v)


def _counted(
    n: int, kd_mask: torch.Tensor | None, labels: torch.Tensor | None, ignore_index: int, device: torch.device
) -> _Counted:
    """In an order in which the rows of either loss are neighbours in every chunk."""
    if kd_mask is None and labels is None:
        return _Counted(torch.arange(n, device=device), n, n)
    distilled = torch.ones(n, dtype=torch.bool, device=device) if kd_mask is None else kd_mask
    labelled = (torch.zeros_like(distilled) if labels is None else labels != ignore_index).to(torch.uint8)
    kind = torch.where(distilled, labelled, 3 - labelled)  # 3: counts for neither
    # The one place where the host waits for a GPU: it must know how many rows to project.
    alone, both, rest = (kind[:, None] == torch.arange(3, device=device)).sum(dim=0).tolist()
    return _Counted(kind.argsort(stable=True)[: alone + both + rest], alone, alone + both)


def _begin(
    h_s: torch.Tensor, W_s: torch.Tensor, b_s: Any, h_t: torch.Tensor, W_t: torch.Tensor, b_t: Any, *call: Any
) -> tuple[_Counted, tuple[torch.Tensor, ...], list[_Chunk] | None]:
    """The rows that count, memory for what ``_kernel`` returns, and the list of chunks if one will hold all rows."""
    kd_mask, labels, temperature, ignore_index, dh, dW, db, chunks = call
    counted = _counted(h_s.shape[0], kd_mask, labels, ignore_index, h_s.device)
    fits = 0 < len(counted.rows) <= _chunk(W_s.shape[0], h_s.device)
    single = chunks if fits and (dh or dW or db) else None
    wanted = (False, False, False) if single is not None else (dh, dW, db)
    sides = h_s, W_s, b_s, h_t, W_t, b_t
    return counted, _forward_fake(*sides, kd_mask, labels, temperature, ignore_index, *wanted), single


def _by_chunks(
    losses_of_chunk: _LossesOfChunk,
    h_s: torch.Tensor,
    W: torch.Tensor,
    h_t: torch.Tensor,
    counted: _Counted,
    labels: torch.Tensor | None,
    ignore_index: int,
    sums: tuple[torch.Tensor, ...],
    chunks: list[_Chunk] | None,
) -> tuple[torch.Tensor, ...]:
    """Fill what ``_kernel`` returns."""
    kl, ce, dh_sum, dW_sum, db_sum = sums
    for x in (kl, ce, dh_sum, db_sum):
        x.zero_()
    v = W.shape[0]
    begun = [False] * len(dW_sum)  # the largest of them is not even set to zero if it need not be

    def add_gradients(loss: int, rows: torch.Tensor, h: torch.Tensor, G: torch.Tensor) -> None:
        if len(G) == 0:
            return
        if dh_sum.numel() > 0:
            dh_sum[loss].index_copy_(0, rows, product(G, W.t(), None))
        if dW_sum.numel() > 0:
            _add_product(G.t(), h, dW_sum[loss], begun[loss])
        begun[loss] = True
        if db_sum.numel() > 0:
            db_sum[loss].add_(G.sum(dim=0, dtype=db_sum.dtype))

    rows, first_label, end_kl = counted
    for begin in range(0, len(rows), _chunk(v, h_s.device)):
        chunk = rows[begin : begin + _chunk(v, h_s.device)]
        part, targeted = chunk[: max(0, end_kl - begin)], chunk[max(0, first_label - begin) :]
        h = h_s[chunk].to(W.dtype)  # [R, C_s]
        targets = chunk[:0] if labels is None else labels[targeted]
        _check_labels(targets, v, ignore_index)
        losses = losses_of_chunk(h, h_t[part], targets)
        kl += losses.kl
        ce += losses.ce
        if chunks is not None:
            chunks.append(_Chunk(chunk, first_label, end_kl, h, losses))
            break
        add_gradients(0, part, h[: len(part)], losses.kl_gradient)
        add_gradients(1, targeted, h[len(chunk) - len(targeted) :], losses.ce_gradient)
    for loss, some in enumerate(begun):
        if not some:
            dW_sum[loss].zero_()
    kl /= max(1, end_kl)
    ce /= max(1, len(rows) - first_label)
    return sums


def _add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, begun: bool) -> None:
    """total += a b, or total = a b if nothing has begun it: [V, C_s], float32 if a and b are bfloat16."""
    if b.dtype == total.dtype:
        product_into(total, a, b.t(), add=begun)
        return
    # On CUDA the product of a chunk leaves the tensor cores as they summed it, in float32.
    product = torch.mm(a, b, out_dtype=total.dtype) if b.device.type == "cuda" else a @ b
    if begun:
        total.add_(product)
    else:
        total.copy_(product)


def _check_labels(labels: torch.Tensor, v: int, ignore_index: int) -> None:
    """Read where that is free; elsewhere asserted on the device, for which nobody waits."""
    outside = (labels < 0) | (labels >= v)
    if labels.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{OP}: labels must be in [0, V = {v}) or ignore_index = {ignore_index}")
    else:
        wrong = labels[outside]
        if len(wrong) > 0:
            _check.refuse(OP, "labels", f"in [0, V = {v}) or ignore_index = {ignore_index}", int(wrong[0]))


# torch ---------------------------------------------------------------------------------------------------------


def _forward_torch(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    kd_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    dh: bool,
    dW: bool,
    db: bool,
    chunks: list[_Chunk] | None,
) -> tuple[torch.Tensor, ...]:
    call = h_s, W_s, b_s, h_t, W_t, b_t, kd_mask, labels, temperature, ignore_index
    counted, sums, chunks = _begin(*call, dh, dW, db, chunks)
    W, b = W_s.to(_work(h_s)), None if b_s is None else b_s.to(_work(h_s))
    W_t, b_t = W_t.to(_work(h_t)), None if b_t is None else b_t.to(_work(h_t))
    keep = "gradient" if dh or dW or db else "none"

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> _Losses:
        s = F.linear(h, W, b)  # [R, V]
        zero, nothing = sums[0].new_zeros(()), s[:0]
        kl, kl_gradient, ce, ce_gradient = zero, nothing, zero, nothing
        if len(h_t) > 0:
            t = F.linear(h_t.to(W_t.dtype), W_t, b_t)
            row_losses, kept = _kl_div_forward(s[: len(h_t)], t, None, temperature, False, keep)
            kl = row_losses.sum()
            kl_gradient = kept if keep == "gradient" else nothing
        if len(targets) > 0:
            columns = targets[:, None]  # [R_ce, 1]
            log_p = torch.log_softmax(s[len(s) - len(targets) :], dim=1, dtype=sums[1].dtype)
            ce = -log_p.gather(1, columns).sum()
            if keep == "gradient":
                ce_gradient = log_p.exp_().scatter_add_(1, columns, log_p.new_full(columns.shape, -1.0)).to(s.dtype)
        return _Losses(kl, kl_gradient, ce, ce_gradient)

    return _by_chunks(losses, h_s, W, h_t, counted, labels, ignore_index, sums, chunks)


# cpu -----------------------------------------------------------------------------------------------------------


def _forward_cpu(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    kd_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    dh: bool,
    dW: bool,
    db: bool,
    chunks: list[_Chunk] | None,
) -> tuple[torch.Tensor, ...]:
    """As in torch, but the logits of every chunk stand in the same memory, and gradients are written over them."""
    call = h_s, W_s, b_s, h_t, W_t, b_t, kd_mask, labels, temperature, ignore_index
    counted, sums, chunks = _begin(*call, dh, dW, db, chunks)
    sums = *sums[:3], backends.empty_cpu(sums[3]), sums[4]
    rows, v = min(_chunk(W_s.shape[0], h_s.device), len(counted.rows)), W_s.shape[0]
    wanted = dh or dW or db
    student, teacher = (backends.empty_cpu(x.new_empty((rows, v))) for x in (h_s, h_t))
    ce_gradient = h_s.new_empty((rows if wanted and labels is not None else 0, v))
    kl, ce = h_s.new_empty(rows, dtype=torch.float32), h_s.new_empty(rows, dtype=torch.float32)

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> _Losses:
        r, r_kl, r_ce = len(h), len(h_t), len(targets)
        s = product_into(student[:r], h, W_s, b_s)
        if r_kl > 0:
            product_into(teacher[:r_kl], h_t, W_t, b_t)
        labels_of_all = F.pad(targets, (r - r_ce, 0), value=-1)  # [R], -1 = none
        backends.cpu().linear_kl_div(
            student.data_ptr(),
            teacher.data_ptr(),
            _rows.DTYPE_CODE[s.dtype],
            _rows.DTYPE_CODE[teacher.dtype],
            r,
            r_kl,
            v,
            temperature,
            labels_of_all.data_ptr() if r_ce > 0 else 0,
            wanted,
            kl.data_ptr(),
            ce.data_ptr(),
            ce_gradient.data_ptr(),
            torch.get_num_threads(),
        )
        return _Losses(
            kl[:r_kl].sum(), s[: r_kl if wanted else 0], ce[r - r_ce : r].sum(), ce_gradient[: r_ce if wanted else 0]
        )

    return _by_chunks(losses, h_s, W_s, h_t, counted, labels, ignore_index, sums, chunks)


# gpu -----------------------------------------------------------------------------------------------------------


def _forward_triton(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    kd_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    dh: bool,
    dW: bool,
    db: bool,
    chunks: list[_Chunk] | None,
) -> tuple[torch.Tensor, ...]:
    """The logits of every chunk stand in the same memory, and gradients are written over them: the KL's over the
    teacher's, which nobody reads again, the cross-entropy's over the student's.
    """
    from distilbert_fast.kernels import linear_kl_div as kernels

    call = h_s, W_s, b_s, h_t, W_t, b_t, kd_mask, labels, temperature, ignore_index
    counted, sums, chunks = _begin(*call, dh, dW, db, chunks)
    W, W_t, v = W_s.to(_work(h_s)), W_t.to(_work(h_t)), W_s.shape[0]
    rows, width = min(_chunk(v, h_s.device), len(counted.rows)), kernels.width(v)
    student, teacher = W.new_empty((rows, width)), W_t.new_empty((rows, width))
    bias_s, bias_t = kernels.padded_bias(b_s, W, v), kernels.padded_bias(b_t, W_t, v)
    wanted = dh or dW or db
    kl_gradient = teacher if W_t.dtype == W.dtype else W.new_empty((rows if wanted else 0, width))
    kl, ce = sums[0].new_empty(rows), sums[0].new_empty(rows)

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> _Losses:
        r, r_kl, r_ce = len(h), len(h_t), len(targets)
        s, t = student[:r], teacher[:r_kl]  # [R, width], [R_kl, width]
        for logits, hidden, weight in ((s, h, W), (t, h_t.to(W_t.dtype), W_t)):
            logits[:, v:] = 0.0  # where the gradient of a non-finite row may stand
            torch.mm(hidden, weight.t(), out=logits[:, :v])
        dkl, dce = (kl_gradient[:r_kl], s[r - r_ce :]) if wanted else (None, None)
        kernels.linear_kl_div_fwd(s, bias_s, t, bias_t, targets, v, temperature, kl, ce, dkl, dce)
        nothing = s[:0, :v]
        return _Losses(
            kl[:r_kl].sum(),
            nothing if dkl is None else dkl[:, :v],
            ce[:r_ce].sum(),
            nothing if dce is None else dce[:, :v],
        )

    return _by_chunks(losses, h_s, W, h_t, counted, labels, ignore_index, sums, chunks)


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
