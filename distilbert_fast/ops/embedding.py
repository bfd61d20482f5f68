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

from distilbert_fast.ops import _check
from distilbert_fast.ops._embedding_backends import OP, QUANTIZE, Call, Gradient, backward, forward
from distilbert_fast.ops._operator import function
from distilbert_fast.ops._rows import as_scale
from distilbert_fast.ops.layer_norm import layer_norm_reference

_INTEGERS = (torch.int64, torch.int32)


@function()
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
    return forward(Call(weight, bias, ids, tables, None, eps, "nothing"))[0]


@function()
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
    ids, tables = _check_arguments(
        QUANTIZE, input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps
    )
    if out_scale is not None:
        out_scale = as_scale(QUANTIZE, "out_scale", out_scale, input_ids).detach()
    tables = [table.detach() for table in tables]
    y, y_q, found = forward(Call(weight.detach(), bias.detach(), ids, tables, out_scale, eps, "codes"))
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


def _check_arguments(op: str, *arguments: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The ids and the tables that they index, two or three of each. Arguments: those of ``embedding``, in its order."""
    input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps = arguments
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
        y, mean, rstd = forward(Call(weight, bias, ids, tables, None, eps, "statistics"))
        ctx.save_for_backward(weight, mean, rstd, *ids_and_tables)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, mean, rstd, *ids_and_tables = ctx.saved_tensors
        ids, tables = _halves(ids_and_tables)
        wanted = list(ctx.needs_input_grad[-len(tables) :])
        dweight, dbias, dtables = backward(Gradient(dy, weight, ids, tables, mean, rstd, wanted))
        gradients = [dtable if want else None for dtable, want in zip(dtables, wanted, strict=True)]
        return dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, *(None for _ in ids), *gradients


def _halves(ids_and_tables: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    half = len(ids_and_tables) // 2
    return list(ids_and_tables[:half]), list(ids_and_tables[half:])
