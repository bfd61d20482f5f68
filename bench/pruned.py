"""What pruning saves on the engine, and where: python -m bench.pruned --model DIR --pruned DIR [--batch 32x128]

The whole and the pruned classifier take turns on random ids without padding. Beside the time that was saved stands
what a table of times of encoders of that shape says of the heads and of the neurons that are gone, in int8.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.harness.machine import machine
from distilbert_fast import optimize
from distilbert_fast.compression.costs import Costs
from distilbert_fast.evaluation.speed import time_calls
from distilbert_fast.modeling.encoder import find_encoder
from distilbert_fast.modeling.structure import structure_of


def load(directory: Path, precision: str | None) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return model if precision is None else optimize(model, precision)


def saved(whole: Path, pruned: Path, rows: int, length: int, rounds: int) -> Table:
    table = Table("precision", "whole, ms", "pruned, ms", "times as fast", "saved, ms", "by heads", "by neurons")
    ids = torch.randint(1000, 2000, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for precision in (None, "fp32", "int8"):
        models = {"whole": load(whole, precision), "pruned": load(pruned, precision)}
        taken = {
            name: 1e3 * median(calls[0] for calls in turns)
            for name, turns in time_calls(models, [batch], rounds).items()
        }
        parts = ["", ""]
        if precision == "int8":  # in float32 the table would take minutes
            before, after = (structure_of(find_encoder(model, "bench")) for model in models.values())
            mask = [torch.ones(rows, length, dtype=torch.bool)]
            costs = Costs.measured(find_encoder(models["whole"], "bench"), mask, "time", precision, 1, rows)
            layers = list(zip(before, after, strict=True))
            heads = sum(costs.heads[len(old.heads)] - costs.heads[len(new.heads)] for old, new in layers)
            parts = [
                f"{1e3 * heads:.2f}",
                f"{1e3 * sum(costs.widths[a.ffn] - costs.widths[b.ffn] for a, b in layers):.2f}",
            ]
        whole_ms, pruned_ms = taken["whole"], taken["pruned"]
        row = (f"{whole_ms:.2f}", f"{pruned_ms:.2f}", f"{whole_ms / pruned_ms:.2f}", f"{whole_ms - pruned_ms:.2f}")
        table.add_row(precision or "transformers, fp32", *row, *parts)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--batch", default="32x128", metavar="ROWSxTOKENS")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    rows, length = map(int, given.batch.split("x"))
    console = Console(width=120)
    console.print(machine(), saved(given.model, given.pruned, rows, length, given.rounds))


if __name__ == "__main__":
    main()
