"""What heads and neurons cost: in parameters, in FLOPs, or in time as it is measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from distilbert_fast.engine.engine import EncoderModules, Engine, LayerModules
from distilbert_fast.modeling.encoder import attention_of, encoder_layers
from distilbert_fast.modeling.structure import LayerStructure, structure_of

_WIDTHS = 12  # that are timed; between them time grows evenly
_TURNS = 15


@dataclass(frozen=True)
class Costs:
    """By the number of heads, and by the width, of a layer.

    Attributes:
        heads: [H + 1].
        widths: [F + 1].
        base: what an encoder without heads and neurons costs.
        step: widths that may be left are its multiples, and F.
        layer: what of the base each layer adds.
    """

    heads: np.ndarray
    widths: np.ndarray
    base: float
    step: int
    layer: float = 0.0

    def at(self, is_attention: bool, units: Any) -> Any:
        return (self.heads if is_attention else self.widths)[units]

    def choices(self, is_attention: bool, units: int) -> np.ndarray:
        """How many of so many units may be left."""
        step = 1 if is_attention else self.step
        return np.unique(np.append(np.arange(0, units + 1, step), units))

    def of(self, structure: Sequence[LayerStructure]) -> float:
        return self.base + float(sum(self.heads[len(heads)] + self.widths[ffn] for heads, ffn in structure))

    def deeper(self, layers: int) -> Costs:
        """Those of an encoder with so many layers more, or fewer where negative."""
        return replace(self, base=self.base + layers * self.layer)

    @classmethod
    def measured(
        cls,
        encoder: Any,
        masks: Sequence[torch.Tensor],
        measure: str,
        precision: str | None,
        step: int,
        batch_size: int = 1,
    ) -> Costs:
        """Of an encoder, and of sequences like those of the calibration.

        Args:
            masks: bool [B, T], where batches have tokens.
            measure: "parameters", of linear layers; "flops" a sequence; "time", seconds of a call.
            batch_size: sequences of a call that is timed: one of mean length, or more, as long as they come.
        """
        hidden = encoder.get_input_embeddings().weight.shape[1]
        size = int(attention_of(encoder, encoder_layers(encoder)[0]).attention_head_size)
        structure = structure_of(encoder)
        heads = np.arange(max(len(layer.heads) for layer in structure) + 1, dtype=np.float64)
        widths = np.arange(max(layer.ffn for layer in structure) + 1, dtype=np.float64)
        lengths = torch.cat([mask.sum(1) for mask in masks]).double()
        if measure == "parameters":
            return cls(heads * (4 * size * hidden + 3 * size), widths * (2 * hidden + 1), 0.0, step)
        if measure == "flops":
            tokens, pairs = float(lengths.mean()), float(lengths.square().mean())
            head = 8 * size * hidden * tokens + 4 * size * pairs
            return cls(heads * head, widths * 4 * hidden * tokens, 0.0, step)
        timed = [max(int(lengths.mean().ceil()), 1)]
        if batch_size > 1:
            spread = torch.linspace(0, len(lengths) - 1, batch_size).round().long()
            timed = lengths.sort().values[spread].clamp(min=1).long().tolist()
        return _timed(encoder, hidden, size, len(heads) - 1, len(widths) - 1, len(structure), timed, precision, step)


def _timed(
    encoder: Any,
    hidden: int,
    size: int,
    heads: int,
    width: int,
    depth: int,
    lengths: Sequence[int],
    precision: str | None,
    step: int,
) -> Costs:
    """Seconds by heads and by width of a layer, and of an encoder of that depth without either."""
    counts = np.arange(heads + 1)
    places = np.unique(np.linspace(0, width, _WIDTHS).round().astype(int))
    shapes = [(0, 0), *((int(h), 0) for h in counts[1:]), *((0, int(f)) for f in places[1:])]
    mask = torch.arange(max(lengths), device=encoder.device) < torch.tensor(lengths, device=encoder.device)[:, None]
    ids = mask.long()
    common = (hidden, size, max(lengths), heads, precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        engines = [_engine(encoder, h, f, depth, *common) for h, f in shapes]
        engines.append(_engine(encoder, 0, 0, 2 * depth, *common))
    seconds: list[list[float]] = [[] for _ in engines]
    for turn in range(_TURNS + 2):
        for taken, engine in zip(seconds, engines, strict=True):
            start = perf_counter()
            engine(ids, mask).sum().item()
            if turn >= 2:
                taken.append(perf_counter() - start)
    *fastest, twice = map(min, seconds)  # other work on the machine only adds
    added = np.maximum(np.array(fastest) - fastest[0], 0) / depth
    by_heads = np.maximum.accumulate(added[: heads + 1])
    by_width = np.maximum.accumulate(np.concatenate([[0.0], added[heads + 1 :]]))
    by_width = np.interp(np.arange(width + 1), places, by_width)
    return Costs(by_heads, by_width, fastest[0], step, max(twice - fastest[0], 0) / depth)


def _engine(
    encoder: Any,
    heads: int,
    ffn: int,
    depth: int,
    hidden: int,
    size: int,
    length: int,
    most: int,
    precision: str | None,
) -> Engine:
    """One of an encoder's shape, all of whose layers have so many heads and such a width."""
    device, dtype = encoder.device, encoder.dtype

    def linear(columns: int, rows: int) -> nn.Linear:
        made = nn.Linear(1, 1, device=device, dtype=dtype)  # torch would warn that there is nothing to initialise
        made.weight = nn.Parameter(0.02 * torch.randn(rows, columns, device=device, dtype=dtype))
        made.bias = nn.Parameter(0.02 * torch.randn(rows, device=device, dtype=dtype))
        made.in_features, made.out_features = columns, rows
        return made

    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(hidden, device=device, dtype=dtype)

    def layer() -> LayerModules:
        query, key, value = (linear(hidden, heads * size) for _ in range(3))
        out, first, second = linear(heads * size, hidden), linear(hidden, ffn), linear(ffn, hidden)
        return LayerModules(query, key, value, out, norm(), first, second, norm(), tuple(range(heads)))

    layers = [layer() for _ in range(depth)]
    word, position = (nn.Embedding(rows, hidden, device=device, dtype=dtype) for rows in (2, length))
    return Engine.from_model(EncoderModules(word, position, None, norm(), layers, most, size), precision, graphs=0)
