"""Find the encoder in a model, take it apart, and wrap results as its own forward would return them."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_outputs
from transformers.activations import GELUActivation

from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.engine.engine import EncoderModules, LayerModules
from distilbert_fast.engine.weights import table_dtype
from distilbert_fast.layers import QUANTIZED_LINEARS
from distilbert_fast.modeling.architectures import (
    COMPUTING_METHODS,
    EMBEDDINGS,
    PROJECTION,
    Architecture,
    architecture_of,
    head_of,
    is_of_library,
)
from distilbert_fast.modeling.snapshot import loose_tensors, own_class
from distilbert_fast.ops import _check
from distilbert_fast.sparse import LINEARS

_NORMS, _DROPOUTS = (nn.LayerNorm,), (nn.Dropout, nn.Identity)
_OTHERS = (nn.Embedding, Int8Embedding, nn.ModuleList, nn.GELU, GELUActivation)
_DECODES = ("is_decoder", "add_cross_attention", "is_causal")  # settings of a config
_GELUS = (nn.functional.gelu, "none")  # what ``_activation`` finds in GELUActivation and in nn.GELU


def find_encoder(model: Any, caller: str) -> PreTrainedModel:
    """The encoder, of one of ``ARCHITECTURES``, inside a model with or without a task head.

    Raises:
        TypeError, ValueError: ``model`` holds none, or one that computes something else: a decoder, cross
            attention, relative positions, an activation other than erf-GELU. By name, as ``caller``.
    """
    encoder: Any = model.base_model if isinstance(model, PreTrainedModel) else None
    known = head_of(type(encoder))
    if known is None or known[1] != "Model":
        given = type(model).__name__
        _check.refuse(caller, "model", "a DistilBERT, BERT or RoBERTa encoder", given, TypeError)
    config = encoder.config
    for name in _DECODES:
        if getattr(config, name, False):
            _check.refuse(caller, f"model.config.{name}", "False", getattr(config, name))
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        _check.refuse(caller, "model.config.position_embedding_type", "'absolute'", repr(positions))
    layers = _reach(encoder, known[0].layers, caller, "model")
    for i, layer in enumerate(layers.children()):
        activation = _reach(layer, known[0].layer["activation"], caller, f"layer {i}")
        if _activation(activation) not in _GELUS:
            key = known[0].activation
            if getattr(config, key) != "gelu":
                _check.refuse(caller, f"model.config.{key}", "'gelu'", repr(getattr(config, key)))
            _check.refuse(caller, f"activation of layer {i}", "erf-GELU", _class(activation))
    return encoder


def _activation(module: Any) -> Any:
    """What an activation of transformers or torch computes: its function, or how it approximates."""
    return vars(module).get("act", getattr(module, "approximate", None)) if isinstance(module, nn.Module) else None


def settings(encoder: Any) -> list[tuple[Callable[[Any], Any], nn.Module]]:
    """Settings of an encoder's modules that change results and are no tensors: how to read each, from which module."""
    found: list[tuple[Callable[[Any], Any], nn.Module]] = [(_decoding, encoder)]
    for layer in encoder_layers(encoder):
        found += [(_attention, attention_of(encoder, layer)), (_activation, part(encoder, layer, "activation"))]
        found += [(_crosses, module) for module in (layer, *layer.children())]
    for module in encoder.modules():
        if isinstance(module, (nn.LayerNorm, nn.Embedding)):
            found.append((attrgetter("eps" if isinstance(module, nn.LayerNorm) else "max_norm"), module))
    if _known(encoder).after_padding:
        found.append((attrgetter("padding_idx"), encoder.embeddings))
    return found


def _decoding(encoder: Any) -> list[Any]:
    """Settings of its config that would make it another kind of model."""
    return [getattr(encoder.config, name, None) for name in (*_DECODES, "position_embedding_type")]


def _crosses(module: Any) -> bool:
    """Whether it attends to other sequences than its own."""
    return bool(getattr(module, "is_cross_attention", False) or getattr(module, "add_cross_attention", False))


def attention_of(encoder: Any, layer: Any) -> Any:
    """The module of a layer that holds query, key and value."""
    return attrgetter(_known(encoder).layer["query"].rpartition(".")[0])(layer)


def heads_left(attention: Any) -> tuple[int, ...]:
    """The numbers of the heads that an attention module has; those of one that was not pruned count from 0."""
    count = attention.n_heads if hasattr(attention, "n_heads") else attention.num_attention_heads
    return getattr(attention, "heads", tuple(range(count)))


def _attention(module: Any) -> tuple[tuple[int, ...], int, float, bool]:
    """Heads, their size, the factor of scores, and whether a query meets only the keys before it."""
    return heads_left(module), module.attention_head_size, module.scaling, module.is_causal


