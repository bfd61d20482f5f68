"""How each backend computes ops/embedding.py: a gather, then what layer_norm does."""

from __future__ import annotations

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._layer_norm_backends import normalize, normalize_backward
from distilbert_fast.ops.quantize import quantize_torch

OP, QUANTIZE = "embedding", "embedding_quantize"
_IDS = ("input_ids", "position_ids", "token_type_ids")
_TABLES = ("word", "position", "token_type")


def forward_like(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for y, μ and rstd; a fake, so with all arguments of forward."""
    y = tables[0].new_empty((ids[0].shape[0], weight.shape[0]))
    return y, *_rows.statistics_like(y, keep)


def quantize_like(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for y, its codes and their scales."""
    y = tables[0].new_empty((ids[0].shape[0], weight.shape[0]))
    return y, *_rows.codes_like(y, out_scale)


def backward_like(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Memory for dweight, dbias and the gradients of the tables that are wanted."""
    c = weight.shape[0]
    dtables = [table.new_empty((table.shape[0] if want else 0, c)) for table, want in zip(tables, wanted, strict=True)]
    return mean.new_empty(c), mean.new_empty(c), dtables


# torch ------------------------------------------------------------------------------------------------------


def _check_ranges(op: str, ids: list[torch.Tensor], tables: list[torch.Tensor]) -> None:
    """Refuse an id outside its table, where a look at the values is free: on the CPU."""
    for i, (rows, table) in enumerate(zip(ids, tables, strict=True)):
        if rows.device.type == "cpu" and rows.numel():
            low, high = (int(bound) for bound in torch.aminmax(rows))
            if low < 0 or high >= table.shape[0]:
                expected = f"in [0, {table.shape[0]}), the rows of {_TABLES[i]}"
                _check.refuse(op, _IDS[i], expected, low if low < 0 else high)


def _gather(ids: list[torch.Tensor], tables: list[torch.Tensor]) -> torch.Tensor:
    h, *others = (torch.nn.functional.embedding(rows, table) for rows, table in zip(ids, tables, strict=True))
    h = h.to(_rows.accumulation_dtype(h.dtype))
    for other in others:
        h = h + other  # [N, C]
    return h


def _forward_torch(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ranges(OP, ids, tables)
    y, mean, rstd = normalize(_gather(ids, tables), weight, bias, eps)
    y = y.to(tables[0].dtype)
    return (y, mean, rstd) if keep else (y, mean.new_empty(0), mean.new_empty(0))


def _forward_quantize_torch(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_ranges(QUANTIZE, ids, tables)
    y, _, _ = normalize(_gather(ids, tables), weight, bias, eps)
    return y.to(tables[0].dtype), *quantize_torch(y, out_scale)


def _backward_torch(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    dh, dweight, dbias = normalize_backward(dy, _gather(ids, tables), weight, mean, rstd)
    return dweight, dbias, _table_gradients(dh, ids, tables, wanted)


def _table_gradients(
    dh: torch.Tensor, ids: list[torch.Tensor], tables: list[torch.Tensor], wanted: list[bool]
) -> list[torch.Tensor]:
    """The rows of dh [N, C] added up by id: on CUDA sorted first, so the same bits every run, unlike index_add."""
    dtables = []
    for rows, table, want in zip(ids, tables, wanted, strict=True):
        if want:
            dtable = torch.ops.aten.embedding_dense_backward(dh, rows, table.shape[0], -1, False)
            dtables.append(dtable.to(table.dtype))
        else:
            dtables.append(table.new_empty((0, table.shape[1])))
    return dtables


# cpu --------------------------------------------------------------------------------------------------------


def _neighbours(ids: list[torch.Tensor], tables: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The ids contiguous, the rows of the tables whole: the tensors that native code reads stay alive by name."""
    return [i.contiguous() for i in ids], [_rows.rows(table) for table in tables]


_NO_LOOKUP = (0, False, 0, 0, 0, 0)


def _lookups(ids: list[torch.Tensor], tables: list[torch.Tensor]) -> list[tuple[int, bool, int, int, int, int]]:
    """The three Lookups of csrc/cpu/ops/rows.h."""
    lookups = [
        (i.data_ptr(), i.dtype == torch.int64, t.data_ptr(), t.shape[0], t.stride(0), _rows.DTYPE_CODE[t.dtype])
        for i, t in zip(ids, tables, strict=True)
    ]
    return lookups if len(lookups) == 3 else [*lookups, _NO_LOOKUP]


def _forward_cpu(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = forward_like(weight, bias, ids, tables, eps, keep)
    ids, tables = _neighbours(ids, tables)
    weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    out = _rows.normalized(weight, bias, eps, y, mean, rstd)
    backends.cpu().embedding_forward(*_lookups(ids, tables), y.shape[0], out, torch.get_num_threads())
    return y, mean, rstd


def _forward_quantize_cpu(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, y_q, found = quantize_like(weight, bias, ids, tables, eps, out_scale)
    ids, tables = _neighbours(ids, tables)
    weight, bias = _rows.parameter(weight), _rows.parameter(bias)
    out = _rows.normalized(weight, bias, eps, y, codes=_rows.codes(y_q, out_scale, found))
    backends.cpu().embedding_forward(*_lookups(ids, tables), y.shape[0], out, torch.get_num_threads())
    return y, y_q, found


def _backward_cpu(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    dh = _rows.empty_like(dy, torch.float32)
    dweight, dbias = mean.new_empty(weight.shape[0]), mean.new_empty(weight.shape[0])
    ids, tables = _neighbours(ids, tables)
    dy, weight = _rows.rows(dy.to(tables[0].dtype)), _rows.parameter(weight)
    gradient = _rows.gradient(dy, weight, mean, rstd, dh)
    pointers = dweight.data_ptr(), dbias.data_ptr()
    backends.cpu().embedding_backward(*_lookups(ids, tables), dh.shape[0], gradient, *pointers, torch.get_num_threads())
    dtables = []
    for rows, table, want in zip(ids, tables, wanted, strict=True):
        # Most of the time goes into zeroing the gradient of a vocabulary, so its memory is worth keeping.
        like = torch.empty(table.shape if want else (0, table.shape[1]), dtype=torch.float32, device="meta")
        dtable = backends.empty_cpu(like).zero_()
        dtables.append((dtable.index_add_(0, rows, dh) if want else dtable).to(table.dtype))
    return dweight, dbias, dtables


# gpu --------------------------------------------------------------------------------------------------------


def _forward_triton(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import layer_norm as kernels

    _check_ranges(OP, ids, tables)
    y, mean, rstd = forward_like(weight, bias, ids, tables, eps, keep)
    ids, tables = _neighbours(ids, tables)
    kept = (mean, rstd) if keep else ()
    kernels.normalize_fwd(tables, ids, weight.contiguous(), bias.contiguous(), eps, y, *kept)
    return y, mean, rstd


def _forward_quantize_triton(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from distilbert_fast.kernels import layer_norm as kernels

    _check_ranges(QUANTIZE, ids, tables)
    y, y_q, found = quantize_like(weight, bias, ids, tables, eps, out_scale)
    ids, tables = _neighbours(ids, tables)
    weight, bias = weight.contiguous(), bias.contiguous()
    kernels.normalize_fwd(tables, ids, weight, bias, eps, y, y_q=y_q, scale=out_scale, found=found)
    return y, y_q, found


def _backward_triton(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    from distilbert_fast.kernels import layer_norm as kernels

    dh = _rows.empty_like(dy, torch.float32)
    dweight, dbias = mean.new_empty(weight.shape[0]), mean.new_empty(weight.shape[0])
    ids, tables = _neighbours(ids, tables)
    kept = weight.contiguous(), mean, rstd
    kernels.normalize_bwd(_rows.rows(dy), tables, ids, *kept, dh if any(wanted) else None, dweight, dbias)
    # The row of dh of an id outside its table is NaN; added to the table's nearest row, it is seen and harms no memory.
    inside = [rows.clamp(0, table.shape[0] - 1) for rows, table in zip(ids, tables, strict=True)]
    return dweight, dbias, _table_gradients(dh, inside, tables, wanted)


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
FORWARD_QUANTIZE = {
    "torch": _forward_quantize_torch,
    "cpu": _forward_quantize_cpu,
    "triton": _forward_quantize_triton,
}
BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
