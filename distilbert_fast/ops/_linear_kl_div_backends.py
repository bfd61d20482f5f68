"""How each backend computes ops/linear_kl_div.py: the rows that count, a chunk at a time.

A backend projects a chunk and makes of its logits the row losses and their gradients; what follows is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distilbert_fast import backends
from distilbert_fast.ops import _check
from distilbert_fast.ops._rows import DTYPE_CODE, accumulation_dtype
from distilbert_fast.ops.kl_div import _forward as _kl_div_forward
from distilbert_fast.ops.linear import product, product_into

OP = "linear_kl_div"


class Call(NamedTuple):
    """All arguments but h_s, and which of the student's gradients are wanted."""

    W_s: torch.Tensor  # [V, C_s]
    b_s: torch.Tensor | None  # [V]
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

    @property
    def any_gradient(self) -> bool:
        return self.dh or self.dW or self.db


def projection_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype in which a side is projected."""
    return torch.float32 if h.dtype == torch.float16 else h.dtype


def outputs_like(h_s: torch.Tensor, call: Call) -> tuple[torch.Tensor, ...]:
    """Memory for kl, ce, and of the gradients that are wanted those of the sums of row losses: of the KL and, with
    labels, of the cross-entropy: dh [1 or 2, N, C_s], dW [1 or 2, V, C_s], db [1 or 2, V].
    """
    losses, dtype = (1 if call.labels is None else 2), accumulation_dtype(h_s.dtype)
    (n, c), v = h_s.shape, call.W_s.shape[0]
    return (
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty((), dtype=dtype),
        h_s.new_empty((losses, n, c if call.dh else 0), dtype=projection_dtype(h_s)),
        h_s.new_empty((losses, v, c if call.dW else 0), dtype=dtype),
        h_s.new_empty((losses, v if call.db else 0), dtype=dtype),
    )


# Chunks --------------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Of one chunk: sums of row losses, and where they are wanted gradients of these with respect to logits."""

    kl: torch.Tensor
    kl_gradient: torch.Tensor  # [R_kl, V] in the dtype of the projection; or [0, V]
    ce: torch.Tensor
    ce_gradient: torch.Tensor  # [R_ce, V]; or [0, V]


class Counted(NamedTuple):
    """The rows that count [R]: of the KL alone, then of both losses, then of the cross-entropy alone."""

    rows: torch.Tensor
    first_label: int
    end_kl: int


class Chunk(NamedTuple):
    """All that backward needs of the rows that count, where they are one chunk."""

    counted: Counted
    h: torch.Tensor  # [R, C_s] in the dtype of the projection
    losses: Losses


# What a backend gives: the outputs. Or, where it may defer the products with gradients and one chunk holds all rows:
# that chunk, and outputs without gradients. The chunk's gradients of logits are smaller than a dW for each loss, and by
# the time of backward the upstream gradients are known, so the two losses' are one matrix before they are multiplied.
Result = tuple[tuple[torch.Tensor, ...], Chunk | None]

# From h_s [R, C_s], h_t [R_kl, C_t] of the first rows, and the labels [R_ce] of the last.
LossesOfChunk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Losses]