def encoder_layers(encoder: Any) -> nn.ModuleList:
    return attrgetter(_known(encoder).layers)(encoder)


def part(encoder: Any, layer: Any, name: str) -> Any:
    """A part of one of its layers by the name that ``Architecture.layer`` gives it."""
    return attrgetter(_known(encoder).layer[name])(layer)


def encoder_modules(encoder: Any, caller: str, precision: str | None = None) -> EncoderModules:
    """The parts of an encoder that ``find_encoder`` found, under the names that ``Engine`` gives them.

    Raises:
        TypeError: a module is not one of transformers, torch or this package, or a layer is wrapped by an adapter
            or parametrized, so it may compute something else; weights that ``check_weights`` refuses.
        ValueError: embeddings with parts that ``Engine`` has no place for, by the setting that makes them; weights on
            several devices, or on none.
    """
    _check_modules(encoder, caller)
    refuse_embeddings(encoder, caller, "model")
    _check_embeddings(encoder.embeddings, caller)
    num_heads, head_size = _heads(encoder, caller)
    layers = []
    for i, layer in enumerate(encoder_layers(encoder)):
        paths = _known(encoder).linears_and_norms
        parts: Any = {name: _reach(layer, path, caller, f"layer {i}") for name, path in paths.items()}
        for name, module in parts.items():
            _check_part(module, f"{name} of layer {i}", name.endswith("norm"), caller)
        layers.append(LayerModules(**parts, heads=heads_left(attention_of(encoder, layer))))
    modules: Any = dict(encoder.named_modules(remove_duplicate=False))
    tables = {name: modules.get(path) for name, path in EMBEDDINGS.items()}  # DistilBERT has no token types
    _check_part(tables["norm"], EMBEDDINGS["norm"], True, caller)
    devices = {str(tensor.device) for tensor in encoder.parameters()}
    if len(devices) > 1 or devices == {"meta"}:
        _check.refuse(caller, "model weights", "on one device", ", ".join(sorted(devices)))
    check_weights(encoder, precision, caller)
    padding_idx = encoder.embeddings.padding_idx if _known(encoder).after_padding else None
    return EncoderModules(**tables, layers=layers, num_heads=num_heads, head_dim=head_size, padding_idx=padding_idx)


def refuse_embeddings(encoder: Any, caller: str, owner: str) -> None:
    """Raise ValueError for embeddings with more to them than tables that are added and a LayerNorm."""
    config = encoder.config
    if hasattr(encoder, PROJECTION):  # after the LayerNorm, which no table can hold
        expected = f"hidden_size, {config.hidden_size} (embeddings that are projected are not supported)"
        _check.refuse(caller, f"{owner}.config.embedding_size", expected, config.embedding_size)
    if getattr(config, "use_task_id", False):  # ERNIE's
        _check.refuse(caller, f"{owner}.config.use_task_id", "False (task types are not supported)", True)


def _check_modules(encoder: Any, caller: str) -> None:
    """Raise TypeError for a module that is not of a class that transformers puts there, or whose class has another
    forward. The pooler is called as it is, whatever it is."""
    ours = "distilbert_fast.modeling.distilbert"
    homes = (_known(encoder).module, ours, f"{ours}_modules")
    for name, module in encoder.named_modules():
        if name.split(".")[0] == "pooler":
            continue
        kind, is_dropout = own_class(module), "dropout" in name.rpartition(".")[2]
        allowed = _DROPOUTS if is_dropout else (*LINEARS, *_NORMS, *_OTHERS)
        if kind not in allowed and (is_dropout or kind.__module__ not in homes):
            _check.refuse(caller, name or "model", "a module of transformers", _class(module), TypeError)
        for method in COMPUTING_METHODS:
            found: Any = getattr(kind, method, None)
            if found is not None and not is_of_library(found):
                patch = f"{found.__module__}.{found.__qualname__}"
                owner = f"{method} of {_class(module)}"
                _check.refuse(caller, owner, "the one that its library gave it", patch, TypeError)


def _reach(module: Any, path: str, caller: str, place: str) -> Any:
    """The part of a module at a dotted path. Raise TypeError where the module, of another class, has none."""
    for name in path.split("."):
        found = getattr(module, name, None)
        if found is None:
            _check.refuse(caller, place, f"a module of transformers with {name!r}", _class(module), TypeError)
        module = found
    return module


def _check_part(module: Any, place: str, is_norm: bool, caller: str) -> None:
    """Raise TypeError for a linear layer or a LayerNorm that is another module, or a LayerNorm without parameters."""
    allowed = _NORMS if is_norm else LINEARS
    if type(module) not in allowed:
        names = " or ".join(sorted({kind.__name__ for kind in allowed}, reverse=True))
        _check.refuse(caller, place, names, _class(module), TypeError)
    if module.weight is None and not is_norm:
        _check.refuse(caller, place, "a layer with a weight", "one without", TypeError)
    if is_norm and (module.weight is None or module.bias is None):
        _check.refuse(caller, place, "a LayerNorm with weight and bias", "one without", TypeError)


