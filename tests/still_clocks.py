"""A machine without clocks: models are as fast as what they have left, so that no test depends on the time."""

from __future__ import annotations

from distilbert_fast.jobs import compress, flow
from distilbert_fast.modeling.encoder import find_encoder
from distilbert_fast.modeling.structure import structure_of

# Milliseconds of a call: what is outside the layers, an empty layer, a head, a neuron.
OWN, LAYER, HEAD, NEURON = 1.0, 0.5, 2.0, 0.05
TEACHER_MS = 60.0  # by transformers; 2 layers of 2 heads and 64 neurons take 16.4 on the engine, 3.66× as fast


def milliseconds(model) -> float:
    layers = structure_of(find_encoder(model, "test"))
    return OWN + sum(LAYER + HEAD * len(heads) + NEURON * ffn for heads, ffn in layers)


def machine(patch):
    """Models are as fast as what they have left, whatever the machine does."""

    def timed(self, models, rows):
        taken = {name: TEACHER_MS if name == "transformers" else milliseconds(m) for name, m in models.items()}
        found = {
            "latency_ms": {name: dict.fromkeys(("median", "low", "high"), ms) for name, ms in taken.items()},
            "throughput": {name: dict.fromkeys(("median", "low", "high"), 1e3 / ms) for name, ms in taken.items()},
        }
        inputs = {"latency_rows": 1, "throughput_rows": 32, "mean_tokens": 8.0, "threads": 1, "device": "cpu"}
        environment = {"python": "3", "versions": {}, "cpu": {"tier": "scalar"}}
        place = {"date": "now", "machine": {"cpu": "a machine", "cores": 1, "system": "a system"}}
        return {**place, "environment": environment, "inputs": inputs}, found

    def costs(model, batches, clock):
        layers, heads = 2, 2
        tables = {"heads": [HEAD * h / 1e3 for h in range(heads + 1)], "widths": [NEURON * f / 1e3 for f in range(65)]}
        return {**tables, "base": layers * LAYER / 1e3, "layer": LAYER / 1e3, "layers": layers}

    patch.setattr(flow.Flow, "clocks", timed)
    patch.setattr(compress, "measured_costs", costs)
