"""The structure of an encoder: which heads and how wide a feed-forward each layer has left, and how they are removed.

What is removed leaves the weights: rows of query, key, value and of the first linear layer of the feed-forward, columns
of the two that read these. transformers' own classes compute what is left. A layer without heads, whose attention is
nothing but the output's bias, gets a forward that says so.

Michel, Levy, Neubig: Are Sixteen Heads Really Better than One?, arXiv:1905.10650.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast.backends import run_aside
from distilbert_fast.modeling.architectures import architecture_of
from distilbert_fast.modeling.compression_config import METHOD
from distilbert_fast.modeling.encoder import attention_of, encoder_layers, heads_left, part
from distilbert_fast.ops import _check

MODEL_NAME = "DistilBertModel"  # in messages
_QKV = ("query", "key", "value")


class LayerStructure(NamedTuple):
    """What is left of a layer."""

    heads: tuple[int, ...]  # their numbers in the unpruned model, ascending
    ffn: int  # width of the feed-forward


def structure_of(encoder: Any) -> tuple[LayerStructure, ...]:
    """What is left of each layer of an encoder that ``find_encoder`` found."""
    return tuple(
        LayerStructure(heads_of(encoder, layer), part(encoder, layer, "ffn_in").out_features)
        for layer in encoder_layers(encoder)
    )


def heads_of(encoder: Any, layer: Any) -> tuple[int, ...]:
    """The numbers of the heads that a layer has left."""
    return heads_left(attention_of(encoder, layer))


# Removing -----------------------------------------------------------------------------------------------------------


def keep_heads(encoder: Any, index: int, left: Sequence[int]) -> None:
    """Leave a layer these of its heads, by their numbers. Parameters are replaced."""
    layer = encoder_layers(encoder)[index]
    attention, heads = attention_of(encoder, layer), heads_of(encoder, layer)
    if tuple(left) == heads:
        return
    size = attention.attention_head_size
    places = torch.tensor([heads.index(head) for head in left], dtype=torch.int64, device="cpu")
    features = (places[:, None] * size + torch.arange(size, device="cpu")).flatten()
    for name in _QKV:
        _select(part(encoder, layer, name), features, 0)
    _select(part(encoder, layer, "out"), features, 1)
    attention.heads = tuple(left)
    for name in ("n_heads", "num_attention_heads", "dim", "all_head_size"):
        if hasattr(attention, name):
            setattr(attention, name, len(left) * (1 if name.endswith("heads") else size))
    if not left and type(attention).__module__.startswith("transformers."):
        kind: Any = type(attention)
        attention.__class__ = _without_heads(kind, _out_inside(encoder))


def keep_neurons(encoder: Any, index: int, left: torch.Tensor) -> None:
    """Leave the feed-forward of a layer these of its neurons, by their places now. Parameters are replaced."""
    layer = encoder_layers(encoder)[index]
    _select(part(encoder, layer, "ffn_in"), left, 0)
    _select(part(encoder, layer, "ffn_out"), left, 1)


def restructure(encoder: Any, structure: Iterable[LayerStructure]) -> None:
    """Leave each layer its heads and as many neurons as ``structure`` says, for weights that are loaded afterwards."""

    def shrink() -> None:
        for i, (heads, ffn) in enumerate(structure):
            keep_heads(encoder, i, heads)
            keep_neurons(encoder, i, torch.arange(ffn, device="cpu"))

    run_aside(shrink)


def check_prunable(encoder: Any, caller: str, layers: Iterable[int] | None = None) -> None:
    """Refuse layers with other than plain linear layers, which cannot be pruned. Raises TypeError."""
    stack = encoder_layers(encoder)
    for i in range(len(stack)) if layers is None else layers:
        for name in (*_QKV, "out", "ffn_in", "ffn_out"):
            linear = part(encoder, stack[i], name)
            if type(linear) is not nn.Linear:
                called = architecture_of(encoder).layer[name].rpartition(".")[2]
                given = type(linear).__name__
                _check.refuse(caller, f"{called} of layer {i}", "nn.Linear to be pruned", given, TypeError)


def _select(linear: nn.Linear, features: torch.Tensor, dim: int) -> None:
    """Keep only the given output (dim 0) or input (dim 1) features of a linear layer, in new parameters."""
    features = features.to(linear.weight.device)

    def selected(parameter: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(parameter.detach().index_select(dim, features), parameter.requires_grad)

    linear.weight = selected(linear.weight)
    if dim == 0 and linear.bias is not None:
        linear.bias = selected(linear.bias)
    linear.out_features, linear.in_features = linear.weight.shape


def prune_heads(encoder: Any, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
    """Remove heads from a ``distilbert_fast.DistilBertModel``, see its ``prune_heads``."""
    count, layers = encoder.config.n_heads, encoder_layers(encoder)
    for layer, heads in heads_to_prune.items():
        if layer not in range(len(layers)):
            _check.refuse(MODEL_NAME, "heads_to_prune", f"of layers in 0…{len(layers) - 1}", layer)
        for head in heads:
            if head not in range(count):
                _check.refuse(MODEL_NAME, "heads_to_prune", f"of heads in 0…{count - 1}", head)
    check_prunable(encoder, MODEL_NAME, heads_to_prune)

    def shrink() -> None:
        for layer, heads in heads_to_prune.items():
            keep_heads(encoder, layer, [h for h in heads_of(encoder, layers[layer]) if h not in set(heads)])

    run_aside(shrink)  # also when a pruned checkpoint is loaded


# Attention without heads ----------------------------------------------------------------------------------------------


def _nothing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """What transformers' attention would make of no head, which its own forward cannot: views of unknown size."""
    batch, length = hidden_states.shape[:2]
    context, probabilities = hidden_states.new_zeros(batch, length, 0), None
    implementation = self.config._attn_implementation
    if implementation == "eager" or (implementation == METHOD and kwargs.get("output_attentions")):
        probabilities = hidden_states.new_zeros(batch, 0, length, length)  # as many layers as others give
    return (attrgetter(self._out)(self)(context) if self._out else context), probabilities


def _out_inside(encoder: Any) -> str:
    """The name of the output's linear layer in the attention module; empty where it is another module's."""
    known: Any = architecture_of(encoder)
    inside = known.layer["query"].rpartition(".")[0] + "."
    return known.layer["out"].removeprefix(inside) if known.layer["out"].startswith(inside) else ""


@functools.cache
def _without_heads(kind: Any, out: str) -> type:
    """A class of attention in transformers for a layer that has no heads."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _empty, (kind, out), self.__dict__.copy()

    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body |= {"forward": _nothing, "__reduce_ex__": reduce, "_whole": kind, "_out": out}
    return type(kind.__name__, (kind,), body)


def _empty(kind: type, out: str) -> Any:
    """An instance without anything, which pickle and copy then fill."""
    made: Any = _without_heads(kind, out)
    return made.__new__(made)


def whole_class(kind: Any) -> Any:
    """The class that ``_without_heads`` derived one from; any other as it is."""
    return vars(kind).get("_whole", kind)