def chunk_rows(v: int, device: torch.device) -> int:
    """Rows projected at a time: enough for efficient products, few enough to be no burden (32 MB on a CPU)."""
    return max(1, (2**23 if device.type == "cpu" else 2**27) // v)


def _counted(h_s: torch.Tensor, call: Call) -> Counted:
    """In an order in which the rows of either loss are neighbours in every chunk."""
    n, device, kd_mask, labels = h_s.shape[0], h_s.device, call.kd_mask, call.labels
    if kd_mask is None and labels is None:
        return Counted(torch.arange(n, device=device), n, n)
    distilled = torch.ones(n, dtype=torch.bool, device=device) if kd_mask is None else kd_mask
    labelled = (torch.zeros_like(distilled) if labels is None else labels != call.ignore_index).to(torch.uint8)
    kind = torch.where(distilled, labelled, 3 - labelled)  # 3: counts for neither
    # The one place where the host waits for a GPU: it must know how many rows to project.
    alone, both, rest = (kind[:, None] == torch.arange(3, device=device)).sum(dim=0).tolist()
    return Counted(kind.argsort(stable=True)[: alone + both + rest], alone, alone + both)


def _begin(h_s: torch.Tensor, call: Call, defer: bool) -> tuple[Counted, tuple[torch.Tensor, ...], bool]:
    """The rows that count, memory for the outputs, and whether the gradients are in fact deferred."""
    counted = _counted(h_s, call)
    defer = defer and call.any_gradient and 0 < len(counted.rows) <= chunk_rows(call.W_s.shape[0], h_s.device)
    held = call._replace(dh=False, dW=False, db=False) if defer else call
    return counted, outputs_like(h_s, held), defer


def _by_chunks(
    losses_of_chunk: LossesOfChunk,
    h_s: torch.Tensor,
    W: torch.Tensor,
    call: Call,
    counted: Counted,
    outputs: tuple[torch.Tensor, ...],
    defer: bool,
) -> Result:
    """Fill the outputs. W: that of the student in the dtype of the projection."""
    kl, ce, dh_sum, dW_sum, db_sum = outputs
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
            add_product(G.t(), h, dW_sum[loss], begun[loss])
        begun[loss] = True
        if db_sum.numel() > 0:
            db_sum[loss].add_(G.sum(dim=0, dtype=db_sum.dtype))

    deferred = None
    rows, first_label, end_kl = counted
    for begin in range(0, len(rows), chunk_rows(v, h_s.device)):
        chunk = rows[begin : begin + chunk_rows(v, h_s.device)]
        part, targeted = chunk[: max(0, end_kl - begin)], chunk[max(0, first_label - begin) :]
        h = h_s[chunk].to(W.dtype)  # [R, C_s]
        targets = chunk[:0] if call.labels is None else call.labels[targeted]
        _check_labels(targets, v, call.ignore_index)
        losses = losses_of_chunk(h, call.h_t[part], targets)
        kl += losses.kl
        ce += losses.ce
        if defer:
            deferred = Chunk(counted, h, losses)
            break
        add_gradients(0, part, h[: len(part)], losses.kl_gradient)
        add_gradients(1, targeted, h[len(chunk) - len(targeted) :], losses.ce_gradient)
    for loss, some in enumerate(begun):
        if not some:
            dW_sum[loss].zero_()
    kl /= max(1, end_kl)
    ce /= max(1, len(rows) - first_label)
    return outputs, deferred


def add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, begun: bool) -> None:
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


def _forward_torch(h_s: torch.Tensor, call: Call, defer: bool) -> Result:
    counted, outputs, defer = _begin(h_s, call, defer)
    W, b = _projection(h_s, call.W_s, call.b_s)
    W_t, b_t = _projection(call.h_t, call.W_t, call.b_t)
    keep = "gradient" if call.any_gradient else "none"

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> Losses:
        s = F.linear(h, W, b)  # [R, V]
        zero, nothing = outputs[0].new_zeros(()), s[:0]
        kl, kl_gradient, ce, ce_gradient = zero, nothing, zero, nothing
        if len(h_t) > 0:
            t = F.linear(h_t.to(W_t.dtype), W_t, b_t)
            row_losses, kept = _kl_div_forward(s[: len(h_t)], t, None, call.temperature, False, keep)
            kl = row_losses.sum()
            kl_gradient = kept if keep == "gradient" else nothing
        if len(targets) > 0:
            columns = targets[:, None]  # [R_ce, 1]
            log_p = torch.log_softmax(s[len(s) - len(targets) :], dim=1, dtype=outputs[1].dtype)
            ce = -log_p.gather(1, columns).sum()
            if keep == "gradient":
                ce_gradient = log_p.exp_().scatter_add_(1, columns, log_p.new_full(columns.shape, -1.0)).to(s.dtype)
        return Losses(kl, kl_gradient, ce, ce_gradient)

    return _by_chunks(losses, h_s, W, call, counted, outputs, defer)


