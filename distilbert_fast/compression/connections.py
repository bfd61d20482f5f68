"""Connections away: single weights that are set to 0, and stay so; at once, or while a model is trained.

While it is trained, the share that is gone grows from 0 at the step b·T of T to ``amount`` at e·T,

    share(t) = amount · (1 − (1 − (t/T − b) / (e − b))³)

fast first, while there is much to spare, and slowly in the end. Zhu, Gupta: To prune, or not to prune,
arXiv:1710.01878. A model computes in the same time as before; its file is smaller, see ``SparseLinear``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from distilbert_fast.modeling.compression_config import FLOAT, SPARSE, Kind, part_of
from distilbert_fast.modeling.quantizer import check_finite, check_float, hold_sparse, linears_of
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check
from distilbert_fast.sparse import LINEARS, SparseLinear

_GROUP, _OF_GROUP = 4, 2  # 2:4
OP = "SparsityConfig"
log = logging.getLogger("distilbert_fast")


@dataclass(frozen=True)
class SparsityConfig:
    """Which weights go.

    Args:
        amount: share of the weights of the linear layers of the encoder's layers, above 0 and below 1.
        method: "magnitude": the smallest ones, |w|. "movement": those that training moves towards 0, by Σ_steps of
            −(∂L/∂w)·w as the optimizer sums them; what is gone may come back until ``end``. For fine-tuning a
            pretrained model down to few weights. Sanh, Wolf, Rush: Movement Pruning, arXiv:2005.07683.
        scope: "layer": that share of each linear layer; "global": of all together, so of some more than of others.
        pattern: None: any; "2:4": two of each four that follow one another in a row, as the sparse tensor cores of
            GPUs take them; amount is then 0.5.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that are left alone.
        begin, end: between which shares of the steps of a training they go, 0 ≤ begin < end ≤ 1. What is left after
            ``end`` is for recovery.
        updates: how many times between them it is decided again which.

    Raises:
        TypeError, ValueError: another setting, by name.
    """

    amount: float
    method: str = "magnitude"
    scope: str = "layer"
    pattern: str | None = None
    modules_to_not_convert: Sequence[str] = field(default_factory=tuple)
    begin: float = 0.0
    end: float = 0.6
    updates: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.amount, (int, float)) or isinstance(self.amount, bool):
            _check.refuse(OP, "amount", "a number", type(self.amount).__name__, TypeError)
        if not 0 < self.amount < 1:
            _check.refuse(OP, "amount", "above 0 and below 1", self.amount)
        _check.choice(OP, "method", self.method, ("magnitude", "movement"))
        _check.choice(OP, "scope", self.scope, ("layer", "global"))
        _check.choice(OP, "pattern", self.pattern, (None, "2:4"))
        if self.pattern is not None and self.amount != _OF_GROUP / _GROUP:
            _check.refuse(OP, "amount", f"0.5 for the pattern {self.pattern}", self.amount)
        if not 0 <= self.begin < self.end <= 1:
            _check.refuse(OP, "begin and end", "0 to 1, the second larger", f"{self.begin} and {self.end}")
        if not isinstance(self.updates, int) or self.updates < 1:
            _check.refuse(OP, "updates", "an integer of 1 or more", repr(self.updates))

    def moments(self, step: int, steps: int) -> int:
        """How many of the updates lie before the end of a step, of 0 to ``steps`` − 1."""
        done = ((step + 1) / steps - self.begin) / (self.end - self.begin)
        return math.floor(self.updates * min(max(done, 0.0), 1.0) + 1e-9)

    def share(self, moments: int) -> float:
        """What is gone after so many updates."""
        return self.amount if moments == self.updates else self.amount * (1 - (1 - moments / self.updates) ** 3)

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind:
        """As that of ``CompressionConfig``."""
        skipped = any(part_of(part, name) for part in self.modules_to_not_convert)
        return SPARSE if inside and not skipped else FLOAT

    is_float = True


@torch.no_grad()
def prune_connections(model: Model, config: SparsityConfig) -> Model:
    """Leave the linear layers of an encoder only their largest weights, at once, in place.

    No data are needed and nothing is trained: much beyond half of the weights this costs accuracy, which training wins
    back. Any trainer trains what is left, and what is gone stays 0. With a ``SparsityCallback`` they go little by
    little while the model is trained, which costs less.

    Args:
        model: a float model that ``optimize`` takes; one that is sparse already may become sparser.

    Returns:
        ``model``: its layers are now ``SparseLinear``. ``save_pretrained`` writes a bit for each weight and those that
        are left, and ``from_pretrained`` of transformers and of this package read them back bit for bit, once
        ``distilbert_fast`` is imported. It computes as before, in the same time. ``quantize_model`` makes it int8.

    Raises:
        TypeError, ValueError: an unsupported or quantized model, weights that are not finite, rows that are no fours
            for the pattern 2:4; by name.
    """
    layers = layers_of(model, config, "prune_connections")
    if config.method != "magnitude":
        _check.refuse("prune_connections", "method", "'magnitude': others need training", repr(config.method))
    importance = [_magnitude(layer) for layer in layers.values()]
    masks = masks_of(importance, config.amount, config)
    kept = {name: _also_before(layer, mask) for (name, layer), mask in zip(layers.items(), masks, strict=True)}
    return hold_sparse(model, kept, "prune_connections")


class SparsityCallback(TrainerCallback):
    """Lets connections go while a trainer of transformers trains a model, on labels or with a teacher:

        DistillationTrainer(student, teacher, args, rows, callbacks=[SparsityCallback(SparsityConfig(amount=0.8))])

    The layers of the trainer's model become ``SparseLinear`` when the trainer is made. Checkpoints hold the masks: a
    run that is killed and resumed by a ``ResumableTrainer`` ends with the bits of one that was not. Afterwards the
    model is as that of ``prune_connections``. If the training ends before ``config.end``, less is gone, and a warning
    says so.

    Raises:
        TypeError, ValueError: when the trainer is made, as ``prune_connections`` does; for load_best_model_at_end,
            which would take an earlier model with more weights.
    """

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config

    def resume_settings(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed."""
        return {"sparsity": asdict(self.config)}

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.load_best_model_at_end:
            _check.refuse(
                "SparsityCallback", "args.load_best_model_at_end", "off: earlier models have more weights", True
            )
        model = given["model"]
        layers = layers_of(model, self.config, "SparsityCallback")
        if self.config.method == "movement" and not all(bool(_whole(layer).all()) for layer in layers.values()):
            _check.refuse("SparsityCallback", "model", "a dense one for movement", "one that is sparse already")
        hold_sparse(model, {name: _whole(layer) for name, layer in layers.items()}, "SparsityCallback")
        if self.config.method == "movement":
            for name in layers:
                layer = model.get_submodule(name)
                layer.scores = nn.Parameter(torch.zeros_like(layer.weight))

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        now = self.config.moments(state.global_step, state.max_steps)
        if now == (self.config.moments(state.global_step - 1, state.max_steps) if state.global_step else 0):
            return
        layers = list(_sparse_layers(given["model"], self.config))
        moved = self.config.method == "movement"
        importance = [layer.scores.detach() if moved else _magnitude(layer) for layer in layers]
        for layer, mask in zip(layers, masks_of(importance, self.config.share(now), self.config), strict=True):
            layer.mask.copy_(mask if moved else mask & layer.mask)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.finish(given["model"])

    def finish(self, model: Any) -> None:
        """Leave nothing in the layers that is for training alone, and say if fewer weights are gone than were to."""
        layers = list(_sparse_layers(model, self.config))
        for layer in layers:
            layer.scores = None
        gone, count = sum(int((~layer.mask).sum()) for layer in layers), sum(layer.mask.numel() for layer in layers)
        if gone < round(self.config.amount * count) - len(layers):
            log.warning(
                "SparsityCallback: the training ended early: %.1f%% of the weights are gone, not %.1f%%",
                *(100 * gone / count, 100 * self.config.amount),
            )


