"""However a batch is cut, over processes or in time, the steps of the student are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from distillation.ddp_runs import WAYS
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
LOSSES = ("loss", "kl", "mlm", "cos", "mse", "hidden", "relation")


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """{way: (weights, logs)}"""
    directory = tmp_path_factory.mktemp("ways")
    command = [sys.executable, "-m", "distillation.ddp_runs", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return {
        name: (
            load_file(directory / name / "weights.safetensors"),
            json.loads((directory / name / "logs.json").read_text()),
        )
        for name in WAYS
    }


@pytest.mark.parametrize("way", [name for name in WAYS if name != "whole"])
def test_it_takes_the_steps_of_the_whole_batch(ways, way):
    (weights, logs), (expected, expected_logs) = ways[way], ways["whole"]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    for entry, other in zip(logs[:3], expected_logs[:3], strict=True):
        for name in LOSSES:
            assert entry[name] == pytest.approx(other[name], rel=1e-4), name
    for name in LOSSES:
        assert logs[3][f"eval_{name}"] == pytest.approx(expected_logs[3][f"eval_{name}"], rel=1e-4), name


def test_the_steps_moved_every_weight(ways):
    """So that equal weights say something."""
    from distillation import tiny

    start = dict(tiny.student(tiny.teacher("MaskedLM")).named_parameters())
    for name, tensor in ways["whole"][0].items():
        if not name.endswith("k_lin.bias"):  # no loss but the relations feels it
            assert (tensor - start[name]).abs().max() > 1e-5, name


def test_the_logs_are_the_weighted_losses(ways):
    """Weights and temperature follow their schedules: at steps 0, 1 and 2 of 3."""
    hidden = [1.0, 0.875, 0.625]  # cosine from 1 to 0.5
    for entry, weight in zip(ways["whole"][1][:3], hidden, strict=True):
        parts = {"kl": 5.0, "mlm": 2.0, "cos": 1.0, "mse": 0.01, "hidden": weight, "relation": 1.0}
        assert entry["loss"] == pytest.approx(sum(w * entry[name] for name, w in parts.items()), rel=1e-4)
