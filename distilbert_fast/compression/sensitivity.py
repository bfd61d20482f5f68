"""What int8 costs, linear layer by linear layer, and which to leave float to keep a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilbert_fast.backends import run_aside
from distilbert_fast.compression.activations import moments
from distilbert_fast.compression.agreement import Agreement, agreement_of, answers
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.compression_config import Int8Config
from distilbert_fast.modeling.quantizer import Moments, check_finite, compressed_modules, linear_names
from distilbert_fast.ops import _check

OP = "sensitivity"

Batches = Sequence[Mapping[str, torch.Tensor]]


class Cost(NamedTuple):
    """What it costs to quantize some layers alone."""

    names: tuple[str, ...]  # dotted; query, key and value of a layer go together, and so do all tables
    kl: float  # mean KL(float ‖ int8) of the answers, nats
    agreement: float  # share of answers whose likeliest choice stays
    saved: int  # bytes


@dataclass(frozen=True)
class Sensitivity:
    """Costs, the highest first.

    Attributes:
        costs: of each group of layers alone.
        kl, agreement: of all of them together.
        count: answers that these are means of.
    """

    costs: tuple[Cost, ...]
    kl: float
    agreement: float
    count: int

    def to_json(self) -> str:
        """The same: {"kl", "agreement", "count", "layers": [{"names", "kl", "agreement", "saved_bytes"}, …]}."""
        layers = [
            {"names": list(c.names), "kl": c.kl, "agreement": c.agreement, "saved_bytes": c.saved} for c in self.costs
        ]
        return json.dumps({"kl": self.kl, "agreement": self.agreement, "count": self.count, "layers": layers}, indent=2)

    def __str__(self) -> str:
        saved = sum(cost.saved for cost in self.costs)
        rows = [_row(cost.kl, cost.agreement, cost.saved, _title(cost.names)) for cost in self.costs]
        rows.insert(0, ("KL, nats", "same, %", "saved, MB", f"what alone is int8 (of {self.count} answers)"))
        rows.append(_row(self.kl, self.agreement, saved, "all"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*map(str.rjust, row[:3], widths), row[3]]) for row in rows)


def _row(kl: float, agreement: float, saved: int, title: str) -> tuple[str, str, str, str]:
    return f"{kl:.2e}", f"{100 * agreement:.2f}", f"{saved / 1e6:.2f}", title


def sensitivity(
    model: PreTrainedModel,
    calibration: Iterable[Any],
    config: Int8Config | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sensitivity:
    """How much the answers of a model change where one linear layer alone is int8.

    Args:
        model: a float one with a task head; it is as it was afterwards.
        calibration: texts or batches, as ``quantize_model`` takes them. Each is computed once for each layer.
        config: which layers; with ``embeddings`` the tables too, together.
        tokenizer: for ``calibration`` by texts; None takes the one beside the model's checkpoint.

    Raises:
        TypeError, ValueError: what ``quantize_model`` refuses; a model without a head that gives probabilities.
    """
    config = config or Int8Config()
    check_finite(model, OP)
    names = linear_names(model, config, OP)
    given = list(batches(calibration, model, tokenizer, OP))
    seen = moments(model, names, given, OP)
    groups = run_aside(lambda: compressed_modules(model, config, OP, {}, seen))
    return _costs(model, groups, given, OP)


def exceptions(
    model: PreTrainedModel, config: Int8Config, given: Batches, seen: Mapping[str, Moments], budget: float, caller: str
) -> list[str]:
    """The names of the linear layers to leave float so that the answers to batches keep within a budget.

    The costliest layer alone is left float first, then the next, until the measured KL of all others is at most
    ``budget`` nats.

    Raises:
        ValueError: int8 embeddings alone cost more.
    """
    groups = run_aside(lambda: compressed_modules(model, config, caller, {}, seen))
    found = _costs(model, groups, given, caller)
    kl, left = found.kl, list[str]()
    for cost in found.costs:
        if kl <= budget:
            return left
        if cost.names[0] not in seen:  # the tables
            continue
        left += cost.names
        kept = [module for names, modules in groups.items() if names[0] not in left for module in modules]
        kl = _measure(model, [kept], given, caller)[0].kl
    if kl > budget:
        _check.refuse(caller, "budget", f"{kl:.3g} or more, what int8 embeddings cost alone", budget)
    return left


Modules = list[tuple[str, nn.Module]]


def _costs(
    model: PreTrainedModel, groups: Mapping[tuple[str, ...], Modules], given: Batches, caller: str
) -> Sensitivity:
    everything = [module for modules in groups.values() for module in modules]
    *alone, together = _measure(model, [*groups.values(), everything], given, caller)
    costs = [
        Cost(names, found.kl, found.share, _bytes(model, names) - sum(_size(module) for _, module in modules))
        for (names, modules), found in zip(groups.items(), alone, strict=True)
    ]
    ordered = tuple(sorted(costs, key=lambda cost: -cost.kl))
    return Sensitivity(ordered, together.kl, together.share, together.answers)


@torch.no_grad()
def _measure(model: PreTrainedModel, variants: Sequence[Modules], given: Batches, caller: str) -> list[Agreement]:
    """How a model with some modules exchanged agrees with itself, for each of some exchanges."""
    found = [Agreement()] * len(variants)
    training = model.training
    try:
        model.eval()
        for batch in given:
            reference = answers(model, batch, caller)
            for i, modules in enumerate(variants):
                kept = [(name, model.get_submodule(name)) for name, _ in modules]
                try:
                    for name, module in modules:
                        model.set_submodule(name, module)
                    found[i] += agreement_of(answers(model, batch, caller), reference)
                finally:
                    for name, module in kept:
                        model.set_submodule(name, module)
    finally:
        model.train(training)
    return found


def _bytes(model: PreTrainedModel, names: Iterable[str]) -> int:
    return sum(_size(model.get_submodule(name)) for name in names)


def _size(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def _title(names: Sequence[str]) -> str:
    """Names that share all but their last parts, as one."""
    if len(names) == 1:
        return names[0]
    stem = names[0].rpartition(".")[0]
    return f"{stem}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}"