def _projection(h: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """That of a side, in the dtype in which it is projected."""
    dtype = projection_dtype(h)
    return W.to(dtype), None if b is None else b.to(dtype)


# cpu -----------------------------------------------------------------------------------------------------------


def _forward_cpu(h_s: torch.Tensor, call: Call, defer: bool) -> Result:
    """As in torch, but the logits of every chunk stand in the same memory, and gradients are written over them."""
    counted, outputs, defer = _begin(h_s, call, defer)
    outputs = *outputs[:3], backends.empty_cpu(outputs[3]), outputs[4]
    v, wanted = call.W_s.shape[0], call.any_gradient
    rows = min(chunk_rows(v, h_s.device), len(counted.rows))
    student, teacher = (backends.empty_cpu(x.new_empty((rows, v))) for x in (h_s, call.h_t))
    ce_gradient = h_s.new_empty((rows if wanted and call.labels is not None else 0, v))
    kl, ce = h_s.new_empty(rows, dtype=torch.float32), h_s.new_empty(rows, dtype=torch.float32)

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> Losses:
        r, r_kl, r_ce = len(h), len(h_t), len(targets)
        s = product_into(student[:r], h, call.W_s, call.b_s)
        if r_kl > 0:
            product_into(teacher[:r_kl], h_t, call.W_t, call.b_t)
        labels_of_all = F.pad(targets, (r - r_ce, 0), value=-1)  # [R], -1 = none
        backends.cpu().linear_kl_div(
            student.data_ptr(),
            teacher.data_ptr(),
            DTYPE_CODE[s.dtype],
            DTYPE_CODE[teacher.dtype],
            r,
            r_kl,
            v,
            call.temperature,
            labels_of_all.data_ptr() if r_ce > 0 else 0,
            wanted,
            kl.data_ptr(),
            ce.data_ptr(),
            ce_gradient.data_ptr(),
            torch.get_num_threads(),
        )
        return Losses(
            kl[:r_kl].sum(), s[: r_kl if wanted else 0], ce[r - r_ce : r].sum(), ce_gradient[: r_ce if wanted else 0]
        )

    return _by_chunks(losses, h_s, call.W_s, call, counted, outputs, defer)


# gpu -----------------------------------------------------------------------------------------------------------


def _forward_triton(h_s: torch.Tensor, call: Call, defer: bool) -> Result:
    """The logits of every chunk stand in the same memory, and gradients are written over them: the KL's over the
    teacher's, which nobody reads again, the cross-entropy's over the student's.
    """
    from distilbert_fast.kernels import linear_kl_div as kernels

    counted, outputs, defer = _begin(h_s, call, defer)
    W, W_t = call.W_s.to(projection_dtype(h_s)), call.W_t.to(projection_dtype(call.h_t))
    v, wanted = W.shape[0], call.any_gradient
    rows, width = min(chunk_rows(v, h_s.device), len(counted.rows)), kernels.width(v)
    student, teacher = W.new_empty((rows, width)), W_t.new_empty((rows, width))
    bias_s, bias_t = kernels.padded_bias(call.b_s, W, v), kernels.padded_bias(call.b_t, W_t, v)
    kl_gradient = teacher if W_t.dtype == W.dtype else W.new_empty((rows if wanted else 0, width))
    kl, ce = outputs[0].new_empty(rows), outputs[0].new_empty(rows)

    def losses(h: torch.Tensor, h_t: torch.Tensor, targets: torch.Tensor) -> Losses:
        r, r_kl, r_ce = len(h), len(h_t), len(targets)
        s, t = student[:r], teacher[:r_kl]  # [R, width], [R_kl, width]
        for logits, hidden, weight in ((s, h, W), (t, h_t.to(W_t.dtype), W_t)):
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

    return _by_chunks(losses, h_s, W, call, counted, outputs, defer)


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
