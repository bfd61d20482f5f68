"""What linear_kl_div and linear_topk_kl_div share: the rows that count, a chunk at a time, and their gradients.

A backend of an op projects a chunk on the vocabulary, once for both losses, and makes of its logits the row losses and
their gradients; all else is the same for every backend and for either kind of teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._autocast import enabled, without_autocast
from distilbert_fast.ops._operator import is_eager, operator
from distilbert_fast.ops._rows import accumulation_dtype
from distilbert_fast.ops.linear import operands, product, product_into

# The record of a call of either op, which says of its teacher what it needs.
#   h [N, C], W [V, C], b [V] or None: the student's.        kd_mask: bool [N] or None      labels: int64 [N] or None
#   temperature, ignore_index, mean: whether losses are divided by the counts of their rows
#   dh, dW, db: which of the student's gradients are wanted
Call: TypeAlias = Any


def any_gradient(call: Call) -> bool:
    return call.dh or call.dW or call.db


def check_side(
    op: str, h: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, suffix: str = "", v: int | str = "V"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Check the projection [V, C], [V] of checked hidden states [N, C]; all three as a product takes them."""
    h, W, b = operands(h, W, b)
    dtypes = (h.dtype, torch.float32) if enabled(h.device.type) else (h.dtype,)
    _check.tensor(op, f"W{suffix}", W, (v, h.shape[1]), dtypes, h.device)
    if W.shape[0] == 0:
        _check.refuse(op, f"W{suffix}", "of at least one row", list(W.shape))
    if b is not None:
        _check.tensor(op, f"b{suffix}", b, (W.shape[0],), dtypes, h.device)
    return h, W, b


