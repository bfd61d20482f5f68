"""prune_model: remove heads and neurons of an encoder within a budget, without training, in minutes.

Sub-layer by sub-layer from the bottom, attention and feed-forward:

    scores of all units from here up (importance.py)
    → how many stay in each sub-layer, within what is left of the budget (allocation.py)
    → cut this one, those with the least scores
    → its last linear layer again, by damped least squares to what the whole model has at this place:
          min Σ_n ‖(x + f(x))_whole − x − W z − b‖² + λ‖W − W₀‖²

with z [N, K] what that layer reads and x what is added to it in the pruned model, whose lower layers are finished.

Park, Choi, Kang: Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models (K-prune),
arXiv:2308.03449.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from distilbert_fast.compression.allocation import allocate
from distilbert_fast.compression.costs import Costs
from distilbert_fast.compression.importance import Scorer, drawn, labelled
from distilbert_fast.compression.least_squares import LeastSquares
from distilbert_fast.compression.sublayers import Batch, States, Sublayer, frozen, inputs_read, sublayers
from distilbert_fast.engine.engine import PRECISIONS
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.encoder import check_weights, encoder_layers, find_encoder, part
from distilbert_fast.modeling.quantizer import check_finite, record_structure
from distilbert_fast.modeling.structure import LayerStructure, check_prunable, structure_of
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops._check import choice, positive, refuse

OP = "prune_model"
MEASURES = ("parameters", "flops", "time")
PRUNING_METHODS = ("kprune", "fisher")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How much is removed, and how that is chosen.

    Args:
        amount: the share of the encoder's layers that goes, above 0 and below 1.
        measure: of what: "parameters"; "flops", of sequences as long as those of the calibration; or "time", as the
            engine takes on this machine, measured for each number of heads and width.
        method: "kprune" scores again after each cut, without labels. "fisher" scores once, by the gradients of the loss
            with labels: faster, and worse at high amounts.
        temperature: τ that softens the model's answers, so that confident ones count.
        mu: what a head's score is multiplied by: more keeps heads rather than neurons. Above an amount of a half
            1 to 8 may lose less (docs/log.md).
        representation: λ_rep, the weight of what a unit puts out beside what the answers lose without it.
        damping: λ of the least squares, as a share of the mean square of what is read.
        neurons: the widths that are left are multiples of it; 32 fills the panels of the CPU kernels.
        score_sequences: how many sequences the scores are made of.
        precision: of the engine that is timed, see ``optimize``.
        batch_size: sequences of a call that is timed: 1, of mean length, or more, as long as they come.
        seed: of the answers that are drawn.

    Raises:
        ValueError, TypeError: a setting out of range, by name.
    """

    amount: float
    measure: str = "parameters"
    method: str = "kprune"
    temperature: float = 2.0
    mu: float = 64.0
    representation: float = 2.5e-4
    damping: float = 1e-3
    neurons: int = 32
    score_sequences: int = 512
    precision: str | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("amount", "temperature", "mu", "damping"):
            positive(OP, name, getattr(self, name))
        if self.amount >= 1:
            refuse(OP, "amount", "a share above 0 and below 1", self.amount)
        if not 0 <= self.representation < math.inf:
            refuse(OP, "representation", "0 or more, and finite", self.representation)
        for name in ("neurons", "score_sequences", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                refuse(OP, name, "a number from 1 on", getattr(self, name))
        choice(OP, "precision", self.precision, (None, *PRECISIONS))
        choice(OP, "measure", self.measure, MEASURES)
        choice(OP, "method", self.method, PRUNING_METHODS)


@dataclass(frozen=True)
class PruningReport:
    """What ``prune_model`` did.

    Attributes:
        before, after: what the layers of the encoder had and have.
        cost_before, cost_after: of the layers, in the unit of the measure: numbers, FLOPs a sequence or seconds a call.
        errors: for each sub-layer from the bottom, ‖what it should be − what it is‖² / ‖what it should be‖².
    """

    before: tuple[LayerStructure, ...]
    after: tuple[LayerStructure, ...]
    measure: str
    cost_before: float
    cost_after: float
    errors: tuple[float, ...]

    def __str__(self) -> str:
        lines = [f"{self.measure}: {self.cost_before:.4g} → {self.cost_after:.4g}"]
        for i, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            heads, width = f"{len(new.heads)} of {len(old.heads)} heads", f"{new.ffn} of {old.ffn} neurons"
            lines.append(f"layer {i}: {heads}, {width}; error {self.errors[2 * i]:.3f}, {self.errors[2 * i + 1]:.3f}")
        return "\n".join(lines)


def prune_model(
    model: Model,
    calibration: Iterable[Any],
    config: PruningConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    costs: Costs | None = None,
) -> tuple[Model, PruningReport]:
    """Remove attention heads and feed-forward neurons of an encoder that ``optimize`` knows, in place.

    Nothing is trained: some hundred to some thousand sentences as the model will read them are enough, without labels.
    What is removed is gone from the weights, so the model is as much smaller in transformers, in the engine and on the
    disk. Fine-tune or distil it afterwards to win back what it lost.

    Args:
        model: with a task head, whose answers it is to keep, or without one, for its hidden states. In float32 or
            float64. ``copy.deepcopy`` it first to keep it whole.
        calibration: an iterable of texts or of batches, as for ``optimize``; for "fisher" of batches with labels.
        config: how much, and how.
        tokenizer: for texts; None takes the one beside the model's checkpoint.
        costs: what heads and neurons cost by ``config.measure``, where that is known; None: it is counted or timed.

    Returns:
        ``model``, which ``save_pretrained`` now writes with its structure (docs/formats.md), and a report.

    Raises:
        TypeError, ValueError: an unsupported, quantized or half-precision model, or weights that are not finite, by
            name; no text, or no labels for "fisher"; a budget that cannot be met.
    """
    encoder: Any = find_encoder(model, OP)
    check_weights(encoder, None, OP)
    check_prunable(encoder, OP)
    check_finite(model, OP)
    if encoder.dtype not in (torch.float32, torch.float64):
        refuse(OP, "model.dtype", "float32 or float64", str(encoder.dtype)[6:], TypeError)
    labels = config.method == "fisher"
    given = [_to(batch, encoder.device) for batch in batches(calibration, model, tokenizer, OP, labels)]
    given = [batch for batch in given if batch["input_ids"].numel()]
    if not given:
        refuse(OP, "calibration", "at least one batch with a token", "none")
    with frozen(model), torch.no_grad():
        return model, _Pruning(model, encoder, given, config, costs).run()


def _to(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


class _Pruning:
    """One run of ``prune_model``."""

    def __init__(
        self, model: Any, encoder: Any, given: Sequence[Batch], config: PruningConfig, costs: Costs | None
    ) -> None:
        self.model, self.encoder, self.config = model, encoder, config
        self.before = structure_of(encoder)
        self.sublayers = sublayers(encoder)
        self.states = States(model, encoder, [_without_labels(batch) for batch in given])
        self.whole = list(self.states.hidden)  # [B, T, C] in the whole model at the same place
        of = (config.measure, config.precision, config.neurons, config.batch_size)
        self.costs = costs or Costs.measured(encoder, self.states.masks, *of)
        self.budget = (1 - config.amount) * self.costs.of(self.before)
        if self.budget < self.costs.base:
            most = 1 - self.costs.base / self.costs.of(self.before)
            expected = f"below {most:.3f}, what heads and neurons take of the {config.measure}"
            refuse(OP, "amount", expected, config.amount)
        generator = torch.Generator().manual_seed(config.seed)
        multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
        own = drawn(config.temperature, generator, multi_label)
        common = (model, encoder, self.states, self._counted())
        fisher = config.method == "fisher"
        labels = [batch["labels"] for batch in given] if fisher else None
        self.scorer = Scorer(*common, labelled if fisher else own, 0.0 if fisher else config.representation, labels)

    def _counted(self) -> list[int]:
        """The batches that scores are made of, evenly spread."""
        count = sum(len(mask) for mask in self.states.masks)
        return list(range(0, len(self.states.masks), max(count // self.config.score_sequences, 1)))

    def run(self) -> PruningReport:
        errors: list[float] = []
        found = self._scores(self.sublayers) if self.config.method == "fisher" else []
        rest = list(self.sublayers)
        try:
            with logging.tqdm(total=len(rest), desc="Pruning", unit="sub-layer") as bar:
                for layer in encoder_layers(self.encoder):
                    for target in self._targets(layer):
                        if self.config.method == "kprune":
                            found = self._scores(rest)
                        errors.append(self._cut(rest[0], self._left(rest, found), layer, target))
                        rest, found = rest[1:], found[1:]
                        bar.update()
                    self.states.advance(layer)
        finally:  # also what was cut before an interrupt
            record_structure(self.model)
        after = structure_of(self.encoder)
        costs = self.costs.of(self.before), self.costs.of(after)
        return PruningReport(self.before, after, self.config.measure, *costs, tuple(errors))

    def _targets(self, layer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What each of a layer's norms reads in the whole model, real tokens [N, C] of each batch."""
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for i, x in enumerate(self.whole):
            with inputs_read(self._norms(layer)) as read:
                self.whole[i] = self.states.run(layer, i, x)
            for place, sum_ in enumerate(read):
                found[place].append(self.states.rows(sum_, i))
        return found

    def _norms(self, layer: Any) -> list[Any]:
        return [part(self.encoder, layer, name) for name in ("attention_norm", "ffn_norm")]

    def _scores(self, rest: Sequence[Sublayer]) -> list[torch.Tensor]:
        found = zip(rest, self.scorer.scores(rest), strict=True)
        return [score * self.config.mu if sublayer.is_attention else score for sublayer, score in found]

    def _left(self, rest: Sequence[Sublayer], found: Sequence[torch.Tensor]) -> torch.Tensor:
        """The units that stay in the first of the sub-layers that are left, by their places, ascending."""
        losses, costs, counts = [], [], []
        for sublayer, score in zip(rest, found, strict=True):
            gone = np.concatenate([[0.0], score.sort().values.double().cumsum(0).cpu().numpy()])  # of the least n
            kept = self.costs.choices(sublayer.is_attention, len(score))
            losses.append(gone[len(score) - kept])
            costs.append(self.costs.at(sublayer.is_attention, kept))
            counts.append(kept)
        done = [s for s in self.sublayers if s not in rest]
        spent = self.costs.base + sum(float(self.costs.at(s.is_attention, s.units(self.encoder))) for s in done)
        picked = allocate(losses, costs, max(self.budget - spent, 0.0))
        assert picked is not None  # none of the units that are left is within any budget
        count = int(counts[0][picked[0]])
        return found[0].topk(count).indices.sort().values

    def _cut(self, sublayer: Sublayer, left: torch.Tensor, layer: Any, target: Sequence[torch.Tensor]) -> float:
        """Remove all other units, and fit what reads the rest; the share of the target that it misses."""
        encoder, states = self.encoder, self.states
        sublayer.cut(encoder, left)
        reader, norm = sublayer.reader(encoder), self._norms(layer)[0 if sublayer.is_attention else 1]
        fit = LeastSquares(reader.in_features, reader.out_features, encoder.device)
        for i, x in enumerate(states.hidden):
            with inputs_read([reader, norm], stop=True) as read:
                states.run(layer, i, x)
            z, sum_ = (states.rows(tensor, i) for tensor in read)
            fit.add(z, target[i] - (sum_ - reader(z)))
        return fit.solve_into(reader, self.config.damping)


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
