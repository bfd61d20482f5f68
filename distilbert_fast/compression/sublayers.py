"""The sub-layers of an encoder, attention and feed-forward of each layer, run one after another on calibration data.

What reads a sub-layer's units (heads or neurons) is its last linear layer, ``out`` or ``ffn_out``: unit i of it is the
columns of that layer's input x [N, units · size] that belong to i.

Shapes: B batch, T sequence, N real tokens, C hidden, L layers, U units of a sub-layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast.layers import is_token
from distilbert_fast.modeling.architectures import architecture_of
from distilbert_fast.modeling.encoder import attention_of, encoder_layers, heads_left, part
from distilbert_fast.modeling.structure import keep_heads, keep_neurons

Batch = Mapping[str, torch.Tensor]


class Sublayer(NamedTuple):
    """One of the 2 L, from the bottom."""

    layer: int
    is_attention: bool

    def reader(self, encoder: Any) -> nn.Linear:
        layer = encoder_layers(encoder)[self.layer]
        found: nn.Linear = part(encoder, layer, "out" if self.is_attention else "ffn_out")
        return found

    def unit_size(self, encoder: Any) -> int:
        """Columns of the reader's input that a unit has."""
        layer = encoder_layers(encoder)[self.layer]
        return int(attention_of(encoder, layer).attention_head_size) if self.is_attention else 1

    def units(self, encoder: Any) -> int:
        return self.reader(encoder).in_features // self.unit_size(encoder)

    def columns(self, encoder: Any, left: torch.Tensor) -> torch.Tensor:
        """Columns of units [n] in the reader's input."""
        size = self.unit_size(encoder)
        return (left[:, None] * size + torch.arange(size, device=left.device)).flatten()

    def cut(self, encoder: Any, left: torch.Tensor) -> None:
        """Leave only these units, by their places now, ascending."""
        if self.is_attention:
            heads = heads_left(attention_of(encoder, encoder_layers(encoder)[self.layer]))
            keep_heads(encoder, self.layer, [heads[place] for place in left.tolist()])
        else:
            keep_neurons(encoder, self.layer, left)


def sublayers(encoder: Any) -> list[Sublayer]:
    return [Sublayer(layer, first) for layer in range(len(encoder_layers(encoder))) for first in (True, False)]


class _Reached(Exception):
    pass


class States:
    """Hidden states of calibration batches before some layer of an encoder, and how that is called there."""

    def __init__(self, model: Any, encoder: Any, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.masks = [_mask(batch) for batch in batches]
        self.hidden: list[torch.Tensor] = []  # [B, T, C]
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.layer = 0

        def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, args, kwargs = _taken(args, kwargs)
            self.hidden.append(x)
            self._calls.append((args, kwargs))
            raise _Reached

        handle = encoder_layers(encoder)[0].register_forward_pre_hook(reach, with_kwargs=True)
        with handle, torch.no_grad():
            for batch in batches:
                with contextlib.suppress(_Reached):
                    model(**batch)

    def run(self, layer: nn.Module, i: int, x: torch.Tensor) -> torch.Tensor:
        """A layer's output [B, T, C] of x in batch i."""
        args, kwargs = self._calls[i]
        y = layer(x, *args, **kwargs)
        return y[0] if isinstance(y, tuple) else y

    def advance(self, layer: nn.Module) -> None:
        """Go on to the layer after this one."""
        for i, x in enumerate(self.hidden):
            self.hidden[i] = self.run(layer, i, x)
        self.layer += 1

    def rows(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """x [B, T, …] of batch i without padding, [N, …]."""
        return x[self.masks[i]]


def _mask(batch: Batch) -> torch.Tensor:
    """Where a batch has tokens, bool [B, T]."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else is_token(mask)


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states out of a layer's arguments, and the others."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


@contextlib.contextmanager
def inputs_read(modules: Sequence[nn.Module], stop: bool = False) -> Iterator[list[Any]]:
    """What modules read in the call that runs meanwhile; with ``stop`` it ends where it reaches the last of them."""
    seen: list[Any] = [None] * len(modules)

    def note(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[place] = args[0]
            if stop and place == len(modules) - 1:
                raise _Reached

        return hook

    with contextlib.ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.enter_context(module.register_forward_pre_hook(note(place)))
        with contextlib.suppress(_Reached):
            yield seen


@contextlib.contextmanager
def from_layer(encoder: Any, first: int) -> Iterator[list[torch.Tensor]]:
    """Let an encoder begin with layer ``first``, which reads what stands in the list, and not compute those below."""
    known: Any = architecture_of(encoder)
    path, _, name = known.layers.rpartition(".")
    parent, layers = attrgetter(path)(encoder), encoder_layers(encoder)
    given: list[torch.Tensor] = []

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        _, args, kwargs = _taken(args, kwargs)
        return (given[0], *args), kwargs

    setattr(parent, name, nn.ModuleList(list(layers)[first:]))
    handle = layers[first].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()
        setattr(parent, name, layers)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode, and no parameter gets a gradient; parameters may be replaced meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name in learning:
            model.get_parameter(name).requires_grad_(True)