def check_rows(op: str, h: torch.Tensor, kd_mask: Any, labels: Any, ignore_index: object, reduction: object) -> None:
    """Check what says which rows count, and how they are reduced; values of labels come later: ``check_range``."""
    if kd_mask is not None:
        _check.tensor(op, "kd_mask", kd_mask, h.shape[:1], (torch.bool,), h.device)
    if labels is not None:
        _check.tensor(op, "labels", labels, h.shape[:1], (torch.int64,), h.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _check.refuse(op, "ignore_index", "an integer", type(ignore_index).__name__, TypeError)
    _check.choice(op, "reduction", reduction, ("mean", "sum"))


def check_range(op: str, argument: str, x: torch.Tensor, v: int, otherwise: str = "") -> None:
    """Check for numbers in [0, V): read where that is free; elsewhere asserted on the device, nobody waits for it."""
    outside, expected = (x < 0) | (x >= v), f"in [0, V = {v}){otherwise}"
    if x.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{op}: {argument} must be {expected}")
    elif len(wrong := x[outside]) > 0:
        _check.refuse(op, argument, expected, int(wrong[0]))


def projection_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype in which a side is projected."""
    return torch.float32 if h.dtype == torch.float16 else h.dtype


LossOutputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def outputs_like(call: Call) -> LossOutputs:
    """Memory for kl, ce, and of the gradients that are wanted those of the sums of row losses: of the KL and, with
    labels, of the cross-entropy: dh [1 or 2, N, C], dW [1 or 2, V, C], db [1 or 2, V].
    """
    h, losses, dtype = call.h, (1 if call.labels is None else 2), accumulation_dtype(call.h.dtype)
    (n, c), v = h.shape, call.W.shape[0]
    return (
        h.new_empty((), dtype=dtype),
        h.new_empty((), dtype=dtype),
        h.new_empty((losses, n, c if call.dh else 0), dtype=projection_dtype(h)),
        h.new_empty((losses, v, c if call.dW else 0), dtype=dtype),
        h.new_empty((losses, v if call.db else 0), dtype=dtype),
    )


# Chunks --------------------------------------------------------------------------------------------------------------


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
    h: torch.Tensor  # [R, C] in the dtype of the projection
    losses: Losses


# What a backend gives: the outputs. Or, where it may defer the products with gradients and one chunk holds all rows:
# that chunk, and outputs without gradients. The chunk's gradients of logits are smaller than a dW for each loss, and by
# the time of backward the upstream gradients are known, so the two losses' are one matrix before they are multiplied.
ForwardResult = tuple[LossOutputs, Chunk | None]


class ChunkPlan(NamedTuple):
    """What a backend begins with."""

    counted: Counted
    outputs: LossOutputs  # memory for ``outputs_like``
    chunk: int  # rows of every chunk but the last
    defer: bool  # whether the gradients are in fact deferred

    @property
    def largest(self) -> int:
        """Rows of the largest chunk."""
        return min(self.chunk, len(self.counted.rows))


# From h [R, C], the places [R_kl] of the first rows, those of the KL, and the labels [R_ce] of the last.
LossesOfChunk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Losses]


TILE = 128  # rows that a GPU's products compute together: what is left over of a chunk would take as long


def chunk_rows(v: int, device: torch.device) -> int:
    """Rows projected at a time: enough for efficient products, few enough to be no burden (32 MB on a CPU)."""
    rows = max(1, (2**23 if device.type == "cpu" else 2**27) // v)
    return rows if device.type == "cpu" or rows < TILE else rows // TILE * TILE


def _counted(call: Call) -> Counted:
    """In an order in which the rows of either loss are neighbours in every chunk."""
    n, device, kd_mask, labels = call.h.shape[0], call.h.device, call.kd_mask, call.labels
    if kd_mask is None and labels is None:
        return Counted(torch.arange(n, device=device), n, n)
    distilled = torch.ones(n, dtype=torch.bool, device=device) if kd_mask is None else kd_mask
    labelled = (torch.zeros_like(distilled) if labels is None else labels != call.ignore_index).to(torch.uint8)
    kind = torch.where(distilled, labelled, 3 - labelled)  # 3: counts for neither
    # The one place where the host waits for a GPU: it must know how many rows to project.
    alone, both, rest = (kind[:, None] == torch.arange(3, device=device)).sum(dim=0).tolist()
    return Counted(kind.argsort(stable=True)[: alone + both + rest], alone, alone + both)


def plan_chunks(call: Call, defer: bool) -> ChunkPlan:
    counted, chunk = _counted(call), chunk_rows(call.W.shape[0], call.h.device)
    defer = defer and any_gradient(call) and 0 < len(counted.rows) <= chunk
    held = call._replace(dh=False, dW=False, db=False) if defer else call
    return ChunkPlan(counted, outputs_like(held), chunk, defer)


def by_chunks(op: str, losses_of_chunk: LossesOfChunk, W: torch.Tensor, call: Call, plan: ChunkPlan) -> ForwardResult:
    """Fill the outputs. W: the student's, as ``product`` takes it."""
    kl, ce, dh_sum, dW_sum, db_sum = plan.outputs
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
            product_into(dW_sum[loss], G.t(), h.t(), add=begun[loss])
        begun[loss] = True
        if db_sum.numel() > 0:
            db_sum[loss].add_(G.sum(dim=0, dtype=db_sum.dtype))

    deferred = None
    rows, first_label, end_kl = plan.counted
    for begin in range(0, len(rows), plan.chunk):
        chunk = rows[begin : begin + plan.chunk]
        part, targeted = chunk[: max(0, end_kl - begin)], chunk[max(0, first_label - begin) :]
        x = call.h[chunk].to(projection_dtype(call.h))  # [R, C]
        targets = chunk[:0] if call.labels is None else call.labels[targeted]
        check_range(op, "labels", targets, v, f" or ignore_index = {call.ignore_index}")
        losses = losses_of_chunk(x, part, targets)
        kl += losses.kl
        ce += losses.ce
        if plan.defer:
            deferred = Chunk(plan.counted, x, losses)
            break
        add_gradients(0, part, x[: len(part)], losses.kl_gradient)
        add_gradients(1, targeted, x[len(chunk) - len(targeted) :], losses.ce_gradient)
    for loss, some in enumerate(begun):
        if not some:
            dW_sum[loss].zero_()
    if call.mean:
        kl /= max(1, end_kl)
        ce /= max(1, len(rows) - first_label)
    return plan.outputs, deferred


def torch_projection(
    h: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W and b of a side, in the dtype in which it is projected."""
    dtype = projection_dtype(h)
    return W.to(dtype), None if b is None else b.to(dtype)


def torch_cross_entropy(
    s: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last rows of logits s [R, V], whose labels are given [R_ce]: the sum, and its gradient [R_ce or 0, V]."""
    if len(targets) == 0:
        return s.new_zeros((), dtype=dtype), s[:0]
    columns = targets[:, None]  # [R_ce, 1]
    log_p = torch.log_softmax(s[len(s) - len(targets) :], dim=1, dtype=dtype)
    ce = -log_p.gather(1, columns).sum()
    if not gradient:
        return ce, s[:0]
    return ce, log_p.exp_().scatter_add_(1, columns, log_p.new_full(columns.shape, -1.0)).to(s.dtype)


def reference_cross_entropy(
    s: torch.Tensor, labels: torch.Tensor | None, ignore_index: int, reduction: str
) -> torch.Tensor:
    """Of logits s [N, V], in differentiable torch; 0 without labels."""
    if labels is None:
        return s.new_zeros(())
    ce = F.cross_entropy(s, labels, ignore_index=ignore_index, reduction="sum")
    return ce / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else ce


class CpuChunks:
    """Memory that stands for all chunks of a call to the native kernels, and how these are handed a chunk.

    They write the gradient of the KL over the logits, that of the cross-entropy beside them.
    """

    def __init__(self, call: Call, defer: bool) -> None:
        begun = plan_chunks(call, defer)
        kl, ce, dh, dW, db = begun.outputs
        self.plan = begun._replace(outputs=(kl, ce, dh, backends.empty_cpu(dW), db))  # dW's is kept from step to step
        h, rows, v = call.h, begun.largest, call.W.shape[0]
        self.wanted = any_gradient(call)
        self.logits = backends.empty_cpu(h.new_empty((rows, v)))
        self.ce_gradient = h.new_empty((rows if self.wanted and call.labels is not None else 0, v))
        self.kl, self.ce = (h.new_empty(rows, dtype=torch.float32) for _ in range(2))

    def losses(self, kernel: Callable[..., None], r: int, r_kl: int, targets: torch.Tensor) -> Losses:
        """``kernel(labels, gradient, kl, ce, ce_gradient, threads)`` computes those of r rows of logits."""
        r_ce = len(targets)
        labels_of_all = F.pad(targets, (r - r_ce, 0), value=-1)  # [R], -1 = none
        outputs = (x.data_ptr() for x in (self.kl, self.ce, self.ce_gradient))
        kernel(labels_of_all.data_ptr() if r_ce > 0 else 0, self.wanted, *outputs, torch.get_num_threads())
        return Losses(
            self.kl[:r_kl].sum(),
            self.logits[: r_kl if self.wanted else 0],
            self.ce[r - r_ce : r].sum(),
            self.ce_gradient[: r_ce if self.wanted else 0],
        )


# Autograd ------------------------------------------------------------------------------------------------------------


def losses_of(
    op: str, record: Any, kernels: Mapping[str, Callable[[Any, bool], ForwardResult]], hidden: Sequence[str]
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Register ``<op>_forward`` and return what computes (kl, ce) from checked arguments, with their gradients.

    Its arguments are the fields of the op's record but dh, dW and db; the first three are the student's. A backend is
    chosen by the dtypes of the fields named ``hidden``.
    """

    def run(call: Call, defer: bool) -> ForwardResult:
        kernel = kernels[backends.select(op, call.h.device, *(getattr(call, name).dtype for name in hidden))]
        with without_autocast(call.h.device):
            return kernel(call, defer)

    def forward(call: Call) -> LossOutputs:
        """kl, ce, and the sums of gradients that are wanted: see ``outputs_like``."""
        return run(call, False)[0]

    forward.__annotations__["call"] = record
    registered = operator(f"{op}_forward", outputs_like)(forward)

    class VocabularyLosses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            call = record(*arguments[:-1], *ctx.needs_input_grad[:3], arguments[-1])
            (kl, ce, *sums), chunk = run(call, True) if is_eager(call) else (registered(call), None)
            ctx.ignore_index, ctx.mean, ctx.shape = call.ignore_index, call.mean, call.h.shape
            ctx.dtypes = call.h.dtype, call.W.dtype, None if call.b is None else call.b.dtype
            ctx.single = chunk is not None
            if chunk is not None:
                (rows, ctx.first_label, ctx.end_kl), x, losses = chunk
                ctx.save_for_backward(call.W, rows, x, losses.kl_gradient, losses.ce_gradient)
            else:
                ctx.save_for_backward(call.kd_mask, call.labels, *sums)
            return kl, ce

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dkl: torch.Tensor, dce: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            others = [None] * (len(ctx.needs_input_grad) - 3)
            if not ctx.single:
                return *_of_sums(ctx, dkl, dce), *others
            with without_autocast(dkl.device):
                some = zip(_of_one_chunk(ctx, dkl, dce), ctx.dtypes, strict=True)
                return *(None if x is None else x.to(dtype) for x, dtype in some), *others

    def losses(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:3]):
            return VocabularyLosses.apply(*arguments)
        kl, ce, *_ = registered(record(*arguments[:-1], False, False, False, arguments[-1]))
        return kl, ce

    return losses


def _of_sums(ctx: Any, dkl: torch.Tensor, dce: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """dh, dW, db from those of the sums of row losses, each on its own."""
    kd_mask, labels, *sums = ctx.saved_tensors
    weights = [dkl / _rows.count(sums[0][0], kd_mask) if ctx.mean else dkl]
    if labels is not None:
        weights.append(dce / _rows.count(labels, labels != ctx.ignore_index) if ctx.mean else dce)
    for x, dtype, wanted in zip(sums, ctx.dtypes, ctx.needs_input_grad, strict=False):
        yield _weighted(weights, x).to(dtype) if wanted else None


def _of_one_chunk(ctx: Any, dkl: torch.Tensor, dce: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """dh [N, C], dW [V, C], db [V]: the two losses' gradients are one matrix before anything is multiplied."""
    W, rows, h, kl, ce = ctx.saved_tensors
    r, v = len(rows), len(W)
    if ctx.mean:
        dkl, dce = dkl / max(ctx.end_kl, 1), dce / max(r - ctx.first_label, 1)
    G = kl.new_empty((r, max(v, kl.stride(0))))[:, :v]  # [R, V], its rows as far apart as those of the logits
    torch.mul(kl, dkl, out=G[: ctx.end_kl])
    G[ctx.end_kl :] = 0
    G[ctx.first_label :].addcmul_(ce, dce.to(G.dtype))
    wanted, dtype = ctx.needs_input_grad, _rows.accumulation_dtype(h.dtype)
    yield h.new_zeros(ctx.shape).index_copy_(0, rows, product(G, W.t(), None)) if wanted[0] else None
    yield product(G.t(), h.t(), None, dtype) if wanted[1] else None
    yield G.sum(dim=0, dtype=dtype) if wanted[2] else None


def _weighted(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Σ_l weights[l] · x[l], in the precision of the weights."""
    dtype = weights[0].dtype
    total = x[0].to(dtype) * weights[0]
    for weight, part in zip(weights[1:], x[1:], strict=True):
        total.addcmul_(part.to(dtype), weight)
    return total
