"""The weights of an encoder laid out for the C++ encoder: each linear layer becomes a blob, uint8 [bytes].

A blob holds panels (csrc/cpu/gemm/gemm.h) that every instruction set tier reads alike. Tables and norms are shared with
the model.

Shapes: C hidden, H heads, D head size, F feed-forward; a linear layer is [F, K].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from distilbert_fast import backends
from distilbert_fast.engine.native_encoder import (
    CODED,
    DTYPES,
    NORMS,
    WEIGHTS,
    EncoderShape,
    PackedEncoder,
    packed_bytes,
    whole_panels,
)
from distilbert_fast.engine.weights import EncoderModules, LayerModules, float_weight, has_tables, layer_weights
from distilbert_fast.layers import CodebookLinear, Int8Linear
from distilbert_fast.ops._rows import address, parameter
from distilbert_fast.ops.quantize import quantize

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TABLES = (*_NAMES, torch.int8)
_STORED: dict[str, tuple[torch.dtype, ...]] = {  # what pack_linear takes for each kind
    "int8": (torch.int8,),
    "codebook16": (torch.uint8,),
    "bf16": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32,),
}


def pack_model(
    model: EncoderModules, precision: str | None, masks: Sequence[torch.Tensor | None]
) -> PackedEncoder | None:
    """A model for the C++ encoder; None if that is not built, or takes no such device, dtypes or mixture of them.

    Each linear layer may be int8; all others are float32, or all bfloat16. So may the tables, all or none.

    Args:
        precision: as for ``Engine.from_model``.
        masks: for each layer None or a factor for each of its heads [H_l]; heads with 0 are left out.
    """
    tables = model.tables
    known = all(table.weight.device.type == "cpu" and table.weight.dtype in _TABLES for table in tables.values())
    alike = len({table.scale is None for table in tables.values()}) == 1
    if not (known and alike) or precision == "fp16" or not backends.availability("cpu").ok:
        return None
    heads = tuple(layer.heads_under(mask) for layer, mask in zip(model.layers, masks, strict=True))
    kinds = [
        _kinds(layer, precision, len(left), model.head_dim) for layer, left in zip(model.layers, heads, strict=True)
    ]
    floats = {kind for layer in kinds for kind in layer} - CODED
    if None in floats or len(floats) > 1 or model.dtype not in _NAMES:
        return None
    shape = EncoderShape(
        kinds=tuple(tuple(map(str, layer)) for layer in kinds),
        dtype=_NAMES[model.dtype],
        hidden=tables["word"].weight.shape[1],
        head_size=model.head_dim,
        num_heads=model.num_heads,
        padding_idx=model.padding_idx,
        heads=heads,
        ffn=tuple(layer.ffn for layer in model.layers),
        eps=(model.norm.eps, *(getattr(layer, name).eps for layer in model.layers for name in NORMS)),
        scales=((0.0, 0.0),) * len(model.layers),
    )
    tensors = {name: table.weight.contiguous() for name, table in tables.items()} | _norm("norm", model.norm)
    tensors |= {f"{name}.scale": table.scale.contiguous() for name, table in tables.items() if table.scale is not None}
    memory = _memory(shape)
    for i, (modules, mask) in enumerate(zip(model.layers, masks, strict=True)):
        qkv, out, ffn_in, ffn_out = (kind == "codebook16" for kind in shape.kinds[i])
        layer = layer_weights(modules, model.head_dim, precision, mask, (qkv, out, ffn_in, ffn_out))
        for name, kind in zip(shape.linears(i), shape.kinds[i], strict=True):
            weight, bias, scale, tables = getattr(layer, name)
            tensors[f"{i}.{name}"] = pack_linear(kind, weight, scale, bias, next(memory), tables)
        for name in NORMS:
            tensors |= _norm(f"{i}.{name}", getattr(modules, name))
        if layer.mask is not None:
            tensors[f"{i}.mask"] = parameter(layer.mask)
    return PackedEncoder(shape, tensors)


def _kinds(layer: LayerModules, precision: str | None, heads: int, head_dim: int) -> tuple[str | None, ...]:
    """The kinds of qkv, out, ffn_in and ffn_out in the C++ encoder, with so many heads; None: one that it lacks."""
    query_linear: Any = layer.query
    hidden: int = query_linear.in_features
    depths = (hidden, hidden, hidden, heads * head_dim, hidden, layer.ffn)
    query, key, value, *others = map(_kind, layer.linears, [precision] * 6, depths)
    three = {query, key, value}
    if three == {"codebook16", "int8"} or (three == {"codebook16"} and head_dim % 4 != 0):
        return "int8", *others
    return query if len(three) == 1 else None, *others


def _kind(linear: Any, precision: str | None, depth: int) -> str | None:
    """The kind of a layer in the C++ encoder, where `depth` of its inputs are left; None: it has none for them."""
    if precision in (None, "int8") and has_tables(linear) and depth % 64 == 0:
        return "codebook16"
    if isinstance(linear, Int8Linear) or precision == "int8":
        return "int8" if precision in (None, "int8") else None
    if precision is None and isinstance(linear, CodebookLinear):
        return "int8"
    return precision or _NAMES.get(linear.weight.dtype)


def _norm(name: str, norm: nn.LayerNorm) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": parameter(getattr(norm, part).detach()) for part in ("weight", "bias")}


def with_static_scales(packed: PackedEncoder, model: EncoderModules, largest: torch.Tensor) -> PackedEncoder:
    """The same encoder with one scale for all tokens of what int8 out and ffn_out read.

    Args:
        model: what it was packed from.
        largest: the magnitudes that ``packed.run`` has seen, see ``PackedEncoder.largest``.
    """
    tensors, kinds, scales, widest = dict(packed.tensors), [], [], packed.shape.widest[0]
    for i, (layer, heads) in enumerate(zip(model.layers, packed.shape.heads, strict=True)):
        context, gelu = largest[i].tensor_split([widest * packed.shape.head_size])
        linear: Any = layer.ffn_out
        (qkv, out, ffn_in, ffn_out), scale, ffn = packed.shape.kinds[i], 0.0, packed.shape.ffn[i]
        if ffn and ffn_out in CODED:
            found = static_linear(float_weight(linear), linear.bias, gelu[:ffn])
            tensors[f"{i}.ffn_out"], scale, tensors[f"{i}.ffn_factors"] = found
            ffn_out = "int8"  # of columns that are scaled one by one few values are alike
        kinds.append((qkv, out, ffn_in, ffn_out))
        scales.append((float(context.amax()) / 127 if heads and out in CODED else 0.0, scale))
    return PackedEncoder(packed.shape._replace(kinds=tuple(kinds), scales=tuple(scales)), tensors)


def static_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, largest: torch.Tensor
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """An int8 linear layer [F, K] whose operand gets one scale, s, for all tokens.

    A few channels of GELU's results are far larger than the others. Each channel k is divided by d_k before it is
    quantized, and its column of the weights multiplied by it: y = Σ_k (x_k / d_k) · (w_fk · d_k). With α = 0.9 of the
    range of activations moved into the weights,

        d_k = max|x_k|^α / max|w_k|^(1 − α),      s = max_k (max|x_k| / d_k) / 127.

    Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, arXiv:2211.10438, §4.

    Args:
        weight: float [F, K].
        bias: [F] or None.
        largest: max|x_k| [K] seen while calibrating.

    Returns:
        The blob; s; the factors 1 / (s · d_k) that make codes, float32 [K in whole panels].
    """
    x = largest.clamp(min=float(largest.max()) * 1e-4)  # a channel that was always 0
    w = weight.to(torch.float32).abs().amax(dim=0)
    d = x**0.9 / w.clamp(min=float(w.max()) * 1e-4) ** 0.1
    scale = float((x / d).max()) / 127
    codes, scales = quantize(weight.to(torch.float32) * d)
    factors = torch.zeros(whole_panels(x.shape[0]), device="cpu")
    factors[: x.shape[0]] = 1 / (scale * d)
    return pack_linear("int8", codes, scales, bias), scale, factors


def _memory(shape: EncoderShape) -> Iterator[torch.Tensor]:
    """Uninitialised memory for each blob of an encoder, from a cache line on.

    It is one allocation, in huge pages: with pages of 4 KiB, reading the weights takes a third longer.
    """
    layers = (zip(kinds, shape.linears(i).values(), strict=True) for i, kinds in enumerate(shape.kinds))
    sizes = [packed_bytes(kind, *size) for layer in layers for kind, size in layer]
    starts = [0, *accumulate(-(-size // 64) * 64 for size in sizes)]
    memory = torch.frombuffer(backends.cpu().Buffer(max(starts[-1], 1)), dtype=torch.uint8)
    return (memory[start : start + size] for start, size in zip(starts, sizes, strict=False))


def pack_linear(
    precision: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    blob: torch.Tensor | None = None,
    tables: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer [F, K] as a blob, uint8 [bytes].

    Args:
        precision: "int8" for codes int8 with scale float32 [F]; "codebook16" for codes with tables too; "bf16", "fp32".
        weight: [F, K], int8, uint8 (for codebook16), float32 or (for bf16) bfloat16, any strides.
        bias: [F] or None.
        blob: where to; None makes one.
        tables: int8 [F, 16] of which each four rows are alike, for codebook16.
    """
    f, k = weight.shape
    wanted = _STORED[precision]
    tables = None if tables is None else tables[::4].contiguous()
    if weight.dtype not in wanted:
        weight = weight.to(wanted[0])
    scale, bias = (None if x is None else parameter(x) for x in (scale, bias))
    if blob is None:
        blob = torch.empty(packed_bytes(precision, f, k), dtype=torch.uint8, device="cpu")
    backends.cpu().pack_linear(
        WEIGHTS[precision],
        weight.data_ptr(),
        weight.dtype == torch.float32,
        *weight.stride(),
        address(scale),
        address(bias),
        address(tables),
        f,
        k,
        blob.data_ptr(),
        blob.numel(),
    )
    return blob