def _sparse_layers(model: Any, config: SparsityConfig) -> Iterator[SparseLinear]:
    """Those that a config means, of a model in which they are sparse already."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and config.kind_of(name, "", True) == SPARSE:
            yield module


def layers_of(model: Model, config: SparsityConfig, caller: str) -> dict[str, Any]:
    """The linear layers that a config means, by their dotted names; they fit its pattern."""
    if not isinstance(config, SparsityConfig):
        _check.refuse(caller, "config", "a SparsityConfig", type(config).__name__, TypeError)
    check_float(model, caller)
    check_finite(model, caller)
    named = [name for name, module in model.named_modules() if isinstance(module, LINEARS)]
    for skipped in config.modules_to_not_convert:
        if not any(part_of(skipped, name) for name in named):
            _check.refuse(caller, "modules_to_not_convert", "names of linear layers", repr(skipped))
    layers = {name: layer for name, layer, _ in linears_of(model, config, caller)}
    for name, layer in layers.items():
        if config.pattern is not None and layer.in_features % _GROUP:
            _check.refuse(caller, f"in_features of {name}", "a multiple of 4 for 2:4", layer.in_features)
    if not layers:
        _check.refuse(caller, "modules_to_not_convert", "names of some layers", "those of all")
    return layers


def _magnitude(layer: Any) -> torch.Tensor:
    """|w| [F, C], below all others where it is gone."""
    weight = layer.weight.detach().abs()
    return torch.where(layer.mask, weight, -1.0) if isinstance(layer, SparseLinear) else weight


def _whole(layer: Any) -> torch.Tensor:
    """The mask of what a layer has."""
    return layer.mask if isinstance(layer, SparseLinear) else torch.ones_like(layer.weight, dtype=torch.bool)


def _also_before(layer: Any, mask: torch.Tensor) -> torch.Tensor:
    """Without what was gone already."""
    return mask & layer.mask if isinstance(layer, SparseLinear) else mask


def masks_of(importance: Sequence[torch.Tensor], amount: float, config: SparsityConfig) -> list[torch.Tensor]:
    """Which weights stay if a share of them goes: bool [F, C] of each layer. Among equal ones the first go.

    Args:
        importance: [F, C] of each layer.
    """
    if config.pattern is not None:
        importance = [torch.where(_lesser_two(one), one, torch.inf) for one in importance]
    if config.scope == "layer":
        return [_largest(one.flatten(), amount).view_as(one) for one in importance]
    kept = _largest(torch.cat([one.flatten() for one in importance]), amount)
    parts = kept.split([one.numel() for one in importance])
    return [part.view_as(one) for part, one in zip(parts, importance, strict=True)]


def _lesser_two(importance: torch.Tensor) -> torch.Tensor:
    """bool [F, C]: the two of each four that count least."""
    groups = importance.unflatten(1, (-1, _GROUP))  # [F, C / 4, 4]
    places = groups.sort(dim=-1, stable=True).indices[..., : _GROUP - _OF_GROUP]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(1)


def _largest(importance: torch.Tensor, amount: float) -> torch.Tensor:
    """bool [n]: all but the round(amount · n) least."""
    gone = round(amount * len(importance))
    if gone == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    limit = importance.kthvalue(gone).values
    equal = importance == limit
    first = equal.cumsum(0) <= gone - (importance < limit).sum()
    return ~((importance < limit) | (equal & first))