def _heads(encoder: Any, caller: str) -> tuple[int, int]:
    """Heads of an unpruned layer and their size, as the attention modules say: a config may be shared and have changed.

    Raises:
        ValueError: layers that differ, scale scores in another way, or are causal.
    """
    config = encoder.config
    hidden = encoder.get_input_embeddings().embedding_dim
    size = hidden // config.num_attention_heads
    for i, layer in enumerate(encoder_layers(encoder)):
        attention = attention_of(encoder, layer)
        left, own_size, scaling, causal = _attention(attention)
        if i == 0:
            size = own_size
        heads = hidden // size if hasattr(attention, "heads") else len(left)  # pruned ones aside
        if own_size != size or heads * size != hidden:
            expected = f"{hidden // size} of {size} columns"
            _check.refuse(caller, f"heads of layer {i}", expected, f"{heads} of {own_size}")
        if not math.isclose(scaling, size**-0.5):
            _check.refuse(caller, f"scaling of layer {i}", f"{size**-0.5:g}, 1 / √{size}", scaling)
        if any(map(_crosses, (layer, *layer.children()))):
            _check.refuse(caller, f"is_cross_attention of layer {i}", "False", True)
        if causal:
            _check.refuse(caller, f"is_causal of layer {i}", "False", True)
    return hidden // size, size


def _check_embeddings(embeddings: Any, caller: str) -> None:
    """Raise ValueError for tables that change when they are read, and for positions or token types that count in
    another way."""
    for name, table in embeddings.named_children():
        if isinstance(table, nn.Embedding) and table.max_norm is not None:
            _check.refuse(caller, f"max_norm of {name}", "None", table.max_norm)
    for name, step, expected in (("position_ids", 1, "0, 1, 2, … in each row"), ("token_type_ids", 0, "0")):
        ids = getattr(embeddings, name, None)
        if ids is None or ids.is_meta:
            continue
        if not bool((ids == step * torch.arange(ids.shape[-1], device=ids.device)).all()):
            _check.refuse(caller, f"embeddings.{name}", expected, "other numbers")


def check_weights(encoder: Any, precision: str | None, caller: str) -> None:
    """Refuse weights that no kernel, or transformers itself, computes with.

    An encoder has one dtype, float32, bfloat16, float16 or float64, that of its word embeddings. The LayerNorms of one
    in half precision may be float32, int8 layers are never float64.

    Raises:
        TypeError: another dtype or a mixture of them, a tensor that is no plain one, or float64 with int8, by name.
        ValueError: a tensor that torch negates when it reads it.
    """
    dtype = table_dtype(encoder.get_input_embeddings())
    int8 = precision == "int8" or any(isinstance(module, QUANTIZED_LINEARS) for module in encoder.modules())
    allowed = tuple(kind for kind in _check.FLOATS if not (int8 and kind == torch.float64))
    if dtype not in allowed:
        names = " or ".join(str(kind)[6:] for kind in allowed)
        _check.refuse(caller, "model.dtype", f"{names}{' for int8' if int8 else ''}", str(dtype)[6:], TypeError)
    for prefix, module in encoder.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *loose_tensors(module)):
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                _check.refuse(caller, f"{prefix}.{name}", "a plain tensor", type(tensor).__name__, TypeError)
            if tensor.is_neg():
                _check.refuse(caller, f"{prefix}.{name}", "a tensor without torch's negative bit", "one")
            if isinstance(module, (*QUANTIZED_LINEARS, Int8Embedding)) and name == "weight":
                continue
            wider = isinstance(module, nn.LayerNorm) and dtype in (torch.bfloat16, torch.float16)
            if tensor.dtype != dtype and not (wider and tensor.dtype == torch.float32):
                expected = f"{str(dtype)[6:]}, as that of the word embeddings"
                _check.refuse(caller, f"dtype of {prefix}.{name}", expected, str(tensor.dtype)[6:], TypeError)


def encoder_output(encoder: Any, last: torch.Tensor) -> Any:
    """What the encoder's own forward returns for a last hidden state, [B, T, C] or of first tokens [B, 1, C]."""
    kind = getattr(modeling_outputs, _known(encoder).output)
    if not hasattr(encoder, "pooler"):
        return kind(last_hidden_state=last)
    return kind(last_hidden_state=last, pooler_output=None if encoder.pooler is None else encoder.pooler(last))


def _known(encoder: Any) -> Architecture:
    known = architecture_of(encoder)
    assert known is not None, "an encoder that find_encoder found"
    return known


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
