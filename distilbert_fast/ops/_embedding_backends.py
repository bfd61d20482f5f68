"""How each backend computes ops/embedding.py: a gather, then what layer_norm does."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._layer_norm_backends import normalize, normalize_backward, normalize_triton
from distilbert_fast.ops._operator import operator, triton_kernels
from distilbert_fast.ops._rows import Outputs

OP, QUANTIZE = "embedding", "embedding_quantize"
_IDS = ("input_ids", "position_ids", "token_type_ids")
_TABLES = ("word", "position", "token_type")


class Call(NamedTuple):
    """All arguments of forward."""

    weight: torch.Tensor  # [C]
    bias: torch.Tensor  # [C]
    ids: list[torch.Tensor]  # [N], two or three
    tables: list[torch.Tensor]  # [rows, C], as many
    out_scale: torch.Tensor | None  # of the codes: float32 [] or [N], or each row's own
    eps: float
    keep: str  # beside y: "nothing", "statistics" for backward, or "codes"


class Gradient(NamedTuple):
    """All arguments of backward."""

    dy: torch.Tensor  # [N, C]
    weight: torch.Tensor  # [C]
    ids: list[torch.Tensor]  # [N], two or three
    tables: list[torch.Tensor]  # [rows, C], as many
    mean: torch.Tensor  # [N]
    rstd: torch.Tensor  # [N]
    wanted: list[bool]  # the gradient of which tables


Gradients = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def _select(call: Call | Gradient) -> str:
    return backends.select(OP, call.weight.device, call.weight.dtype, *(table.dtype for table in call.tables))


def forward_like(call: Call) -> Outputs:
    """Memory for y and for what is kept."""
    y = call.tables[0].new_empty((call.ids[0].shape[0], call.weight.shape[0]))
    return _rows.normalized_like(y, call)


@operator("embedding_forward", forward_like)
def forward(call: Call) -> Outputs:
    """y [N, C], and what ``keep`` names, as layer_norm's forward gives it."""
    return FORWARD[_select(call)](call)


def backward_like(call: Gradient) -> Gradients:
    """Memory for dweight, dbias and the gradients of the tables that are wanted."""
    pairs = zip(call.tables, call.wanted, strict=True)
    dtables = [table.new_empty((table.shape[0] if want else 0, table.shape[1])) for table, want in pairs]
    return *_rows.parameter_gradients_like(call), dtables


@operator("embedding_backward", backward_like)
def backward(call: Gradient) -> Gradients:
    """dweight [C] and dbias [C] in the dtype of the statistics; of each table its gradient, or [0, C]."""
    return BACKWARD[_select(call)](call)


# torch ------------------------------------------------------------------------------------------------------


def _check_ranges(call: Call) -> None:
    op = QUANTIZE if call.keep == "codes" else OP
    for ids, table, argument, of in zip(call.ids, call.tables, _IDS, _TABLES, strict=False):
        _check.below(op, argument, ids, table.shape[0], f"the rows of {of}")


def _gather(ids: list[torch.Tensor], tables: list[torch.Tensor]) -> torch.Tensor:
    h, *others = (torch.nn.functional.embedding(i, table) for i, table in zip(ids, tables, strict=True))
    h = h.to(_rows.accumulation_dtype(h.dtype))
    for other in others:
        h = h + other  # [N, C]
    return h


def _forward_torch(call: Call) -> Outputs:
    _check_ranges(call)
    return normalize(_gather(call.ids, call.tables), call.tables[0].dtype, call)


def _backward_torch(call: Gradient) -> Gradients:
    dh, dweight, dbias = normalize_backward(_gather(call.ids, call.tables), call)
    return dweight, dbias, _table_gradients(dh, call.ids, call)


