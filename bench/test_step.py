"""A step of MLM distillation, 8 × 128 tokens, base size, beside the original distiller's form: see bench/step/ways.py.

A process of its own for each, and memory by parts: `python -m bench.step`.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.contest import OURS, TRIAD, Contender, triad
from bench.step.ways import WAYS
from bench.step.worker import Run


@pytest.mark.parametrize("way", ["ours-fp32-teacher-int8", "ours-bf16-teacher-int8"])
def test_step(hold_contest, way):
    names = {OURS: way, WAYS[way].rival: WAYS[way].rival}
    runs = {name: Run(WAYS[of], "base", 8, 128) for name, of in names.items()}
    moved = 2 * 4 * (110 + 67) * 10**6  # the weights of both models, read and, of the student, written
    contenders = {name: Contender(lambda run=run: run.turn(1), lambda: None, moved) for name, run in runs.items()}
    a = torch.empty(4 << 20)
    hold_contest(contenders | {TRIAD: triad(a, a)}, moved)
