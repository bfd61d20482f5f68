"""embedding: the input layer of BERT and DistilBERT on packed tokens, and int8 codes of its result.

    h_n = word[input_ids_n] + position[position_ids_n] (+ token_type[token_type_ids_n])
    y = LayerNorm(h)

    dh as in layer_norm,   dword_v = Σ_{n: input_ids_n = v} dh_n,   dposition and dtoken_type likewise

Devlin, Chang, Lee, Toutanova: BERT: Pre-training of Deep Bidirectional Transformers, arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._operator import operator
from distilbert_fast.ops.layer_norm import layer_norm_reference, normalize, normalize_backward
from distilbert_fast.ops.quantize import as_scale, quantize_torch

OP = "embedding"
_INTEGERS = (torch.int64, torch.int32)
_IDS = ("input_ids", "position_ids", "token_type_ids")
_TABLES = ("word", "position", "token_type")


def embedding(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    token_type: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """LayerNorm of the sum of each token's word, position and (BERT) token type vectors.

    Args:
        input_ids: [N], int64 or int32: rows of word.
        position_ids: [N], int64 or int32: rows of position.
        word: [V, C], float32, bfloat16, float16 or float64. Differentiable, as are the other floats.
        position: [P, C], same device, any of those dtypes.
        weight: of the LayerNorm, [C], likewise.
        bias: of the LayerNorm, [C], likewise.
        token_type_ids: [N], int64 or int32: rows of token_type. None together with token_type: none is added.
        token_type: [K, C], any of the float dtypes.
        eps: above 0, added to the variance.

    Returns:
        y [N, C] in the dtype of word.

    Sum, statistics and normalisation are float32 (float64 if word is), rounded once, at the end. Backward
    gathers again, and keeps two numbers a token. Every occurrence of an id adds to its row's gradient: no id
    is the padding's, since packed tokens hold no padding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name; on the
            CPU also an id outside its table. On CUDA a look at the ids would wait for the device. There its row
            of y is NaN, and so are the gradients that it takes part in; no memory outside a table is touched.
            Where torch serves, its gather stops with a device-side assertion.
    """
    ids, tables = _check_arguments(
        OP, input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps
    )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, bias, *tables)):
        return _Embedding.apply(weight, bias, eps, *ids, *tables)
    return _forward(weight, bias, ids, tables, eps, False)[0]


def embedding_quantize(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    token_type: torch.Tensor | None = None,
    eps: float = 1e-12,
    out_scale: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``embedding`` and ``quantize`` of its result in one pass, for the int8 linear layers that read it.

    Args:
        input_ids, position_ids, word, position, weight, bias: as in ``embedding``.
        token_type_ids, token_type, eps: likewise.
        out_scale: None finds each row's own scale. Else a number above 0, or a float32 tensor [] or [N].

    Returns:
        y: as ``embedding`` gives it.
        y_q: int8 [N, C], the codes of the float32 y, before it is rounded to its dtype.
        y_scale: float32 [N]; or the given one, a number as a float32 tensor [].

    Inference only: nothing it returns carries a gradient.

    Raises:
        TypeError, ValueError: as ``embedding``.
    """
    op = "embedding_quantize"
    ids, tables = _check_arguments(
        op, input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps
    )
    if out_scale is not None:
        out_scale = as_scale(op, "out_scale", out_scale, input_ids).detach()
    tables = [table.detach() for table in tables]
    y, y_q, found = _forward_quantize(weight.detach(), bias.detach(), ids, tables, eps, out_scale)
    return y, y_q, found if out_scale is None else out_scale


