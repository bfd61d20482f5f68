"""`distill` under torchrun: two processes make what one makes, go on when killed, and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from distillation.launch_runs import KINDS
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where they are, and what they printed."""
    directory = tmp_path_factory.mktemp("launch")
    command = [sys.executable, "-m", "distillation.launch_runs", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout.splitlines()[-1])


def models(output):
    return json.loads((output / "report.json").read_text())["models"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_make_what_one_makes(runs, kind):
    """Of the same rows at each step, in the last of an epoch too, which the two cannot share evenly."""
    one, two = (runs[0] / kind / name for name in ("one", "two"))
    for name, row in models(one).items():
        assert len(row["losses"]) >= 4
        for entry, other in zip(row["losses"], models(two)[name]["losses"], strict=True):
            assert other == pytest.approx(entry, rel=1e-4, abs=1e-6)
        weights = load_file(two / name / "model.safetensors")
        for tensor_name, tensor in load_file(one / name / "model.safetensors").items():
            torch.testing.assert_close(weights[tensor_name], tensor, atol=1e-4, rtol=1e-3, msg=tensor_name)
        assert models(two)[name]["quality"] == pytest.approx(row["quality"], rel=1e-3, abs=1e-5)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


def test_killed_they_go_on_to_the_same_bytes(runs):
    """All of them, or one, which the launcher has the others follow; and where it starts them again."""
    directory, printed = runs
    at = [int(name.removeprefix("checkpoint-")) for name in printed["killed"]]
    assert 0 < at[0] < at[1] < at[2] < 12
    for name in ("teacher", "student"):
        whole, killed = (directory / run / name / "model.safetensors" for run in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()
        assert models(directory / "whole")[name]["losses"] == models(directory / "killed")[name]["losses"]
    assert not (directory / "killed" / "checkpoints").exists()
    assert "args.world_size was 2, is 1" in (directory / "refused").read_text()


def test_killed_in_a_stream_it_goes_on_to_the_same_bytes(runs):
    """In its second pass, whose masks and order are others than in the first."""
    directory, printed = runs
    assert 9 < int(printed["killed in a stream"].removeprefix("checkpoint-")) < 24
    for name in ("teacher", "student"):
        whole, killed = (directory / run / name / "model.safetensors" for run in ("whole-stream", "killed-stream"))
        assert whole.read_bytes() == killed.read_bytes()
    assert models(directory / "whole-stream")["student"]["steps"] == 24


def test_what_the_first_fails_with_ends_the_other(runs):
    failed = runs[1]["failed"]
    assert failed["held"][0].startswith("StageError: distill-task: output: ")
    assert failed["full"][0] == "OSError: [Errno 28] No space left on device"
    for first, other in failed.values():
        assert other == f"ProcessError: {first.partition(': ')[2]}"