def _table_gradients(dh: torch.Tensor, ids: list[torch.Tensor], call: Gradient) -> list[torch.Tensor]:
    """The rows of dh [N, C] added up by id: on CUDA sorted first, so the same bits every run, unlike index_add."""
    dtables = []
    for i, table, want in zip(ids, call.tables, call.wanted, strict=True):
        if want:
            dtable = torch.ops.aten.embedding_dense_backward(dh, i, table.shape[0], -1, False)
            dtables.append(dtable.to(table.dtype))
        else:
            dtables.append(table.new_empty((0, table.shape[1])))
    return dtables


# cpu --------------------------------------------------------------------------------------------------------


def _neighbours(call: Call | Gradient) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The ids contiguous, the rows of the tables whole: the tensors that native code reads stay alive by name."""
    return [i.contiguous() for i in call.ids], [_rows.whole_rows(table) for table in call.tables]


_NO_LOOKUP = (0, False, 0, 0, 0, 0)


def _lookups(ids: list[torch.Tensor], tables: list[torch.Tensor]) -> list[tuple[int, bool, int, int, int, int]]:
    """The three Lookups of csrc/cpu/ops/rows.h."""
    lookups = [
        (i.data_ptr(), i.dtype == torch.int64, t.data_ptr(), t.shape[0], t.stride(0), backends.CPU_DTYPE[t.dtype])
        for i, t in zip(ids, tables, strict=True)
    ]
    return lookups if len(lookups) == 3 else [*lookups, _NO_LOOKUP]


def _forward_cpu(call: Call) -> Outputs:
    outputs = forward_like(call)
    ids, tables = _neighbours(call)
    weight, bias = _rows.parameter(call.weight), _rows.parameter(call.bias)
    out = _rows.normalized_arguments(weight, bias, call, outputs)
    backends.cpu().embedding_forward(*_lookups(ids, tables), ids[0].shape[0], out, torch.get_num_threads())
    return outputs


def _backward_cpu(call: Gradient) -> Gradients:
    dh = _rows.empty_like(call.dy, torch.float32)
    dweight, dbias = _rows.parameter_gradients_like(call)
    ids, tables = _neighbours(call)
    dy, weight = _rows.whole_rows(call.dy.to(tables[0].dtype)), _rows.parameter(call.weight)
    gradient = _rows.gradient_arguments(dy, weight, call.mean, call.rstd, dh)
    pointers = dweight.data_ptr(), dbias.data_ptr()
    backends.cpu().embedding_backward(*_lookups(ids, tables), dh.shape[0], gradient, *pointers, torch.get_num_threads())
    dtables = []
    for i, table, want in zip(ids, tables, call.wanted, strict=True):
        # Most of the time goes into zeroing the gradient of a vocabulary, so its memory is worth keeping.
        like = torch.empty(table.shape if want else (0, table.shape[1]), dtype=torch.float32, device="meta")
        dtable = backends.empty_cpu(like).zero_()
        dtables.append((dtable.index_add_(0, i, dh) if want else dtable).to(table.dtype))
    return dweight, dbias, dtables


# triton -----------------------------------------------------------------------------------------------------


def _forward_triton(call: Call) -> Outputs:
    _check_ranges(call)
    ids, tables = _neighbours(call)
    return normalize_triton(tables, ids, call, forward_like(call))


def _backward_triton(call: Gradient) -> Gradients:
    dh = _rows.empty_like(call.dy, torch.float32)
    dweight, dbias = _rows.parameter_gradients_like(call)
    ids, tables = _neighbours(call)
    kept = call.weight.contiguous(), call.mean, call.rstd
    outputs = dh if any(call.wanted) else None, dweight, dbias
    triton_kernels("layer_norm").normalize_bwd(_rows.whole_rows(call.dy), tables, ids, *kept, *outputs)
    # The row of dh of an id outside its table is NaN; added to the table's nearest row, it is seen and harms no memory.
    inside = [i.clamp(0, table.shape[0] - 1) for i, table in zip(ids, tables, strict=True)]
    return dweight, dbias, _table_gradients(dh, inside, call)


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