def embedding_reference(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    token_type: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """The definition of ``embedding`` in differentiable torch, computed in the dtype of its arguments."""
    h = word[input_ids] + position[position_ids]
    if token_type is not None:
        h = h + token_type[token_type_ids]
    return layer_norm_reference(h, weight, bias, eps=eps)


def _check_arguments(
    op: str,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    token_type: torch.Tensor | None,
    eps: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The ids and the tables that they index, two or three of each."""
    _check.tensor(op, "input_ids", input_ids, ("N",), _INTEGERS)
    n, device = input_ids.shape[0], input_ids.device
    _check.tensor(op, "position_ids", position_ids, (n,), _INTEGERS, device)
    _check.tensor(op, "word", word, ("V", "C"), device=device)
    c = word.shape[1]
    _check.tensor(op, "position", position, ("P", c), device=device)
    _check.tensor(op, "weight", weight, (c,), device=device)
    _check.tensor(op, "bias", bias, (c,), device=device)
    _check.positive(op, "eps", eps)
    if token_type is None and token_type_ids is None:
        return [input_ids, position_ids], [word, position]
    if token_type_ids is None:
        _check.refuse(op, "token_type_ids", "given with token_type", None)
    if token_type is None:
        _check.refuse(op, "token_type", "given with token_type_ids", None)
    _check.tensor(op, "token_type_ids", token_type_ids, (n,), _INTEGERS, device)
    _check.tensor(op, "token_type", token_type, ("K", c), device=device)
    return [input_ids, position_ids, token_type_ids], [word, position, token_type]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float, *ids_and_tables: torch.Tensor
    ) -> torch.Tensor:
        ids, tables = _halves(ids_and_tables)
        y, mean, rstd = _forward(weight, bias, ids, tables, eps, True)
        ctx.save_for_backward(weight, mean, rstd, *ids_and_tables)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, mean, rstd, *ids_and_tables = ctx.saved_tensors
        ids, tables = _halves(ids_and_tables)
        wanted = list(ctx.needs_input_grad[-len(tables) :])
        dweight, dbias, dtables = _backward(dy, weight, ids, tables, mean, rstd, wanted)
        gradients = [dtable if want else None for dtable, want in zip(dtables, wanted, strict=True)]
        return dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, *(None for _ in ids), *gradients


def _halves(ids_and_tables: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    half = len(ids_and_tables) // 2
    return list(ids_and_tables[:half]), list(ids_and_tables[half:])


def _select(weight: torch.Tensor, tables: list[torch.Tensor]) -> str:
    return backends.select(OP, weight.device, weight.dtype, *(table.dtype for table in tables))


def _forward_fake(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = tables[0].new_empty((ids[0].shape[0], weight.shape[0]))
    return y, *_rows.statistics_like(y, keep)


@operator(
    "embedding_forward(Tensor weight, Tensor bias, Tensor[] ids, Tensor[] tables, float eps, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [N, C], and what backward needs if ``keep``: μ [N] and rstd [N]; else [0] and [0]."""
    return _FORWARD[_select(weight, tables)](weight, bias, ids, tables, eps, keep)


def _forward_quantize_fake(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = tables[0].new_empty((ids[0].shape[0], weight.shape[0]))
    return y, *_rows.codes_like(y, out_scale)


@operator(
    "embedding_quantize_forward(Tensor weight, Tensor bias, Tensor[] ids, Tensor[] tables, float eps,"
    " Tensor? out_scale) -> (Tensor, Tensor, Tensor)",
    _forward_quantize_fake,
)
def _forward_quantize(
    weight: torch.Tensor,
    bias: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    eps: float,
    out_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [N, C], its codes [N, C], and the scales found [N]: none, [0], where one was given."""
    return _FORWARD_QUANTIZE[_select(weight, tables)](weight, bias, ids, tables, eps, out_scale)


def _backward_fake(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    c = weight.shape[0]
    dtables = [table.new_empty((table.shape[0] if want else 0, c)) for table, want in zip(tables, wanted, strict=True)]
    return mean.new_empty(c), mean.new_empty(c), dtables


@operator(
    "embedding_backward(Tensor dy, Tensor weight, Tensor[] ids, Tensor[] tables, Tensor mean, Tensor rstd,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor[])",
    _backward_fake,
)
def _backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ids: list[torch.Tensor],
    tables: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """dweight [C] and dbias [C] in the dtype of the statistics; of each table its gradient, or [0, C]."""
    return _BACKWARD[_select(weight, tables)](dy, weight, ids, tables, mean, rstd, wanted)


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
    _check_ranges("embedding_quantize", ids, tables)
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
    """The three Lookups of csrc/cpu/rows.h."""
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
    y, mean, rstd = _forward_fake(weight, bias, ids, tables, eps, keep)
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
    y, y_q, found = _forward_quantize_fake(weight, bias, ids, tables, eps, out_scale)
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
    y, mean, rstd = _forward_fake(weight, bias, ids, tables, eps, keep)
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

    _check_ranges("embedding_quantize", ids, tables)
    y, y_q, found = _forward_quantize_fake(weight, bias, ids, tables, eps, out_scale)
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


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton}
_FORWARD_QUANTIZE = {
    "torch": _forward_quantize_torch,
    "cpu": _forward_quantize_cpu,
    "triton": _forward_quantize_triton,
}
_BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton}
