"""How `compress` reaches a speed: by how many layers, and by how much time of theirs that pruning takes away.

A call of a model takes   t = own(layers) + base(layers) + Σ over layers of heads(h) + neurons(f),

with `own` what is outside the encoder's layers: Python, and a head in float32. All but it is a table that was measured
on this machine (`Costs`), and it is what whole models of some depths, the teacher and students, take beyond the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from distilbert_fast.compression.costs import Costs
from distilbert_fast.jobs.settings import Compression, require
from distilbert_fast.layers import is_token
from distilbert_fast.modeling.encoder import encoder_layers, find_encoder

_BATCH_SIZES = {"latency": 1, "throughput": 32}  # rows of a call, by the clock
_NEURONS = 32  # widths are multiples of it
_LEAST = 0.1  # of a layer's time that pruning leaves


def measured_costs(model: Any, batches: Sequence[Mapping[str, Any]], clock: str) -> dict[str, Any]:
    """What heads, neurons and layers of a model cost on the engine in int8, for calls like those of a clock."""
    encoder: Any = find_encoder(model, "compress")
    masks = [is_token(batch["attention_mask"]) for batch in batches]
    costs = Costs.measured(encoder, masks, "time", "int8", _NEURONS, _BATCH_SIZES[clock])
    return {
        "heads": costs.heads.tolist(),
        "widths": costs.widths.tolist(),
        "base": costs.base,
        "layer": costs.layer,
        "layers": len(encoder_layers(encoder)),
    }


def depths(layers: int, wanted: int | None) -> list[int]:
    """Of the students that are timed: the shallowest, the deepest and the one that is asked for."""
    return sorted({1, layers - 1, min(wanted or 1, layers)} & set(range(1, layers)))


def student(layers: int) -> str:
    """What the timing of a student of so many layers in int8 is called."""
    return f"int8, {layers} layers"


class Route(NamedTuple):
    """How many layers a model has, and the seconds that its encoder may take; None: as it is."""

    layers: int
    seconds: float | None


@dataclass(frozen=True)
class MeasuredTeacher:
    """What was measured of a teacher, and what follows from it.

    Attributes:
        costs: of its encoder in int8.
        layers: that it has.
        reference: seconds of a call of the teacher by transformers.
        own: for 1, 2, … layers the seconds of a call in int8 outside of them; what the table counts too much is taken
            off. A student's head is another than the teacher's.
        batch_size: rows of a call.
        recipe: settings of the run.
    """

    costs: Costs
    layers: int
    reference: float
    own: Sequence[float]
    batch_size: int
    recipe: Compression

    @classmethod
    def of(cls, measured: Mapping[str, Any], recipe: Compression) -> MeasuredTeacher:
        """From what `plan.json` says."""
        table = measured["costs"]
        costs = Costs(np.array(table["heads"]), np.array(table["widths"]), table["base"], _NEURONS, table["layer"])
        made = cls(costs, table["layers"], 0.0, (), _BATCH_SIZES[recipe.clock], recipe)
        timed = {made.layers: "int8"} | {count: student(count) for count in depths(made.layers, recipe.layers)}
        beyond = {count: made.seconds(measured["speed"], timed[count]) - made.whole(count) for count in sorted(timed)}
        shallower = [count for count in beyond if count < made.layers]
        reference = made.seconds(measured["speed"], "transformers")
        places = range(1, made.layers)  # none for a teacher of one layer
        own = np.interp(places, shallower, [beyond[count] for count in shallower]).tolist() if places else []
        return replace(made, reference=reference, own=(*own, beyond[made.layers]))

    def seconds(self, speed: Mapping[str, Any], name: str) -> float:
        """Of a call of the model ``name``, by what `Flow.clocks` measured."""
        if self.recipe.clock == "latency":
            return float(speed["latency_ms"][name]["median"]) / 1e3
        return self.batch_size / float(speed["throughput"][name]["median"])

    @property
    def speedup_of_int8(self) -> float:
        """Of the teacher in int8."""
        return self.reference / (self.own[-1] + self.whole(self.layers))

    def budget(self, target: float, layers: int) -> float:
        """Seconds of an encoder of so many layers in a model that is ``target`` times as fast as the teacher."""
        return self.reference / target - self.own[layers - 1]

    def costs_of(self, layers: int) -> Costs:
        return self.costs.deeper(layers - self.layers)

    def whole(self, layers: int) -> float:
        """Seconds of an encoder of so many whole layers."""
        return float(self.costs_of(layers).base + layers * (self.costs.heads[-1] + self.costs.widths[-1]))

    def least(self, layers: int) -> float:
        """Seconds of one of which pruning leaves as little as is sensible."""
        base = float(self.costs_of(layers).base)
        return base + _LEAST * (self.whole(layers) - base)

    def route(self, target: float) -> Route:
        """The way to a speed-up that keeps most layers, without pruning more of them than is allowed if possible."""
        counts = range(self.layers, 0, -1) if self.recipe.layers is None else [self.recipe.layers]
        for layers in counts:
            budget = self.budget(target, layers)
            base, whole = float(self.costs_of(layers).base), self.whole(layers)
            if budget >= whole * (1 - 1e-9):
                return Route(layers, None)
            if budget - base >= (1 - self.recipe.most_pruned) * (whole - base):
                return Route(layers, budget)
        return Route(counts[-1], budget)

    def allows(self, target: float) -> bool:
        """Whether a model may be so fast."""
        layers = self.recipe.layers or 1
        return self.budget(target, layers) >= self.least(layers)

    def check(self, target: float) -> None:
        """Raise RecipeError for a speed-up that no model reaches here."""
        layers = self.recipe.layers or 1
        most = self.reference / (self.own[layers - 1] + self.least(layers))
        require(self.allows(target), "compress: speedup", f"at most {most:.1f} on this machine", f"{target:g}")
